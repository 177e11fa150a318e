// Depthwise convolutions with channels side by side. A part is a block of channels of some rows of one phase's outputs;
// float32 and bfloat16 images that lie so already are read in place, where edges clip the taps.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/direct.h"

namespace fastdl {
namespace {

constexpr i64 kBudget = i64{320} << 10;  // floats of scratch a thread, of all kinds
constexpr i64 kImage = i64{64} << 10;    // of them the copied image, where more than one row
constexpr i64 kChannels = 64;            // of a part whose image is copied
// Of a part of wgrad, where they fit. 64: 1.12 times the time at 96 and 128 channels side by side (Zen 4); of copied
// images 96 are 0.92, others the same.
constexpr i64 kGradChannels = 128;
constexpr i64 kPlaceFloats = 32 << 10;  // weights of a part whose image is read in place
// Images from which rows to come are fetched ahead, 0.8 of the time at 14 MB; of what the caches hold, as the 3 MB of
// 8x512x14x14, the processor's own prefetching is ahead, and more of it costs up to 1.05 times (Zen 4).
constexpr i64 kFetchBytes = i64{8} << 20;
constexpr i64 kChunks = 32;  // wgrad: parts to aim for

i64 blocks_of(i64 n, i64 block) { return (n + block - 1) / block; }

bool fetch_pays(const ConvDesc& d) {
  const DirectSides s = direct_sides(d);
  return d.N * d.C * s.in[0] * s.in[1] * s.in[2] * kItemSize[static_cast<int>(d.dtype)] >= kFetchBytes;
}

// Pixels between the first and the last that the taps of an axis meet.
i64 reach(const ConvAxis& a) { return a.taps ? (a.taps - 1) * a.tap_step : 0; }

// The outputs lo..hi-1 all of whose taps lie in first..last-1.
void interior(const ConvAxis& a, i64 first, i64 last, i64* lo, i64* hi) {
  const i64 left = a.first - first, right = a.first + reach(a);
  *lo = left < 0 ? std::min(a.count, (-left + a.in_step - 1) / a.in_step) : 0;
  *hi = right < last ? std::min(a.count, (last - right + a.in_step - 1) / a.in_step) : 0;
  *hi = std::max(*lo, *hi);
}

struct Problem {
  const ConvDesc& d;
  const ConvPlan& p;
  const DirectPlan& q;
  const ConvArgs& args;
  const DirectOps& ops;
  i64 taps;  // of all phases

  Problem(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& a)
      : d(desc), p(plan), q(plan.direct), args(a), ops(*plan.kernel->functions->direct) {
    taps = d.kernel[0] * d.kernel[1] * d.kernel[2];
  }

  // dst[tap][row] = the weights of the channels c0..c0+channels-1.
  void copy_weights(i64 c0, i64 channels, float* dst, i64 row) const {
    const ConvTensor& w = args.w;
    const void* const from = direct_at(w.data, c0 * w.n_step, d.dtype);
    if (w.step[2] == 1 && w.step[1] == d.kernel[2] && w.step[0] == d.kernel[1] * d.kernel[2])
      return ops.copy(from, 1, w.n_step, taps, channels, dst, row);
    for (i64 z = 0; z < d.kernel[0]; ++z)
      for (i64 y = 0; y < d.kernel[1]; ++y, dst += d.kernel[2] * row)
        ops.copy(direct_at(from, z * w.step[0] + y * w.step[1], d.dtype), w.step[2], w.n_step, d.kernel[2], channels,
                 dst, row);
  }
};

// dst[z][y][x][row] = channels of the pixels from `first` on, `extent` of them, zeros outside the image; depths lie
// depth_step apart.
void copy_image(const DirectOps& ops, const ConvTensor& x, const void* origin, DType dtype, const i64* size,
                const i64* first, i64 depth_step, const i64* extent, i64 channels, float* dst, i64 row) {
  for (i64 z = 0; z < extent[0]; ++z) {
    const i64 id = first[0] + z * depth_step;
    for (i64 y = 0; y < extent[1]; ++y, dst += extent[2] * row) {
      const i64 ih = first[1] + y;
      i64 lo = extent[2], hi = extent[2];
      if (id >= 0 && id < size[0] && ih >= 0 && ih < size[1]) {
        lo = std::min(extent[2], std::max<i64>(0, -first[2]));
        hi = std::max(lo, std::min(extent[2], size[2] - first[2]));
      }
      std::fill(dst, dst + lo * row, 0.0f);
      std::fill(dst + hi * row, dst + extent[2] * row, 0.0f);
      if (lo == hi) continue;
      const i64 at = id * x.step[0] + ih * x.step[1] + (first[2] + lo) * x.step[2];
      ops.copy(direct_at(origin, at, dtype), x.step[2], x.c_step, hi - lo, channels, dst + lo * row, row);
    }
  }
}

// The image as a part reads it: in place, or a copy of all that its taps meet, zeros around the image included.
// Positions are those in the image.
struct View {
  const void* data;
  i64 lo[3], hi[3];  // what may be read
  i64 origin[3], step[3];
  i64 every;  // of the depths is there, from the origin on

  bool holds(int i, i64 at) const { return lo[i] <= at && at < hi[i]; }
  i64 row(i64 z, i64 y) const { return (z - origin[0]) / every * step[0] + (y - origin[1]) * step[1]; }
  i64 column(i64 x) const { return (x - origin[2]) * step[2]; }
};

struct Part {
  const ConvAxis *ad, *ah, *aw;
  i64 n, bundle, c0, channels;
  i64 od, h0, h1, w0, w1;  // outputs

  bool empty() const { return od >= ad->count || h0 >= h1 || w0 >= w1; }
};

struct Scratch {
  float *image, *weights, *sums, *bias;
  i64 *off, *w_off, *next;  // of taps, or rows of them
  i64 packed = -1;          // the bundle of the weights
};

// Forward and dgrad.
struct Gather {
  const Problem& x;
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const ConvArgs& args = x.args;
  const ConvTensor& in = d.pass == ConvPass::dgrad ? args.y : args.x;
  const ConvTensor& out = d.pass == ConvPass::dgrad ? args.x : args.y;
  const DirectSides sides = direct_sides(d);
  const bool bare = args.activation == Activation::none && !args.residual && !args.pre;
  // bfloat16 multiplied as it lies.
  const bool split = bare && d.dtype == DType::bf16 && ops.strip_split && in.c_step == 1;
  const bool plain = split || (bare && d.dtype == DType::f32);  // sums are results
  const bool in_place = split || (d.dtype == DType::f32 && (in.c_step == 1 || d.C == 1));
  const bool fetches = in_place && fetch_pays(d);
  const i64 width = in_place ? q.place_channels : q.channels;
  const GemmHelpers& helpers = *gemm_pack_kernel(x.p.kernel->isa, d.dtype).helpers;
  std::vector<ConvAxis> axes[3];
  i64 row_block, row_blocks, col_blocks, parts;

  explicit Gather(const Problem& problem) : x(problem) {
    for (int i = 0; i < 3; ++i)
      for (i64 f = 0; f < sides.phases[i]; ++f) axes[i].push_back(conv_axis(d, i, f));
    const i64 rows = axes[1][0].count, phases = sides.phases[0] * sides.phases[1] * sides.phases[2];
    col_blocks = blocks_of(axes[2][0].count, q.block[2]);
    const i64 whole = d.N * blocks_of(d.C, width) * phases * axes[0][0].count * col_blocks;
    // In place nothing is copied: few rows a part keep all threads busy to the end.
    row_block = in_place ? std::max<i64>(1, std::min(q.block[1], whole * rows / (8 * x.p.threads))) : q.block[1];
    row_blocks = blocks_of(rows, row_block);
    parts = whole * row_blocks;
  }

  Part part(i64 at) const {
    const auto digit = [&](i64 n) {
      const i64 r = at % n;
      at /= n;
      return r;
    };
    Part p;
    p.h0 = digit(row_blocks) * row_block, p.w0 = digit(col_blocks) * q.block[2], p.od = digit(axes[0][0].count);
    p.aw = &axes[2][digit(sides.phases[2])];
    p.ah = &axes[1][digit(sides.phases[1])];
    p.ad = &axes[0][digit(sides.phases[0])];
    p.n = digit(d.N), p.bundle = at, p.c0 = p.bundle * width, p.channels = std::min(width, d.C - p.c0);
    p.h1 = std::min(p.ah->count, p.h0 + row_block), p.w1 = std::min(p.aw->count, p.w0 + q.block[2]);
    return p;
  }

  void pack_weights(const Part& p, Scratch* s) const {
    if (s->packed == p.bundle) return;
    s->packed = p.bundle;
    x.copy_weights(p.c0, p.channels, s->weights, width);
    if (args.bias)
      ops.copy(direct_at(args.bias, p.c0 * args.bias_step, d.dtype), 0, args.bias_step, 1, p.channels, s->bias, 0);
    if (!split) return;
    FinishArgs e = {};  // back to bfloat16, exactly: copied only to lie side by side
    e.sum = s->weights, e.sum_row = e.c_row = width, e.c = s->image;
    e.m = static_cast<int>(x.taps), e.n = static_cast<int>(p.channels);
    helpers.finish(e);
    e.sum = s->bias, e.c = direct_at(static_cast<void*>(s->image), x.taps * width, d.dtype), e.m = 1;
    if (args.bias) helpers.finish(e);
  }

  View view(const Part& p, const Scratch& s) const {
    const void* const origin = direct_at(in.data, p.n * in.n_step + p.c0 * in.c_step, d.dtype);
    if (in_place)
      return {origin, {}, {sides.in[0], sides.in[1], sides.in[2]}, {}, {in.step[0], in.step[1], in.step[2]}, 1};
    const ConvAxis &ad = *p.ad, &ah = *p.ah, &aw = *p.aw;
    const i64 depths = ad.taps, rows = (p.h1 - p.h0 - 1) * ah.in_step + reach(ah) + 1;
    const i64 cols = (p.w1 - p.w0 - 1) * aw.in_step + reach(aw) + 1;
    const i64 z = p.od * ad.in_step + ad.first, y = p.h0 * ah.in_step + ah.first, e = p.w0 * aw.in_step + aw.first;
    if (ad.taps > 0 && ah.taps > 0 && aw.taps > 0) {
      const i64 first[3] = {z, y, e}, extent[3] = {depths, rows, cols};
      copy_image(ops, in, origin, d.dtype, sides.in, first, ad.tap_step, extent, p.channels, s.image, width);
    }
    return {s.image,
            {z, y, e},
            {z + reach(ad) + 1, y + rows, e + cols},
            {z, y, e},
            {rows * cols * width, cols * width, width},
            ad.tap_step};
  }

  // f(offset in the view, offset in the weights) of each row of taps, from b0 on, that output row h finds there.
  template <class F>
  void each_row(const Part& p, const View& v, i64 h, const F& f, i64 b0 = 0) const {
    for (i64 a = 0; a < p.ad->taps; ++a) {
      const i64 z = p.od * p.ad->in_step + p.ad->first + a * p.ad->tap_step;
      if (!v.holds(0, z)) continue;
      const i64 plane = (p.ad->tap_first + a * p.ad->tap_inc) * d.kernel[1] + p.ah->tap_first;
      for (i64 b = b0; b < p.ah->taps; ++b) {
        const i64 y = h * p.ah->in_step + p.ah->first + b * p.ah->tap_step;
        if (v.holds(1, y)) f(v.row(z, y), ((plane + b * p.ah->tap_inc) * d.kernel[2] + p.aw->tap_first) * width);
      }
    }
  }

  // Output row h to y by windows that slide.
  void slide_row(const Part& p, const View& v, const Scratch& s, i64 h, const StripArgs& common) const {
    const i64 left = p.w0 * p.aw->in_step + p.aw->first;  // of the first output's window
    SlideArgs u = {};
    u.x = v.data, u.x_col = v.step[2], u.lo = v.lo[2] - left, u.hi = v.hi[2] - left;
    u.w = common.w, u.w_col = p.aw->tap_inc * width, u.off = s.off, u.w_off = s.w_off;
    each_row(p, v, h, [&](i64 row, i64 w) {
      s.off[u.rows] = row + v.column(left);
      s.w_off[u.rows++] = w;
    });
    u.next = s.next;
    const auto fetch = [&](i64 row, i64) { s.next[u.ahead++] = row + v.column(left); };
    if (fetches) each_row(p, v, h + 1, fetch, std::max<i64>(0, p.ah->taps - p.ah->in_step));
    u.y = common.y, u.y_col = common.y_col, u.bias = common.bias, u.channels = common.channels;
    u.width = p.aw->taps, u.stride = p.aw->in_step, u.cols = p.w1 - p.w0;
    (split ? ops.slide_split : ops.slide)(u);
  }

  // The same tap by tap: columns that find all of the width's together, others one by one.
  void strip_row(const Part& p, const View& v, const Scratch& s, i64 h, const StripArgs& common) const {
    const ConvAxis& aw = *p.aw;
    i64 lo, hi;
    interior(aw, v.lo[2], v.hi[2], &lo, &hi);
    lo = std::min(std::max(lo, p.w0), p.w1), hi = std::max(lo, std::min(hi, p.w1));
    for (i64 j = p.w0, next; j < p.w1; j = next) {
      next = j == lo && lo < hi ? hi : j + 1;
      StripArgs t = common;
      t.x = v.data, t.x_col = aw.in_step * v.step[2], t.off = s.off, t.w_off = s.w_off;
      t.y = direct_at(common.y, (j - p.w0) * t.y_col, split ? DType::bf16 : DType::f32), t.cols = next - j;
      each_row(p, v, h, [&](i64 row, i64 w) {
        for (i64 c = 0; c < aw.taps; ++c) {
          const i64 at = j * aw.in_step + aw.first + c * aw.tap_step;
          if (!v.holds(2, at)) continue;
          s.off[t.taps] = row + v.column(at);
          s.w_off[t.taps++] = w + c * aw.tap_inc * width;
        }
      });
      (split ? ops.strip_split : ops.strip)(t);
    }
  }

  void run(const Part& p, Scratch* s) const {
    pack_weights(p, s);
    const View v = view(p, *s);
    const ConvAxis &ad = *p.ad, &ah = *p.ah, &aw = *p.aw;
    const bool sliding = aw.tap_step == 1 && slides(aw.taps, aw.in_step);
    StripArgs t = {};
    t.w = split ? s->image : s->weights, t.channels = p.channels;
    if (args.bias)
      t.bias =
          split ? direct_at(static_cast<void*>(s->image), x.taps * width, d.dtype) : reinterpret_cast<char*>(s->bias);
    t.y_col = plain ? aw.out_step * out.step[2] : p.channels;
    for (i64 h = p.h0; h < p.h1; ++h) {
      const i64 at = p.n * out.n_step + p.c0 * out.c_step + (p.od * ad.out_step + ad.out_first) * out.step[0] +
                     (h * ah.out_step + ah.out_first) * out.step[1] + (p.w0 * aw.out_step + aw.out_first) * out.step[2];
      t.y = plain ? static_cast<void*>(direct_at(out.data, at, d.dtype)) : s->sums;
      sliding ? slide_row(p, v, *s, h, t) : strip_row(p, v, *s, h, t);
      if (plain) continue;
      FinishArgs e = {};
      e.sum = s->sums, e.sum_row = p.channels, e.c = direct_at(out.data, at, d.dtype);
      e.c_row = aw.out_step * out.step[2];
      e.residual = args.residual ? direct_at(args.residual, at, d.dtype) : nullptr;
      e.pre = args.pre ? direct_at(args.pre, at, d.dtype) : nullptr;
      e.activation = args.activation;
      e.m = static_cast<int>(p.w1 - p.w0), e.n = static_cast<int>(p.channels);
      helpers.finish(e);
    }
  }
};

void gather(const Problem& x) {
  const Gather g(x);
  ArenaLease scratch(x.p.workspace_bytes());
  parallel(x.p.threads, [&](int thread, int threads) {
    Scratch s;
    s.image = reinterpret_cast<float*>(scratch.data() + thread * x.q.per_thread_bytes());
    s.weights = s.image + x.q.x_floats;
    s.sums = s.weights + x.q.w_floats;
    s.bias = s.sums + x.q.y_floats;
    s.off = reinterpret_cast<i64*>(s.bias + direct_round(x.q.place_channels, 16));
    s.w_off = s.off + x.taps, s.next = s.w_off + x.taps;
    for (i64 at = g.parts * thread / threads, end = g.parts * (thread + 1) / threads; at < end; ++at) {
      const Part p = g.part(at);
      if (!p.empty()) g.run(p, &s);
    }
  });
}

bool splits_grad(const ConvDesc& d, const DirectOps& ops) { return d.dtype == DType::bf16 && ops.slide_grad_split; }

void gradient(const Problem& x) {
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const ConvTensor &in = x.args.x, &dy = x.args.y;
  const ConvAxis a[3] = {conv_axis(d, 0, 0), conv_axis(d, 1, 0), conv_axis(d, 2, 0)};
  const bool sliding = a[2].tap_step == 1 && slides(a[2].taps, a[2].in_step);
  const bool split = sliding && splits_grad(d, ops) && in.c_step == 1 && dy.c_step == 1;  // multiplied as it lies
  const bool in_place = split || (d.dtype == DType::f32 && (dy.c_step == 1 || d.C == 1));
  const bool reads_x = split || (sliding && d.dtype == DType::f32 && (in.c_step == 1 || d.C == 1));  // in place
  const bool fetches = reads_x && fetch_pays(d);
  const i64 bundles = blocks_of(d.C, q.channels), taps = x.taps;
  const i64 row_blocks = blocks_of(a[1].count, q.block[1]), col_blocks = blocks_of(a[2].count, q.block[2]);
  ArenaLease scratch(x.p.workspace_bytes());
  float* const partial = reinterpret_cast<float*>(scratch.data() + x.p.threads * q.per_thread_bytes());

  parallel(x.p.threads, [&](int thread, int threads) {
    float* const image = reinterpret_cast<float*>(scratch.data() + thread * q.per_thread_bytes());
    float* const dw = image + q.x_floats;
    float* const grads = dw + q.w_floats;
    i64* const off = reinterpret_cast<i64*>(grads + q.y_floats);
    const i64 parts = bundles * q.chunks, units = d.N * a[0].count * row_blocks * col_blocks;
    for (i64 part = parts * thread / threads, end = parts * (thread + 1) / threads; part < end; ++part) {
      const i64 chunk = part % q.chunks, c0 = part / q.chunks * q.channels;
      const i64 channels = std::min(q.channels, d.C - c0), row = q.channels;
      std::fill(dw, dw + taps * row, 0.0f);
      for (i64 unit = units * chunk / q.chunks, stop = units * (chunk + 1) / q.chunks; unit < stop; ++unit) {
        const i64 w0 = unit % col_blocks * q.block[2], h0 = unit / col_blocks % row_blocks * q.block[1];
        const i64 od = unit / col_blocks / row_blocks % a[0].count, n = unit / col_blocks / row_blocks / a[0].count;
        const i64 rows = std::min(q.block[1], a[1].count - h0), cols = std::min(q.block[2], a[2].count - w0);
        const i64 first[3] = {od * a[0].in_step + a[0].first, h0 * a[1].in_step + a[1].first,
                              w0 * a[2].in_step + a[2].first};
        const i64 extent[3] = {a[0].taps, (rows - 1) * a[1].in_step + reach(a[1]) + 1,
                               (cols - 1) * a[2].in_step + reach(a[2]) + 1};
        const void* const origin = direct_at(in.data, n * in.n_step + c0 * in.c_step, d.dtype);
        if (!reads_x) copy_image(ops, in, origin, d.dtype, d.in, first, a[0].tap_step, extent, channels, image, row);
        StripGradArgs g = {};
        const void* grad = nullptr;  // dy of this unit
        const i64 at = n * dy.n_step + c0 * dy.c_step + od * dy.step[0] + h0 * dy.step[1] + w0 * dy.step[2];
        if (in_place) {
          grad = direct_at(dy.data, at, d.dtype), g.dy_row = dy.step[1], g.dy_col = dy.step[2];
        } else {
          grad = grads, g.dy_row = cols * row, g.dy_col = row;
          for (i64 y = 0; y < rows; ++y)
            ops.copy(direct_at(dy.data, at + y * dy.step[1], d.dtype), dy.step[2], dy.c_step, cols, channels,
                     grads + y * g.dy_row, row);
        }
        if (sliding) {
          SlideGradArgs u = {};
          u.x = reads_x ? origin : image, u.x_col = reads_x ? in.step[2] : row;
          u.lo = reads_x ? -first[2] : 0, u.hi = reads_x ? d.in[2] - first[2] : extent[2];
          u.dy_col = g.dy_col, u.dw = dw, u.dw_col = row, u.off = off, u.dw_off = off + taps, u.next = off + 2 * taps;
          u.width = a[2].taps, u.stride = a[2].in_step, u.cols = cols, u.channels = channels;
          for (i64 h = 0; h < rows; ++h) {
            u.dy = direct_at(grad, h * g.dy_row, split ? DType::bf16 : DType::f32), u.rows = u.ahead = 0;
            for (i64 z = 0; z < a[0].taps; ++z) {
              const i64 id = first[0] + z * a[0].tap_step;
              const i64 plane = id * in.step[0] + first[2] * in.step[2];
              for (i64 y = 0; y < a[1].taps; ++y) {
                const i64 down = h * a[1].in_step + y * a[1].tap_step, ih = first[1] + down;
                const i64 below = ih + a[1].in_step;  // of the row after it, where no other tap is yet
                if (fetches && id >= 0 && id < d.in[0] && y + a[1].in_step >= a[1].taps && below >= 0 &&
                    below < d.in[1])
                  off[2 * taps + u.ahead++] = plane + below * in.step[1];
                if (reads_x && (id < 0 || id >= d.in[0] || ih < 0 || ih >= d.in[1])) continue;
                off[u.rows] = reads_x ? plane + ih * in.step[1] : (z * extent[1] + down) * extent[2] * row;
                off[taps + u.rows++] = (z * a[1].taps + y) * a[2].taps * row;
              }
            }
            (split ? ops.slide_grad_split : ops.slide_grad)(u);
          }
          continue;
        }
        i64 t = 0;
        for (i64 z = 0; z < a[0].taps; ++z)
          for (i64 y = 0; y < a[1].taps; ++y)
            for (i64 e = 0; e < a[2].taps; ++e)
              off[t++] = ((z * extent[1] + y * a[1].tap_step) * extent[2] + e * a[2].tap_step) * row;
        g.dy = static_cast<const float*>(grad), g.x = image, g.x_row = a[1].in_step * extent[2] * row,
        g.x_col = a[2].in_step * row;
        g.off = off, g.taps = taps, g.rows = rows, g.cols = cols, g.channels = channels;
        g.dw = dw, g.dw_tap = row;
        ops.strip_grad(g);
      }
      float* const sums = partial + (chunk * d.C + c0) * taps;
      if (!split) ops.copy_f32(dw, 1, row, channels, taps, sums, taps);
      for (i64 c = 0; split && c < row; c += ops.width) {  // a vector of channels that lie two apart
        const i64 first = c / ops.width % 2 + c / (2 * ops.width) * 2 * ops.width;
        const i64 count = std::min<i64>(ops.width, (channels - first + 1) / 2);
        if (count > 0) ops.copy_f32(dw + c, 1, row, count, taps, sums + first * taps, 2 * taps);
      }
    }
  });
  direct_combine(d, partial, q.chunks, x.args.w, x.p.threads);
}

}  // namespace

bool plan_depthwise(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan) {
  DirectPlan& q = *plan;
  q = {};
  if (d.groups != d.C || d.K != d.C || d.C == 0) return false;
  const bool wgrad = d.pass == ConvPass::wgrad;
  if (!wgrad && !d.channels_last && d.C > 1) return false;
  const DirectSides s = direct_sides(d);
  i64 count[3], most[3], step[3], depth = 1;
  const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2];
  for (int i = 0; i < 3; ++i) {
    count[i] = 1, most[i] = 0, step[i] = 1;
    for (i64 f = 0; f < s.phases[i]; ++f) {
      const ConvAxis a = conv_axis(d, i, f);
      count[i] = std::max(count[i], a.count);
      most[i] = std::max(most[i], reach(a));
      step[i] = a.in_step;
      if (i == 0) depth = std::max(depth, a.taps);
    }
  }
  const i64 unit = wgrad && splits_grad(d, ops) ? 2 * ops.width : ops.width;
  const auto set_channels = [&](i64 most) {
    q.channels = direct_round(std::min(d.C, most), unit);
    q.place_channels = std::max(q.channels, std::min(direct_round(d.C, ops.width), kPlaceFloats / taps / 64 * 64));
  };
  set_channels(wgrad ? kGradChannels : kChannels);
  const auto fits = [&](const i64* b, bool small) {
    const i64 rows = (b[1] - 1) * step[1] + most[1] + 1, cols = (b[2] - 1) * step[2] + most[2] + 1;
    q.x_floats = direct_round(q.channels * depth * rows * cols, 16);
    q.y_floats = direct_round(wgrad ? q.channels * b[1] * b[2] : q.place_channels * b[2], 16);
    q.x_floats = std::max(q.x_floats, direct_round(q.place_channels * taps, 16));  // weights of bfloat16
    q.w_floats = direct_round((wgrad ? q.channels : q.place_channels) * taps, 16);
    q.row_floats = direct_round(q.place_channels, 16) + 6 * direct_round(taps, 16);  // bias, and lists of taps
    return q.x_floats + q.y_floats + q.w_floats + q.row_floats <= kBudget &&
           (!small || q.channels * depth * rows * cols <= kImage);
  };
  i64* const b = q.block;
  b[0] = b[1] = b[2] = 1;
  if (wgrad && !fits(b, false)) set_channels(kChannels);
  if (!fits(b, false)) return false;
  const auto grow = [&](int i, bool small) {  // to the most that fits, then evenly
    for (i64 top = count[i]; b[i] < top;) {
      const i64 old = b[i], half = (b[i] + top + 1) / 2;
      b[i] = half;
      if (fits(b, small)) continue;
      b[i] = old, top = half - 1;
    }
    const i64 blocks = blocks_of(count[i], b[i]);
    b[i] = blocks_of(count[i], blocks);
  };
  grow(2, true);
  if (b[2] < std::min<i64>(count[2], 16)) grow(2, false);
  grow(1, true);
  fits(b, false);
  if (wgrad) {
    const i64 bundles = blocks_of(d.C, q.channels);
    const i64 units = d.N * count[0] * blocks_of(count[1], b[1]) * blocks_of(count[2], b[2]);
    q.chunks = std::max<i64>(1, std::min(units, blocks_of(kChunks, bundles)));
    q.partial_bytes = q.chunks * d.C * taps * 4;
  }
  return true;
}

void conv_run_depthwise(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  const Problem problem(d, p, args);
  if (d.pass == ConvPass::wgrad) {
    gradient(problem);
    direct_bias_grad(d, p, args);
  } else {
    gather(problem);
  }
}

}  // namespace fastdl
