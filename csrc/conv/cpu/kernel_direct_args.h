// What the direct kernels (depthwise, grouped) are given. Included by instruction-set units: plain data only.
#pragma once
#include "base/types.h"

namespace fastdl {

// Depthwise, vectors over channels: y(j,c) = sum_t x(j,c + off_t) w(c + w_off_t) [+ bias(c)], j < cols, c < channels.
struct StripArgs {
  const void* x;  // x(j,c) = x[j*x_col + c]; all float, of strip_split all bf16
  i64 x_col;
  const i64* off;    // [taps]
  const void* w;     // [.., channels]
  const i64* w_off;  // [taps]
  void* y;           // y(j,c) = y[j*y_col + c]
  i64 y_col;
  const void* bias;  // or null
  i64 taps, cols, channels;
};

// The same by rows of taps, `width` columns side by side each; slides() says which there are.
// y(j,c) = sum_{r,e} x(j*stride + e, c + off_r) w(e, c + w_off_r) [+ bias(c)], columns of x outside lo..hi-1 left out.
struct SlideArgs {
  const void* x;  // x(i,c) = x[i*x_col + c]; all float, of slide_split all bf16
  i64 x_col, lo, hi;
  const i64* off;  // [rows]
  const void* w;   // w(e,c) = w[e*w_col + c]
  i64 w_col;
  const i64* w_off;  // [rows]
  void* y;           // y(j,c) = y[j*y_col + c]
  i64 y_col;
  const void* bias;                         // or null
  i64 width, stride, rows, cols, channels;  // cols > 0
  const i64* next;  // [ahead], as off: rows that the next call reads and this one does not, to be fetched meanwhile
  i64 ahead;
};
constexpr int kSlideWidth = 7;  // the widest
constexpr bool slides(i64 width, i64 stride) {
  return stride == 1 ? width == 1 || width == 2 || width == 3 || width == 5 || width == 7
                     : stride == 2 && (width == 3 || width == 5);
}

// Its weight gradient: dw(t,c) += sum_{i,j} dy(i,j,c) x(i,j,c + off_t), i < rows, j < cols, c < channels.
struct StripGradArgs {
  const float* x;  // x(i,j,c) = x[i*x_row + j*x_col + c]
  i64 x_row, x_col;
  const i64* off;  // [taps]
  const float* dy;
  i64 dy_row, dy_col;
  float* dw;  // dw(t,c) = dw[t*dw_tap + c]
  i64 dw_tap;
  i64 taps, rows, cols, channels;
};

// The same by rows of taps: dw(e, c + dw_off_r) += sum_j dy(j,c) x(j*stride + e, c + off_r), e < width.
struct SlideGradArgs {
  const void* x;  // x, x_col, lo, hi, off: as of SlideArgs
  i64 x_col, lo, hi;
  const i64* off;
  const void* dy;  // as x
  i64 dy_col;
  // dw(e,c) = dw[e*dw_col + c]; of slide_grad_split the even channels of each pair of vectors before the odd ones.
  float* dw;
  i64 dw_col;
  const i64* dw_off;  // [rows]
  i64 width, stride, rows, cols, channels;
  const i64* next;  // as of SlideArgs
  i64 ahead;
};

// Grouped, vectors over pixels: y(o,i) = [y(o,i) +] sum_t w(t,o) x(i + off_t) [+ bias(o)], i < count, o < outputs.
// Reads and writes whole vectors: up to one past the last.
struct PlaneArgs {
  const float* x;
  const i64* off;  // [taps]: of every channel
  const float* w;  // [taps][outputs]
  float* y;        // y(o,i) = y[o*y_out + i]
  i64 y_out;
  const float* bias;  // [outputs], or null
  i64 taps, count;
  int outputs;  // 1, 2, 4 or 8, at most DirectOps::outputs
  bool accumulate;
};

// Its weight gradient: dw(o,t) += sum_{d,h,i} dy(o, d,h,i) x(d,h,i + off_t), i < cols.
struct PlaneGradArgs {
  const float* x;  // x(d,h,i) = x[d*x_depth + h*x_row + i]
  i64 x_depth, x_row;
  const i64* off;   // [taps]
  const float* dy;  // dy(o,d,h,i) = dy[o*dy_out + d*dy_depth + h*dy_row + i]
  i64 dy_out, dy_depth, dy_row;
  float* dw;  // dw(o,t) = dw[o*dw_out + t]
  i64 dw_out;
  i64 taps, depths, rows, cols;
  int outputs;  // any
};

// dst[i*row + j] = src[i*i_step + j*j_step], i < m, j < n, widened.
using CopyFunction = void(const void* src, i64 i_step, i64 j_step, i64 m, i64 n, float* dst, i64 row);

struct DirectOps {
  int unit;     // channels in a float of an image: 2, pairs of 16 bits, where the level multiplies such
  int width;    // floats in a vector
  int outputs;  // largest of PlaneArgs::outputs
  CopyFunction* copy;
  CopyFunction* copy_f32;
  CopyFunction* image;  // as copy; of pairs: those of src[2*i*i_step + j*j_step] and i_step behind it
  void (*strip)(const StripArgs&);
  void (*strip_split)(const StripArgs&);  // or null
  void (*slide)(const SlideArgs&);
  void (*slide_split)(const SlideArgs&);  // as strip_split
  void (*strip_grad)(const StripGradArgs&);
  void (*slide_grad)(const SlideGradArgs&);
  void (*slide_grad_split)(const SlideGradArgs&);  // as strip_split
  void (*plane)(const PlaneArgs&);
  void (*plane_grad)(const PlaneGradArgs&);
};

}  // namespace fastdl
