// What the pieces of the weight gradient share: parts, blocks of pixels, scratch.
#pragma once
#include <algorithm>

#include "conv/conv.h"
#include "conv/cpu/dense_problem.h"
#include "gemm/gemm.h"

namespace fastdl::wgrad {

constexpr i64 kSlack = 64;  // floats: what packing writes past its rows
constexpr i64 kRuns = 256;  // pixels of a block at most
constexpr i64 kTileRows = 32;

inline int vector_width(const ConvKernel& kernel) { return kernel.nr / 2; }
inline const GemmKernel& exact_kernel(DType dtype) { return gemm_pack_kernel(Isa::kAvx512, dtype, Precision::fma); }

struct Range {
  i64 begin, end;
  i64 size() const { return end - begin; }
};
// The o in [0, count) for which start + o*step lies in [0, size).
inline Range inside(i64 start, i64 step, i64 count, i64 size) {
  const i64 begin = start >= 0 ? 0 : std::min(count, ceil_div(-start, step));
  const i64 end = start >= size ? 0 : std::min(count, (size - 1 - start) / step + 1);
  return {begin, std::max(begin, end)};
}

struct Scratch {
  float* band;
  float* y;
  float* stage;
  float* sums;
  float* again;
};

struct Row {
  i64 n, z, h;
};

// One part: a box of taps x channels x output channels of one group, and a range of blocks.
struct Part {
  const ConvDesc& d;
  const ConvWgradPlan& p;
  const ConvArgs& args;
  const ConvKernel& kernel;
  const GemmKernel& packer;   // in the form that tiles read
  const GemmKernel& widener;  // to float32
  const GemmKernel& plain;    // float32
  i64 chunk, group;
  i64 tap[3], taps[3];  // the box
  Range c, k;           // within the group
  Range blocks;

  i64 all_taps() const { return taps[0] * taps[1] * taps[2]; }
  i64 panel_rows() const {  // the last one is the bias
    return all_taps() * (p.flat ? round_up(c.size(), kTileRows) : c.size()) + 1;
  }
  // Sums of a tap, from output channel j and channel c on, flat.
  i64 flat_at(i64 tap, i64 j, i64 c) const {
    const i64 panels = ceil_div(this->c.size(), kTileRows), tile = kTileRows * kTileRows;
    const i64 in_tile = j % kTileRows * kTileRows + c % kTileRows;
    return ((j / kTileRows * all_taps() + tap) * panels + c / kTileRows) * tile + in_tile;
  }
  i64 flat_bias() const { return sum_floats() - round_up(k.size(), kTileRows); }
  bool with_bias() const { return args.dbias && tap[0] + tap[1] + tap[2] + c.begin == 0; }
  // Behind the sums, where the kernel needs them: the largest magnitudes of the columns and of the rows.
  i64 sum_floats() const { return round_up(k.size(), kernel.nr) * panel_rows(); }
  i64 peak_floats() const {
    return conv_has_peaks(kernel) && !p.flat ? round_up(k.size(), kernel.nr) + panel_rows() : 0;
  }
  float* column_peaks(float* sums) const { return conv_has_peaks(kernel) ? sums + sum_floats() : nullptr; }
  float* row_peaks(float* sums) const {
    return conv_has_peaks(kernel) ? sums + sum_floats() + round_up(k.size(), kernel.nr) : nullptr;
  }
};

// A block of output pixels.
struct Block {
  Row rows[kRuns];
  int sub[kRuns];    // rows that share packed rows
  i64 first[kRuns];  // the first h of each
  int count;
  i64 w, width;  // of all rows
  i64 steps;     // of a row, packed
  i64 cols;      // packed columns
};

// Rows that blocks do not reach beyond: flat ones stay in an image, or have whole ones.
inline i64 rows_together(const Part& x) {
  return x.p.flat && x.p.rows < x.d.out[1] ? x.d.out[1] : x.d.N * x.d.out[0] * x.d.out[1];
}
inline i64 first_row(const Part& x, i64 block) {
  const i64 all = rows_together(x), blocks = ceil_div(all, x.p.rows), i = block / x.p.segments;
  return i / blocks * all + i % blocks * x.p.rows;
}

// Few channels: element by element costs less than a vector store each pixel that reaches over its neighbours.
constexpr i64 kFewChannels = 4;

void pack_x(const Part& x, const Block& b, const Scratch& s);
// dy of the block: panels [steps][nr], one behind the other.
void pack_y(const Part& x, const Block& b, float* dst);
// The packed row that output row r meets with tap (t0, t1).
i64 slot(const Part& x, const Block& b, int r, i64 t0, i64 t1);

// The same of kernels that take pixels as tiles: packing and products.
void run_tiles(const Part& x, const Block& b, const Scratch& s, bool accumulate);
// Likewise, flat.
struct Flat {
  dense::Line h, w;
  i64 pixels;  // of dy
};
// Of the box of taps from `tap` on.
Flat flat_of(const ConvDesc& d, const i64* tap, const i64* taps, i64 h, i64 rows, i64 w, i64 width, i64 planes);
i64 flat_y_row(const ConvKernel& kernel, i64 pixels);  // bytes of a channel of dy
i64 flat_x_row(i64 channels);                          // floats of a pair of pixels of x
i64 flat_x_floats(i64 pixels, i64 channels);
void run_flat(const Part& x, const Block& b, const Scratch& s, bool accumulate);
// Whether all sums of flat blocks can be trusted. Zeros between the rows of dy, times Inf or NaN of x, are NaN; of tiny
// values tiles lose some (kTinyPeak).
bool trusted(const Part& x, const Scratch& s);
i64 flat_peaks(i64 sub_images, i64 columns, i64 channels);  // floats, behind the copies of x
// What tiles got wrong (GemmHelpers::suspects), once all is summed.
void repair(const Part& x, const Scratch& s);

}  // namespace fastdl::wgrad
