// Depthwise convolutions with channels side by side. A part is a block of channels of some rows of one phase's outputs;
// float32 and bfloat16 images that lie so already are read in place, where edges clip the taps. Of images whose pixels
// lie side by side a part is a copy, and its results, of all phases along the width, are turned over at its end.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/depthwise_problem.h"

namespace fastdl {
namespace depthwise {
namespace {

constexpr i64 kChannels = 64;  // of a part whose image is copied
// Of a part of wgrad, where they fit. 64: 1.12 times the time at 96 and 128 channels side by side (Zen 4); of copied
// images 96 are 0.92, others the same.
constexpr i64 kGradChannels = 128;
constexpr i64 kPlaceFloats = 32 << 10;  // weights of a part whose image is read in place

// The outputs lo..hi-1 all of whose taps lie in first..last-1.
void interior(const ConvAxis& a, i64 first, i64 last, i64* lo, i64* hi) {
  const i64 left = a.first - first, right = a.first + reach(a);
  *lo = left < 0 ? std::min(a.count, ceil_div(-left, a.in_step)) : 0;
  *hi = right < last ? std::min(a.count, ceil_div(last - right, a.in_step)) : 0;
  *hi = std::max(*lo, *hi);
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
  const bool turning = turns(d);
  // bfloat16 multiplied as it lies.
  const bool split = !turning && bare && d.dtype == DType::bf16 && ops.strip_split && in.c_step == 1;
  const bool plain = split || (bare && d.dtype == DType::f32);  // sums are results
  const bool in_place = split || (!turning && d.dtype == DType::f32 && (in.c_step == 1 || d.C == 1));
  const bool fetches = in_place && fetch_pays(d);
  const i64 row_phases = turning ? 1 : sides.phases[2];  // that are parts of their own
  const i64 width = in_place ? q.place_channels : q.channels;
  std::vector<ConvAxis> axes[3];
  i64 row_block, row_blocks, col_blocks, parts;

  explicit Gather(const Problem& problem) : x(problem) {
    for (int i = 0; i < 3; ++i)
      for (i64 f = 0; f < sides.phases[i]; ++f) axes[i].push_back(conv_axis(d, i, f));
    const i64 rows = axes[1][0].count, phases = sides.phases[0] * sides.phases[1] * row_phases;
    col_blocks = ceil_div(axes[2][0].count, q.block[2]);
    const i64 whole = d.N * ceil_div(d.C, width) * phases * axes[0][0].count * col_blocks;
    // Few rows a part keep all threads busy to the end; rows that are copied have neighbours that are copied twice.
    const i64 parts_of_thread = in_place ? 8 : 2;
    row_block = std::clamp<i64>(whole * rows / (parts_of_thread * x.p.threads), 1, q.block[1]);
    row_blocks = ceil_div(rows, row_block);
    parts = whole * row_blocks;
  }

  Part part(i64 i) const {
    const auto digit = [&](i64 n) {
      const i64 r = i % n;
      i /= n;
      return r;
    };
    Part p;
    p.h0 = digit(row_blocks) * row_block, p.w0 = digit(col_blocks) * q.block[2], p.od = digit(axes[0][0].count);
    p.aw = &axes[2][digit(row_phases)];
    p.ah = &axes[1][digit(sides.phases[1])];
    p.ad = &axes[0][digit(sides.phases[0])];
    p.n = digit(d.N), p.bundle = i, p.c0 = p.bundle * width, p.channels = std::min(width, d.C - p.c0);
    p.h1 = std::min(p.ah->count, p.h0 + row_block), p.w1 = std::min(p.aw->count, p.w0 + q.block[2]);
    return p;
  }

  void pack_weights(const Part& p, Scratch* s) const {
    if (s->packed == p.bundle) return;
    s->packed = p.bundle;
    x.copy_weights(p.c0, p.channels, s->weights, width);
    if (args.bias)
      ops.copy(at(args.bias, p.c0 * args.bias_step, d.dtype), 0, args.bias_step, 1, p.channels, s->bias, 0);
    if (!split) return;
    FinishArgs e = {};  // back to bfloat16, exactly: copied only to lie side by side
    e.sum = s->weights, e.sum_row = e.c_row = width, e.c = s->image;
    e.m = static_cast<int>(x.taps), e.n = static_cast<int>(p.channels);
    x.helpers.finish(e);
    e.sum = s->bias, e.c = at(s->image, x.taps * width, d.dtype), e.m = 1;
    if (args.bias) x.helpers.finish(e);
  }

  View view(const Part& p, const Scratch& s) const {
    const void* const origin = at(in.data, p.n * in.n_step + p.c0 * in.c_step, d.dtype);
    if (in_place)
      return {origin, {}, {sides.in[0], sides.in[1], sides.in[2]}, {}, {in.step[0], in.step[1], in.step[2]}, 1};
    const ConvAxis &ad = *p.ad, &ah = *p.ah, &aw = *p.aw;
    const i64 depths = ad.taps, rows = (p.h1 - p.h0 - 1) * ah.in_step + reach(ah) + 1;
    const i64 cols = (p.w1 - p.w0 - 1) * aw.in_step + reach(aw) + 1;
    const i64 z = p.od * ad.in_step + ad.first, y = p.h0 * ah.in_step + ah.first, e = p.w0 * aw.in_step + aw.first;
    if (ad.taps > 0 && ah.taps > 0 && aw.taps > 0) {
      const i64 first[3] = {z, y, e}, extent[3] = {depths, rows, cols};
      copy_image(x, in, origin, sides.in, first, ad.tap_step, extent, p.channels, s.image, width);
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
      t.y = at(common.y, (j - p.w0) * t.y_col, split ? DType::bf16 : DType::f32), t.cols = next - j;
      each_row(p, v, h, [&](i64 row, i64 w) {
        for (i64 c = 0; c < aw.taps; ++c) {
          const i64 column = j * aw.in_step + aw.first + c * aw.tap_step;
          if (!v.holds(2, column)) continue;
          s.off[t.taps] = row + v.column(column);
          s.w_off[t.taps++] = w + c * aw.tap_inc * width;
        }
      });
      (split ? ops.strip_split : ops.strip)(t);
    }
  }

  // The rows of a part. Turning: sums of row h from s->sums + (h - h0)*line on, columns of all phases in their order.
  void run_rows(const Part& p, const Scratch& s, i64 line) const {
    const View v = view(p, s);
    const ConvAxis& aw = *p.aw;
    const bool sliding = aw.tap_step == 1 && slides(aw.taps, aw.in_step);
    StripArgs t = {};
    t.w = split ? s.image : s.weights, t.channels = p.channels;
    if (args.bias) t.bias = split ? at(s.image, x.taps * width, d.dtype) : s.bias;
    const i64 step = aw.out_step * out.step[2];
    t.y_col = turning ? aw.out_step * p.channels : plain ? step : p.channels;
    for (i64 h = p.h0; h < p.h1; ++h) {
      float* const sums = s.sums + (turning ? (h - p.h0) * line + aw.out_first * p.channels : 0);
      t.y = plain && !turning ? at(out.data, row_at(p, h), d.dtype) : sums;
      sliding ? slide_row(p, v, s, h, t) : strip_row(p, v, s, h, t);
      if (!plain && !turning) x.finish(sums, p.channels, out, row_at(p, h), step, p.w1 - p.w0, p.channels);
    }
  }

  void run(const Part& p, Scratch* s) const {
    pack_weights(p, s);
    if (!turning) return run_rows(p, *s, 0);
    const auto last = [&](const ConvAxis& aw) { return std::min(aw.count, p.w0 + q.block[2]); };
    i64 cols = 0;
    for (const ConvAxis& aw : axes[2]) cols += std::max<i64>(0, last(aw) - p.w0);
    for (const ConvAxis& aw : axes[2]) {
      Part f = p;
      f.aw = &aw, f.w1 = last(aw);
      if (!f.empty()) run_rows(f, *s, cols * p.channels);
    }
    turn(p, *s, cols);
  }

  // Where output row h of a part begins.
  i64 row_at(const Part& p, i64 h) const {
    const ConvAxis &ad = *p.ad, &ah = *p.ah, &aw = *p.aw;
    return p.n * out.n_step + p.c0 * out.c_step + (p.od * ad.out_step + ad.out_first) * out.step[0] +
           (h * ah.out_step + ah.out_first) * out.step[1] + (p.w0 * aw.out_step + aw.out_first) * out.step[2];
  }

  // A part's sums, channels side by side, to rows of pixels; to one a channel where they follow each other.
  void turn(const Part& p, const Scratch& s, i64 cols) const {
    const i64 rows = p.h1 - p.h0;
    const i64 together = p.ah->out_step * out.step[1] == cols ? rows : 1, count = together * cols;
    for (i64 h = 0; h < rows; h += together) {
      const float* const sums = s.sums + h * cols * p.channels;
      const i64 first = row_at(p, p.h0 + h);
      if (plain) {
        ops.copy_f32(sums, 1, p.channels, p.channels, count, static_cast<float*>(out.data) + first, out.c_step);
      } else {
        ops.copy_f32(sums, 1, p.channels, p.channels, count, s.image, count);
        x.finish(s.image, count, out, first, out.c_step, p.channels, count);
      }
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
    s.off = reinterpret_cast<i64*>(s.bias + round_up(x.q.place_channels, 16));
    s.w_off = s.off + x.taps, s.next = s.w_off + x.taps;
    for (i64 i = g.parts * thread / threads, end = g.parts * (thread + 1) / threads; i < end; ++i) {
      const Part p = g.part(i);
      if (!p.empty()) g.run(p, &s);
    }
  });
}

}  // namespace
}  // namespace depthwise

bool plan_depthwise(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan) {
  DirectPlan& q = *plan;
  q = {};
  if (d.groups != d.C || d.K != d.C || d.C == 0) return false;
  const bool wgrad = d.pass == ConvPass::wgrad;
  const DirectSides s = direct_sides(d);
  const bool turning = turns(d);
  i64 count[3], most[3], step[3], depth = 1;
  const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2];
  for (int i = 0; i < 3; ++i) {
    count[i] = 1, most[i] = 0, step[i] = 1;
    for (i64 f = 0; f < s.phases[i]; ++f) {
      const ConvAxis a = conv_axis(d, i, f);
      count[i] = std::max(count[i], a.count);
      most[i] = std::max(most[i], depthwise::reach(a));
      step[i] = a.in_step;
      if (i == 0) depth = std::max(depth, a.taps);
    }
  }
  const i64 unit = wgrad && depthwise::splits_grad(d, ops) ? 2 * ops.width : ops.width;
  const auto set_channels = [&](i64 most) {
    q.channels = round_up(std::min(d.C, most), unit);
    const i64 most_in_place = std::min(round_up(d.C, ops.width), depthwise::kPlaceFloats / taps / 64 * 64);
    q.place_channels = turning ? q.channels : std::max(q.channels, most_in_place);
  };
  set_channels(wgrad ? depthwise::kGradChannels : depthwise::kChannels);
  const auto fits = [&](const i64* b, bool small) {
    const i64 rows = (b[1] - 1) * step[1] + most[1] + 1, cols = (b[2] - 1) * step[2] + most[2] + 1;
    if (std::max({depth, rows, cols}) > kDirectBudget) return false;  // their product fits 63 bits
    q.x_floats = round_up(q.channels * depth * rows * cols, 16);
    q.y_floats = round_up(wgrad || turning ? q.channels * b[1] * b[2] * s.phases[2] : q.place_channels * b[2], 16);
    q.x_floats = std::max(q.x_floats, round_up(q.place_channels * taps, 16));  // weights of bfloat16
    if (turning) q.x_floats = std::max(q.x_floats, q.y_floats);
    q.w_floats = round_up((wgrad ? q.channels : q.place_channels) * taps, 16);
    q.row_floats = round_up(q.place_channels, 16) + 6 * round_up(taps, 16);  // bias, and lists of taps
    return q.x_floats + q.y_floats + q.w_floats + q.row_floats <= kDirectBudget &&
           (!small || q.channels * depth * rows * cols <= kDirectImage);
  };
  i64* const b = q.block;
  b[0] = b[1] = b[2] = 1;
  if (wgrad && !fits(b, false)) set_channels(depthwise::kChannels);
  if (!fits(b, false)) return false;
  const auto grow = [&](int i, bool small) { direct_grow(count[i], b + i, [&] { return fits(b, small); }); };
  grow(2, true);
  if (b[2] < std::min<i64>(count[2], 16)) grow(2, false);
  grow(1, true);
  fits(b, false);
  if (wgrad) {
    const i64 bundles = ceil_div(d.C, q.channels);
    const i64 units = d.N * count[0] * ceil_div(count[1], b[1]) * ceil_div(count[2], b[2]);
    q.chunks = std::max<i64>(1, std::min(units, ceil_div(kDirectChunks, bundles)));
    q.partial_bytes = q.chunks * d.C * taps * 4;
  }
  return true;
}

void conv_run_depthwise(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  const depthwise::Problem problem(d, p, args);
  if (d.pass == ConvPass::wgrad) {
    depthwise::gradient(problem);
    direct_bias_grad(d, p, args);
  } else {
    depthwise::gather(problem);
  }
}

}  // namespace fastdl
