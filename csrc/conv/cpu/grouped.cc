// Grouped convolutions by a direct kernel: a part is a few groups of a block of output pixels, of all phases along the
// width together.
#include <algorithm>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/grouped_problem.h"

namespace fastdl {
namespace grouped {
namespace {

constexpr i64 kLine = 2048;  // pixels of a block
constexpr i64 kDepth = 192;  // products after which accumulators start afresh, as those of dense products do

struct Part {
  i64 bundle, g0, groups;
  i64 n, block;
  i64 pair;  // of the phases along depth and height
};

struct Scratch {
  float *image, *sums, *turned, *weights, *bias;
  i64 bundle = -1, pair = -1;  // of the weights
};

// Forward and dgrad.
struct Gather {
  const Problem& x;
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const ConvArgs& args = x.args;
  const DirectSides& sides = x.sides;
  const bool dgrad = d.pass == ConvPass::dgrad;
  const ConvTensor& in = dgrad ? args.y : args.x;
  const ConvTensor& out = dgrad ? args.x : args.y;
  const i64 w_out = dgrad ? args.w.c_step : args.w.n_step, w_in = dgrad ? args.w.n_step : args.w.c_step;
  const i64 w_group = (dgrad ? sides.inputs : sides.outputs) * args.w.n_step;
  const i64 inputs = sides.inputs / ops.unit;  // floats of a pixel and group
  const i64 padded = padded_outputs(sides.outputs, ops);
  const i64 row_phases = sides.phases[2], pairs = sides.phases[0] * sides.phases[1];
  const i64 parts = x.bundles * pairs * d.N * x.pixels;
  const bool last = out.c_step == 1 || d.groups * sides.outputs == 1;  // channels_last
  const bool plain = d.dtype == DType::f32 && args.activation == Activation::none && !args.residual && !args.pre;

  Part part(i64 i) const {
    const i64 block = i % x.pixels, n = i / x.pixels % d.N, pair = i / x.pixels / d.N % pairs;
    const i64 bundle = i / x.pixels / d.N / pairs, g0 = bundle * q.channels;
    return {bundle, g0, std::min(q.channels, d.groups - g0), n, block, pair};
  }
  const Phase& phase(const Part& p, i64 f) const { return x.phases[p.pair * row_phases + f]; }
  float* sums_of(const Scratch& s, i64 f) const { return s.sums + f * (q.y_floats / row_phases); }
  i64 sums_row(const Phase& f, const Block& b) const { return round_up(f.line(b.n), ops.width); }  // of an output

  // [phase along the width][group][outputs of a kernel call][input and tap][output].
  void pack_weights(const Part& p, Scratch* s) const {
    if (s->bundle == p.bundle && s->pair == p.pair) return;
    s->bundle = p.bundle, s->pair = p.pair;
    float* to = s->weights;
    for (i64 f = 0; f < row_phases; ++f) {
      for (i64 g = 0; g < p.groups; ++g) {
        for (i64 o = 0, width; o < sides.outputs; o += width) {
          width = outputs_at(sides.outputs - o, ops);
          to = pack_outputs(phase(p, f), (p.g0 + g) * w_group + o * w_out, std::min(width, sides.outputs - o), width,
                            to);
        }
      }
    }
    if (!args.bias) return;
    const i64 count = p.groups * sides.outputs;
    const void* const bias = at(args.bias, p.g0 * sides.outputs * args.bias_step, d.dtype);
    ops.copy(bias, 0, args.bias_step, 1, count, s->bias, 0);
    std::fill(s->bias + count, s->bias + count + 8, 0.0f);
  }

  float* pack_outputs(const Phase& f, i64 first, i64 real, i64 width, float* to) const {
    const ConvTensor& w = args.w;
    for (i64 c = 0; c < sides.inputs; c += ops.unit) {
      for (i64 tz : f.axis[0].tap) {
        for (i64 ty : f.axis[1].tap) {
          for (i64 tx : f.axis[2].tap) {
            const i64 tap = first + c * w_in + tz * w.step[0] + ty * w.step[1] + tx * w.step[2];
            ops.image(at(w.data, tap, d.dtype), w_in, w_out, 1, real, to, 0);
            std::fill(to + real, to + width, 0.0f);
            to += width;
          }
        }
      }
    }
    return to;
  }

  // The sums of one phase along the width: sums_of(f)[group and output][line of the block]. w: its weights.
  void multiply(const Part& p, const Scratch& s, i64 f, const Block& b, const float* w) const {
    const Phase& phase = this->phase(p, f);
    const i64 channels = p.groups * inputs, depth = inputs * phase.taps;
    const void* const origin = at(in.data, p.n * in.n_step + p.g0 * sides.inputs * in.c_step, d.dtype);
    if (phase.taps) copy_image(x, in, origin, phase, b, channels, s.image);
    PlaneArgs t = {};
    t.count = phase.line(b.n), t.y_out = sums_row(phase, b);
    for (i64 g = 0; g < p.groups; ++g) {
      t.x = s.image + g * inputs * phase.planes * phase.plane;
      for (i64 o = 0; o < sides.outputs; o += t.outputs) {
        const i64 row = g * sides.outputs + o;
        t.outputs = outputs_at(sides.outputs - o, ops);
        t.y = sums_of(s, f) + row * t.y_out;
        i64 k = 0;
        do {
          t.taps = std::min(kDepth, depth - k);
          t.off = phase.off.data() + k;
          t.w = w + k * t.outputs;
          t.accumulate = k > 0;
          t.bias = args.bias && k + kDepth >= depth ? s.bias + row : nullptr;
          ops.plane(t);
          k += kDepth;
        } while (k < depth);
        w += depth * t.outputs;
      }
    }
  }

  // m x n sums, rows from_row apart, to the output from element `first` on, rows `row` apart.
  void write(const float* from, i64 from_row, i64 first, i64 row, i64 m, i64 n) const {
    if (plain) return ops.copy_f32(from, from_row, 1, m, n, static_cast<float*>(out.data) + first, row);
    x.finish(from, from_row, out, first, row, m, n);
  }

  // Where the outputs of a block's depth z begin.
  i64 depth_at(const Part& p, const Phase& f, const Block& b, i64 z) const {
    const i64 channel = p.n * out.n_step + p.g0 * sides.outputs * out.c_step;
    return channel + ((b.first[0] + z) * f.axis[0].out_step + f.axis[0].out_first) * out.step[0];
  }
  i64 row_at(const Phase& f, const Block& b, i64 y) const {
    return ((b.first[1] + y) * f.axis[1].out_step + f.axis[1].out_first) * out.step[1];
  }

  // One phase where channels lie side by side: all channels of a pixel.
  void write_pixels(const Part& p, const Scratch& s, i64 f, const Block& b) const {
    const Phase& phase = this->phase(p, f);
    const Axis& width = phase.axis[2];
    const i64 channels = p.groups * sides.outputs, sums = sums_row(phase, b), pixel = width.out_step * out.step[2];
    const i64 left = (b.first[2] * width.out_step + width.out_first) * out.step[2];
    for (i64 z = 0; z < b.n[0]; ++z) {
      for (i64 y = 0; y < b.n[1]; ++y) {
        const float* const row = sums_of(s, f) + (z * phase.extent[1] + y) * phase.extent[2];
        const i64 first = depth_at(p, phase, b, z) + row_at(phase, b, y) + left;
        if (plain) {
          ops.copy_f32(row, 1, sums, b.n[2], channels, static_cast<float*>(out.data) + first, pixel);
        } else {
          ops.copy_f32(row, 1, sums, b.n[2], channels, s.turned, channels);
          write(s.turned, channels, first, pixel, b.n[2], channels);
        }
      }
    }
  }

  // The only phase along the width, where pixels lie side by side: rows of an output channel.
  void write_rows(const Part& p, const Scratch& s, const Block& b) const {
    const Phase& phase = this->phase(p, 0);
    const i64 sums = sums_row(phase, b), row = phase.axis[1].out_step * out.step[1];
    for (i64 z = 0; z < b.n[0]; ++z) {
      const float* const slice = s.sums + z * phase.extent[1] * phase.extent[2];
      const i64 first = depth_at(p, phase, b, z) + row_at(phase, b, 0) + b.first[2];
      for (i64 o = 0; o < p.groups * sides.outputs; ++o)
        write(slice + o * sums, phase.extent[2], first + o * out.c_step, row, b.n[1], b.n[2]);
    }
  }

  // The same of several phases: a row of all is interleaved first.
  void write_phases(const Part& p, const Scratch& s, const Block& b) const {
    const Phase& phase = this->phase(p, 0);
    const i64 step = phase.axis[2].out_step;
    for (i64 z = 0; z < b.n[0]; ++z) {
      for (i64 o = 0; o < p.groups * sides.outputs; ++o) {
        for (i64 y = 0; y < b.n[1]; ++y) {
          i64 width = 0;
          for (i64 f = 0; f < row_phases; ++f) {
            const Phase& other = this->phase(p, f);
            const Block c = x.block(other, p.block);
            if (c.n[2] <= 0) continue;
            const float* const row =
                sums_of(s, f) + o * sums_row(other, c) + (z * other.extent[1] + y) * other.extent[2];
            for (i64 i = 0; i < c.n[2]; ++i) s.turned[i * step + f] = row[i];
            width += c.n[2];
          }
          const i64 first = depth_at(p, phase, b, z) + o * out.c_step + row_at(phase, b, y) + b.first[2] * step;
          write(s.turned, width, first, 0, 1, width);
        }
      }
    }
  }

  void run(const Part& p, Scratch* s) const {
    const Block first = x.block(phase(p, 0), p.block);
    if (first.n[0] <= 0 || first.n[1] <= 0) return;
    pack_weights(p, s);
    const float* w = s->weights;
    for (i64 f = 0; f < row_phases; ++f) {
      const Block b = x.block(phase(p, f), p.block);
      if (b.n[2] > 0) multiply(p, *s, f, b, w);
      if (b.n[2] > 0 && last) write_pixels(p, *s, f, b);
      w += p.groups * padded * inputs * phase(p, f).taps;
    }
    if (last) return;
    row_phases == 1 ? write_rows(p, *s, first) : write_phases(p, *s, first);
  }
};

void gather(const Problem& x) {
  const Gather g{x};
  ArenaLease scratch(x.p.workspace_bytes());
  parallel(x.p.threads, [&](int thread, int threads) {
    Scratch s;
    s.image = reinterpret_cast<float*>(scratch.data() + thread * x.q.per_thread_bytes());
    s.sums = s.image + x.q.x_floats;
    s.turned = s.sums + x.q.y_floats;
    s.weights = s.turned + x.q.row_floats;
    s.bias = s.weights + x.q.w_floats - round_up(x.q.channels * x.sides.outputs + 16, 16);
    for (i64 i = g.parts * thread / threads, end = g.parts * (thread + 1) / threads; i < end; ++i) g.run(g.part(i), &s);
  });
}

}  // namespace
}  // namespace grouped

bool plan_grouped(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan) {
  DirectPlan& q = *plan;
  q = {};
  const DirectSides s = direct_sides(d);
  const bool wgrad = d.pass == ConvPass::wgrad;
  if (ops.unit == 2 && (wgrad || s.inputs % 2)) return false;
  i64 count[3], span[3], planes[3], all_taps = 1;
  for (int i = 0; i < 3; ++i) {
    count[i] = span[i] = planes[i] = 1;
    all_taps *= d.kernel[i];
    for (i64 f = 0; f < s.phases[i]; ++f) {
      const grouped::Axis a = grouped::axis_of(d, i, f);
      count[i] = std::max(count[i], a.count);
      span[i] = std::max(span[i], a.span);
      planes[i] = std::max(planes[i], static_cast<i64>(a.base.size()));
    }
  }
  // Channels that lie side by side are copied a vector at a time.
  const i64 few = std::max<i64>(1, std::min(s.inputs, s.outputs));
  q.channels = std::min(d.groups, std::max<i64>(1, ops.width / few));
  const auto fits = [&](const i64* b, bool small) {
    const i64 extent = (b[0] + span[0]) * (b[1] + span[1]) * (b[2] + span[2]);
    const i64 line = round_up(((b[0] - 1) * (b[1] + span[1]) + b[1] - 1) * (b[2] + span[2]) + b[2], ops.width);
    const i64 outputs = q.channels * s.outputs, padded = grouped::padded_outputs(s.outputs, ops);
    q.x_floats = round_up(q.channels * s.inputs * planes[0] * planes[1] * planes[2] * extent + 16 * ops.width, 16);
    if (wgrad) {
      q.y_floats = round_up(outputs * b[0] * b[1] * b[2], 16);
      q.row_floats = q.w_floats = 0;
    } else {
      q.y_floats = s.phases[2] * round_up((outputs + 8) * line + 16 * ops.width, 16);
      q.row_floats = round_up(std::max(b[2] * outputs, b[2] * s.phases[2]), 16);
      q.w_floats = q.channels * padded * s.inputs * all_taps + 2 * round_up(outputs + 16, 16);
    }
    const i64 all = q.x_floats + q.y_floats + q.row_floats + q.w_floats;
    return all <= kDirectBudget && (!small || (q.x_floats <= kDirectImage && line <= grouped::kLine));
  };
  i64* const b = q.block;
  b[0] = b[1] = b[2] = 1;
  if (!fits(b, false) && (q.channels = 1, !fits(b, false))) return false;
  const auto grow = [&](int i, bool small) { direct_grow(count[i], b + i, [&] { return fits(b, small); }); };
  grow(2, true);
  if (b[2] < std::min<i64>(count[2], 64)) grow(2, false);
  grow(1, true);
  if (b[1] == count[1]) grow(0, true);
  fits(b, false);
  q.chunks = 0;
  if (wgrad) {
    const i64 bundles = ceil_div(d.groups, q.channels);
    i64 units = d.N;
    for (int i = 0; i < 3; ++i) units *= ceil_div(count[i], b[i]);
    q.chunks = std::max<i64>(1, std::min(units, ceil_div(kDirectChunks, bundles)));
    q.partial_bytes = q.chunks * d.K * s.inputs * all_taps * 4;
  }
  return true;
}

void conv_run_grouped(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  const grouped::Problem problem(d, p, args);
  if (d.pass == ConvPass::wgrad) {
    grouped::gradient(problem);
    direct_bias_grad(d, p, args);
  } else {
    grouped::gather(problem);
  }
}

}  // namespace fastdl
