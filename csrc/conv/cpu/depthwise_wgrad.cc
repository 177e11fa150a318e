// The weight gradient of depthwise convolutions: a part is a block of channels of a chunk of the blocks of pixels.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/depthwise_problem.h"

namespace fastdl::depthwise {
namespace {

struct Scratch {
  float *image, *dw, *grads;
  i64 *off, *dw_off, *next;  // of taps, or rows of them
};

// A block of channels, and in it of output pixels of one depth.
struct Unit {
  i64 c0, channels;
  i64 n, od, h0, w0, rows, cols;
  i64 first[3], extent[3];  // of the image that they meet
};

struct Gradient {
  const Problem& x;
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const ConvTensor &in = x.args.x, &dy = x.args.y;
  const ConvAxis a[3] = {conv_axis(d, 0, 0), conv_axis(d, 1, 0), conv_axis(d, 2, 0)};
  const bool sliding = a[2].tap_step == 1 && slides(a[2].taps, a[2].in_step);
  const bool split = sliding && splits_grad(d, ops) && in.c_step == 1 && dy.c_step == 1;   // multiplied as it lies
  const bool reads_dy = split || (d.dtype == DType::f32 && (dy.c_step == 1 || d.C == 1));  // in place
  const bool reads_x = split || (sliding && d.dtype == DType::f32 && (in.c_step == 1 || d.C == 1));  // likewise
  const bool fetches = reads_x && fetch_pays(d);
  const i64 taps = x.taps, row = q.channels;  // row: floats of a pixel, or tap, in scratch
  const i64 row_blocks = ceil_div(a[1].count, q.block[1]), col_blocks = ceil_div(a[2].count, q.block[2]);
  const i64 parts = ceil_div(d.C, q.channels) * q.chunks, units = d.N * a[0].count * row_blocks * col_blocks;

  Unit unit(i64 c0, i64 i) const {
    Unit u;
    u.c0 = c0, u.channels = std::min(q.channels, d.C - c0);
    u.w0 = i % col_blocks * q.block[2], u.h0 = i / col_blocks % row_blocks * q.block[1];
    u.od = i / col_blocks / row_blocks % a[0].count, u.n = i / col_blocks / row_blocks / a[0].count;
    u.rows = std::min(q.block[1], a[1].count - u.h0), u.cols = std::min(q.block[2], a[2].count - u.w0);
    const i64 begin[3] = {u.od, u.h0, u.w0}, count[3] = {1, u.rows, u.cols};
    for (int k = 0; k < 3; ++k) {
      u.first[k] = begin[k] * a[k].in_step + a[k].first;
      u.extent[k] = k == 0 ? a[0].taps : (count[k] - 1) * a[k].in_step + reach(a[k]) + 1;
    }
    return u;
  }

  // dy of a unit, where it lies or copied: rows `*line` and columns `*column` elements apart.
  const void* outputs(const Unit& u, const Scratch& s, i64* line, i64* column) const {
    const i64 first = u.n * dy.n_step + u.c0 * dy.c_step + u.od * dy.step[0] + u.h0 * dy.step[1] + u.w0 * dy.step[2];
    if (reads_dy) {
      *line = dy.step[1], *column = dy.step[2];
      return at(dy.data, first, d.dtype);
    }
    *line = u.cols * row, *column = row;
    for (i64 y = 0; y < u.rows; ++y)
      ops.copy(at(dy.data, first + y * dy.step[1], d.dtype), dy.step[2], dy.c_step, u.cols, u.channels,
               s.grads + y * *line, row);
    return s.grads;
  }

  // The rows of taps that output row h meets.
  void list_rows(const Unit& u, const Scratch& s, i64 h, SlideGradArgs* g) const {
    g->rows = g->ahead = 0;
    for (i64 z = 0; z < a[0].taps; ++z) {
      const i64 id = u.first[0] + z * a[0].tap_step;
      if (reads_x && (id < 0 || id >= d.in[0])) continue;
      const i64 plane = id * in.step[0] + u.first[2] * in.step[2];
      const auto holds = [&](i64 ih) { return ih >= 0 && ih < d.in[1]; };
      for (i64 y = 0; y < a[1].taps; ++y) {
        const i64 down = h * a[1].in_step + y * a[1].tap_step, ih = u.first[1] + down;
        const i64 below = ih + a[1].in_step;  // of the row after it, where no other tap is yet
        if (fetches && y + a[1].in_step >= a[1].taps && holds(below)) s.next[g->ahead++] = plane + below * in.step[1];
        if (reads_x && !holds(ih)) continue;
        s.off[g->rows] = reads_x ? plane + ih * in.step[1] : (z * u.extent[1] + down) * u.extent[2] * row;
        s.dw_off[g->rows++] = (z * a[1].taps + y) * a[2].taps * row;
      }
    }
  }

  void slide(const Unit& u, const Scratch& s, const void* origin) const {
    i64 line;
    SlideGradArgs g = {};
    const void* const grads = outputs(u, s, &line, &g.dy_col);
    g.x = reads_x ? origin : s.image, g.x_col = reads_x ? in.step[2] : row;
    g.lo = reads_x ? -u.first[2] : 0, g.hi = reads_x ? d.in[2] - u.first[2] : u.extent[2];
    g.dw = s.dw, g.dw_col = row, g.off = s.off, g.dw_off = s.dw_off, g.next = s.next;
    g.width = a[2].taps, g.stride = a[2].in_step, g.cols = u.cols, g.channels = u.channels;
    for (i64 h = 0; h < u.rows; ++h) {
      g.dy = at(grads, h * line, split ? DType::bf16 : DType::f32);
      list_rows(u, s, h, &g);
      (split ? ops.slide_grad_split : ops.slide_grad)(g);
    }
  }

  // Tap by tap, of the copied image.
  void strip(const Unit& u, const Scratch& s) const {
    StripGradArgs g = {};
    g.dy = static_cast<const float*>(outputs(u, s, &g.dy_row, &g.dy_col));
    for (i64 z = 0; z < a[0].taps; ++z)
      for (i64 y = 0; y < a[1].taps; ++y)
        for (i64 e = 0; e < a[2].taps; ++e)
          s.off[g.taps++] = ((z * u.extent[1] + y * a[1].tap_step) * u.extent[2] + e * a[2].tap_step) * row;
    g.x = s.image, g.x_row = a[1].in_step * u.extent[2] * row, g.x_col = a[2].in_step * row;
    g.off = s.off, g.rows = u.rows, g.cols = u.cols, g.channels = u.channels;
    g.dw = s.dw, g.dw_tap = row;
    ops.strip_grad(g);
  }

  // sums[channel][tap] of a part.
  void store(const Scratch& s, i64 channels, float* sums) const {
    if (!split) return ops.copy_f32(s.dw, 1, row, channels, taps, sums, taps);
    for (i64 c = 0; c < row; c += ops.width) {  // a vector of channels that lie two apart
      const i64 first = c / ops.width % 2 + c / (2 * ops.width) * 2 * ops.width;
      const i64 count = std::min<i64>(ops.width, ceil_div(channels - first, 2));
      if (count > 0) ops.copy_f32(s.dw + c, 1, row, count, taps, sums + first * taps, 2 * taps);
    }
  }

  void run(i64 part, const Scratch& s, float* partial) const {
    const i64 chunk = part % q.chunks, c0 = part / q.chunks * q.channels;
    std::fill(s.dw, s.dw + taps * row, 0.0f);
    for (i64 i = units * chunk / q.chunks, end = units * (chunk + 1) / q.chunks; i < end; ++i) {
      const Unit u = unit(c0, i);
      const void* const origin = at(in.data, u.n * in.n_step + c0 * in.c_step, d.dtype);
      if (!reads_x) copy_image(x, in, origin, d.in, u.first, a[0].tap_step, u.extent, u.channels, s.image, row);
      sliding ? slide(u, s, origin) : strip(u, s);
    }
    store(s, std::min(q.channels, d.C - c0), partial + (chunk * d.C + c0) * taps);
  }
};

}  // namespace

void gradient(const Problem& x) {
  const Gradient g{x};
  ArenaLease scratch(x.p.workspace_bytes());
  float* const partial = reinterpret_cast<float*>(scratch.data() + x.p.threads * x.q.per_thread_bytes());
  parallel(x.p.threads, [&](int thread, int threads) {
    Scratch s;
    s.image = reinterpret_cast<float*>(scratch.data() + thread * x.q.per_thread_bytes());
    s.dw = s.image + x.q.x_floats;
    s.grads = s.dw + x.q.w_floats;
    s.off = reinterpret_cast<i64*>(s.grads + x.q.y_floats);
    s.dw_off = s.off + x.taps, s.next = s.dw_off + x.taps;
    for (i64 part = g.parts * thread / threads, end = g.parts * (thread + 1) / threads; part < end; ++part)
      g.run(part, s, partial);
  });
  direct_combine(x.d, partial, x.q.chunks, x.args.w, x.p.threads);
}

}  // namespace fastdl::depthwise
