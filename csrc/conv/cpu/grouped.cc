// Grouped convolutions by a direct kernel: a part is a few groups of a block of output pixels; the rest of the file
// cuts the work and copies blocks in and out.
#include <algorithm>
#include <cstring>

#include "base/arena.h"
#include "base/parallel.h"
#include "conv/cpu/direct.h"
#include "simd/vec.h"

namespace fastdl {

DirectSides direct_sides(const ConvDesc& d) {
  const bool dgrad = d.pass == ConvPass::dgrad;
  DirectSides s;
  for (int i = 0; i < 3; ++i) {
    s.in[i] = dgrad ? d.out[i] : d.in[i];
    s.out[i] = dgrad ? d.in[i] : d.out[i];
    s.phases[i] = dgrad ? std::min(d.stride[i], d.in[i]) : 1;
  }
  s.inputs = (dgrad ? d.K : d.C) / d.groups;
  s.outputs = (dgrad ? d.C : d.K) / d.groups;
  return s;
}

DirectAxis direct_axis(const ConvDesc& d, int dim, i64 phase) {
  constexpr i64 kSpan = 64;  // taps further apart get copies of their own
  const ConvAxis a = conv_axis(d, dim, phase);
  DirectAxis x;
  x.count = a.count, x.in_step = a.in_step, x.out_step = a.out_step, x.out_first = a.out_first;
  x.plane.resize(a.taps), x.shift.resize(a.taps), x.tap.resize(a.taps);
  for (i64 i = 0; i < a.taps; ++i) {
    const i64 t = a.tap_step < 0 ? a.taps - 1 - i : i;  // from left to right
    const i64 at = a.first + t * a.tap_step;
    i64 plane = -1;
    const i64 planes = static_cast<i64>(x.base.size());
    for (i64 p = planes - 1; p >= std::max<i64>(0, planes - a.in_step) && plane < 0; --p)
      if ((at - x.base[p]) % a.in_step == 0 && (at - x.base[p]) / a.in_step <= kSpan) plane = p;
    if (plane < 0) plane = planes, x.base.push_back(at);
    x.plane[t] = plane;
    x.shift[t] = (at - x.base[plane]) / a.in_step;
    x.tap[t] = a.tap_first + t * a.tap_inc;
    x.span = std::max(x.span, x.shift[t]);
  }
  return x;
}

void direct_combine(const ConvDesc& d, const float* partial, i64 chunks, const ConvTensor& dw, int threads) {
  const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2], inputs = d.C / d.groups, row = inputs * taps;
  parallel(threads, [&](int thread, int team) {
    for (i64 k = d.K * thread / team, end = d.K * (thread + 1) / team; k < end; ++k) {
      i64 i = k * row;
      for (i64 c = 0; c < inputs; ++c) {
        for (i64 z = 0; z < d.kernel[0]; ++z) {
          for (i64 y = 0; y < d.kernel[1]; ++y) {
            i64 at = k * dw.n_step + c * dw.c_step + z * dw.step[0] + y * dw.step[1];
            for (i64 x = 0; x < d.kernel[2]; ++x, ++i, at += dw.step[2]) {
              float sum = partial[i];
              for (i64 p = 1; p < chunks; ++p) sum += partial[p * d.K * row + i];
              switch (d.dtype) {
                case DType::f32:
                  static_cast<float*>(dw.data)[at] = sum;
                  break;
                case DType::bf16:
                  narrow(sum, static_cast<bf16*>(dw.data) + at);
                  break;
                case DType::f16:
                  narrow(sum, static_cast<f16*>(dw.data) + at);
                  break;
              }
            }
          }
        }
      }
    }
  });
}

void direct_bias_grad(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  if (!args.dbias) return;
  RowsDesc rows = {};
  const ConvTensor& dy = args.y;
  const i64 size[] = {d.N, d.out[0], d.out[1], d.out[2]}, step[] = {dy.n_step, dy.step[0], dy.step[1], dy.step[2]};
  for (int i = 0; i < 4; ++i) {
    const int last = rows.dims - 1;
    if (last >= 0 && (size[i] == 1 || rows.stride[last] == size[i] * step[i])) {  // one dimension with the one before
      if (size[i] != 1) rows.size[last] *= size[i], rows.stride[last] = step[i];
    } else {
      rows.size[rows.dims] = size[i], rows.stride[rows.dims++] = step[i];
    }
  }
  rows.cols = d.K, rows.col = dy.c_step, rows.dtype = d.dtype;
  if (args.dbias_step == 1) return gemm_sum_rows(dy.data, rows, args.dbias, p.kernel->isa, p.threads);
  const int item = kItemSize[static_cast<int>(d.dtype)];
  ArenaLease scratch(d.K * item);
  gemm_sum_rows(dy.data, rows, scratch.data(), p.kernel->isa, p.threads);
  for (i64 k = 0; k < d.K; ++k)
    std::memcpy(static_cast<char*>(args.dbias) + k * args.dbias_step * item, scratch.data() + k * item,
                static_cast<std::size_t>(item));
}

namespace {

constexpr i64 kBudget = i64{320} << 10;  // floats of scratch a thread, of all kinds
constexpr i64 kImage = i64{64} << 10;    // of them the copied image, where more than one row
constexpr i64 kLine = 2048;              // pixels of a block
constexpr i64 kChunks = 32;              // wgrad: parts to aim for

// One phase of each dimension together.
struct Phase {
  DirectAxis axis[3];
  i64 taps = 1;          // of a channel
  i64 extent[3], plane;  // of a plane, in pixels
  i64 planes;
  std::vector<i64> off;  // [inputs][taps]

  void lay_out(const DirectPlan& p, i64 inputs) {
    plane = planes = 1;
    for (int i = 0; i < 3; ++i) {
      extent[i] = std::min(p.block[i], axis[i].count) + axis[i].span;
      plane *= extent[i];
      planes *= static_cast<i64>(axis[i].base.size());
      taps *= static_cast<i64>(axis[i].tap.size());
    }
    const DirectAxis &z = axis[0], &y = axis[1], &x = axis[2];
    for (i64 c = 0; c < inputs && taps; ++c)
      for (size_t a = 0; a < z.tap.size(); ++a)
        for (size_t b = 0; b < y.tap.size(); ++b)
          for (size_t e = 0; e < x.tap.size(); ++e)
            off.push_back(
                (c * planes + (z.plane[a] * i64(y.base.size()) + y.plane[b]) * i64(x.base.size()) + x.plane[e]) *
                    plane +
                (z.shift[a] * extent[1] + y.shift[b]) * extent[2] + x.shift[e]);
  }
  i64 line(const i64* n) const { return ((n[0] - 1) * extent[1] + n[1] - 1) * extent[2] + n[2]; }  // of n pixels
};

// A block of output pixels of one phase.
struct Block {
  i64 first[3], n[3];
};
Block block_at(const DirectPlan& p, const DirectAxis* axis, i64 index, const i64* blocks) {
  Block b;
  for (int i = 2; i >= 0; index /= blocks[i--]) {
    b.first[i] = index % blocks[i] * p.block[i];
    b.n[i] = std::min(p.block[i], axis[i].count - b.first[i]);
  }
  return b;
}

// dst[c][planes][extent] = the image that a block meets, zeros outside it; a channel is two where floats are pairs.
void copy_image(const DirectOps& ops, const ConvTensor& x, const void* origin, DType dtype, const i64* in,
                const Phase& f, const Block& b, i64 channels, float* dst) {
  const i64 row = f.planes * f.plane, width = b.n[2] + f.axis[2].span;
  const auto inside = [&](int i) {
    const i64 first = b.first[i] * f.axis[i].in_step,
              last = (b.first[i] + b.n[i] + f.axis[i].span - 1) * f.axis[i].in_step;
    for (i64 base : f.axis[i].base)
      if (first + base < 0 || last + base >= in[i]) return false;
    return true;
  };
  if (!inside(0) || !inside(1) || !inside(2)) std::memset(dst, 0, static_cast<std::size_t>(channels * row) * 4);
  for (i64 base_d : f.axis[0].base) {
    for (i64 base_h : f.axis[1].base) {
      for (i64 base_w : f.axis[2].base) {
        for (i64 z = 0; z < b.n[0] + f.axis[0].span; ++z) {
          const i64 id = (b.first[0] + z) * f.axis[0].in_step + base_d;
          for (i64 y = 0; y < b.n[1] + f.axis[1].span; ++y) {
            const i64 ih = (b.first[1] + y) * f.axis[1].in_step + base_h, step = f.axis[2].in_step;
            const i64 iw = b.first[2] * step + base_w;
            float* const line = dst + (z * f.extent[1] + y) * f.extent[2];
            i64 lo = width, hi = width;  // pixels lo..hi-1 are inside
            if (id >= 0 && id < in[0] && ih >= 0 && ih < in[1]) {
              lo = std::min(width, iw < 0 ? (-iw + step - 1) / step : 0);
              hi = std::max(lo, iw < in[2] ? std::min(width, (in[2] - iw + step - 1) / step) : 0);
            }
            if (lo == hi) continue;
            const i64 at = id * x.step[0] + ih * x.step[1] + (iw + lo * step) * x.step[2];
            ops.image(direct_at(origin, at, dtype), x.c_step, step * x.step[2], channels, hi - lo, line + lo, row);
          }
        }
        dst += f.plane;
      }
    }
  }
}

// The widths of the kernel that `outputs` are cut into.
int outputs_at(i64 left, const DirectOps& ops) {
  if (left >= ops.outputs) return ops.outputs;
  return left == 1 ? 1 : left == 2 ? 2 : left < 7 && left != 3 ? 4 : left == 3 ? 4 : 8;
}
i64 padded_outputs(i64 outputs, const DirectOps& ops) {
  i64 o = 0;
  while (o < outputs) o += outputs_at(outputs - o, ops);
  return o;
}

struct Problem {
  const ConvDesc& d;
  const ConvPlan& p;
  const DirectPlan& q;
  const ConvArgs& args;
  const DirectOps& ops;
  DirectSides sides;
  std::vector<Phase> phases;

  Problem(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& a)
      : d(desc), p(plan), q(plan.direct), args(a), ops(*plan.kernel->functions->direct), sides(direct_sides(desc)) {
    std::vector<DirectAxis> axes[3];
    for (int i = 0; i < 3; ++i)
      for (i64 f = 0; f < sides.phases[i]; ++f) axes[i].push_back(direct_axis(d, i, f));
    for (const auto& z : axes[0]) {
      for (const auto& y : axes[1]) {
        for (const auto& x : axes[2]) {
          phases.emplace_back();
          Phase& f = phases.back();
          f.axis[0] = z, f.axis[1] = y, f.axis[2] = x;
          f.lay_out(q, sides.inputs / ops.unit);
        }
      }
    }
  }
};

void gather(const Problem& x) {
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const ConvArgs& args = x.args;
  const DirectSides& s = x.sides;
  const bool dgrad = d.pass == ConvPass::dgrad;
  const ConvTensor &in = dgrad ? args.y : args.x, &out = dgrad ? args.x : args.y;
  const i64 w_out = dgrad ? args.w.c_step : args.w.n_step, w_in = dgrad ? args.w.n_step : args.w.c_step;
  const i64 inputs = s.inputs / ops.unit;  // floats of a pixel and group
  const i64 w_group = (dgrad ? s.inputs : s.outputs) * args.w.n_step;
  const bool last = out.c_step == 1 || d.groups * s.outputs == 1;  // channels_last
  const bool plain = d.dtype == DType::f32 && args.activation == Activation::none && !args.residual && !args.pre;
  const GemmHelpers& helpers = *gemm_pack_kernel(x.p.kernel->isa, d.dtype).helpers;
  const i64 bundles = (d.groups + q.channels - 1) / q.channels, padded = padded_outputs(s.outputs, ops);
  const i64 w_phases = s.phases[2];
  i64 blocks[3], pairs = s.phases[0] * s.phases[1], count = 1;
  for (int i = 0; i < 3; ++i) {
    const i64 most = direct_axis(d, i, 0).count;  // the first phase is the longest
    blocks[i] = (most + q.block[i] - 1) / q.block[i];
    count *= blocks[i];
  }
  const i64 parts_of_bundle = d.N * pairs * count;
  ArenaLease scratch(x.p.workspace_bytes());

  parallel(x.p.threads, [&](int thread, int threads) {
    float* const image = reinterpret_cast<float*>(scratch.data() + thread * q.per_thread_bytes());
    float* const sums = image + q.x_floats;
    float* const turned = sums + q.y_floats;
    float* const weights = turned + q.row_floats;
    float* const bias = weights + q.w_floats - direct_round(q.channels * s.outputs + 16, 16);
    i64 packed = -1, packed_pair = -1;
    const i64 parts = bundles * parts_of_bundle;
    for (i64 part = parts * thread / threads, end = parts * (thread + 1) / threads; part < end; ++part) {
      const i64 bundle = part / parts_of_bundle, pair = part / (d.N * count) % pairs;
      const i64 n = part / count % d.N;
      const i64 g0 = bundle * q.channels, groups = std::min(q.channels, d.groups - g0);
      const Phase* const phases = &x.phases[pair * w_phases];
      Block b[1];
      if (packed != bundle || packed_pair != pair) {
        packed = bundle, packed_pair = pair;
        float* to = weights;
        for (i64 f = 0; f < w_phases; ++f) {
          const DirectAxis* const a = phases[f].axis;
          for (i64 g = 0; g < groups; ++g) {
            for (i64 o = 0; o < s.outputs;) {
              const int width = outputs_at(s.outputs - o, ops);
              const i64 real = std::min<i64>(width, s.outputs - o);
              for (i64 c = 0; c < s.inputs; c += ops.unit) {
                const i64 at = (g0 + g) * w_group + o * w_out + c * w_in;
                for (i64 tz : a[0].tap) {
                  for (i64 ty : a[1].tap) {
                    for (i64 tx : a[2].tap) {
                      const i64 tap = tz * args.w.step[0] + ty * args.w.step[1] + tx * args.w.step[2];
                      ops.image(direct_at(args.w.data, at + tap, d.dtype), w_in, w_out, 1, real, to, 0);
                      std::fill(to + real, to + width, 0.0f);
                      to += width;
                    }
                  }
                }
              }
              o += width;
            }
          }
        }
        if (args.bias) {
          ops.copy(direct_at(args.bias, g0 * s.outputs * args.bias_step, d.dtype), 0, args.bias_step, 1,
                   groups * s.outputs, bias, 0);
          std::fill(bias + groups * s.outputs, bias + groups * s.outputs + 8, 0.0f);
        }
      }
      const float* w = weights;
      const i64 sums_phase = q.y_floats / w_phases;
      bool empty = false;
      for (i64 f = 0; f < w_phases; ++f) {
        const Phase& phase = phases[f];
        b[0] = block_at(q, phase.axis, part % count, blocks);
        if (b->n[0] <= 0 || b->n[1] <= 0) empty = true;
        if (empty || b->n[2] <= 0) {
          w += groups * padded * inputs * phase.taps;
          continue;
        }
        const void* const origin = direct_at(in.data, n * in.n_step + g0 * s.inputs * in.c_step, d.dtype);
        if (phase.taps) copy_image(ops, in, origin, d.dtype, s.in, phase, *b, groups * inputs, image);
        PlaneArgs t = {};
        t.count = phase.line(b->n);
        t.y_out = direct_round(phase.line(b->n), ops.width);
        const i64 depth = inputs * phase.taps;
        for (i64 g = 0; g < groups; ++g) {
          t.x = image + g * inputs * phase.planes * phase.plane;
          for (i64 o = 0; o < s.outputs; o += t.outputs) {
            t.outputs = outputs_at(s.outputs - o, ops);
            t.y = sums + f * sums_phase + (g * s.outputs + o) * t.y_out;
            constexpr i64 kDepth = 192;  // accumulators start afresh, as those of products do
            i64 k = 0;
            do {
              t.taps = std::min(kDepth, depth - k);
              t.off = phase.off.data() + k;
              t.w = w + k * t.outputs;
              t.accumulate = k > 0;
              t.bias = args.bias && k + kDepth >= depth ? bias + g * s.outputs + o : nullptr;
              ops.plane(t);
              k += kDepth;
            } while (k < depth);
            w += depth * t.outputs;
          }
        }
      }
      if (empty) continue;

      // Out: rows of one output channel, or of all channels of a pixel.
      const i64 channels = groups * s.outputs, c0 = g0 * s.outputs;
      const auto write = [&](const float* from, i64 from_row, i64 at, i64 row, i64 m, i64 width) {
        if (plain) return ops.copy_f32(from, from_row, 1, m, width, static_cast<float*>(out.data) + at, row);
        FinishArgs e = {};
        e.sum = from, e.sum_row = from_row, e.c = direct_at(out.data, at, d.dtype), e.c_row = row;
        e.residual = args.residual ? direct_at(args.residual, at, d.dtype) : nullptr;
        e.pre = args.pre ? direct_at(args.pre, at, d.dtype) : nullptr;
        e.activation = args.activation;
        e.m = static_cast<int>(m), e.n = static_cast<int>(width);
        helpers.finish(e);
      };
      for (i64 f = 0; f < w_phases; ++f) {
        const Phase& phase = phases[f];
        const Block& c = b[0] = block_at(q, phase.axis, part % count, blocks);
        if (c.n[2] <= 0) continue;
        const DirectAxis* const a = phase.axis;
        const i64 y_out = direct_round(phase.line(c.n), ops.width);
        const float* const from = sums + f * sums_phase;
        for (i64 z = 0; z < c.n[0]; ++z) {
          const i64 at_d =
              n * out.n_step + c0 * out.c_step + ((c.first[0] + z) * a[0].out_step + a[0].out_first) * out.step[0];
          const float* const slice = from + z * phase.extent[1] * phase.extent[2];
          if (last) {
            for (i64 y = 0; y < c.n[1]; ++y) {
              const i64 at = at_d + ((c.first[1] + y) * a[1].out_step + a[1].out_first) * out.step[1] +
                             (c.first[2] * a[2].out_step + a[2].out_first) * out.step[2];
              const float* const row = slice + y * phase.extent[2];
              const i64 pixel = a[2].out_step * out.step[2];
              if (plain) {
                ops.copy_f32(row, 1, y_out, c.n[2], channels, static_cast<float*>(out.data) + at, pixel);
              } else {
                ops.copy_f32(row, 1, y_out, c.n[2], channels, turned, channels);
                write(turned, channels, at, pixel, c.n[2], channels);
              }
            }
          } else if (w_phases == 1) {
            const i64 at = at_d + (c.first[1] * a[1].out_step + a[1].out_first) * out.step[1] + c.first[2];
            for (i64 o = 0; o < channels; ++o)
              write(slice + o * y_out, phase.extent[2], at + o * out.c_step, a[1].out_step * out.step[1], c.n[1],
                    c.n[2]);
          } else if (f == 0) {  // all phases of a row are interleaved first
            for (i64 o = 0; o < channels; ++o) {
              for (i64 y = 0; y < c.n[1]; ++y) {
                i64 width = 0;
                for (i64 g = 0; g < w_phases; ++g) {
                  const Phase& other = phases[g];
                  const Block k = block_at(q, other.axis, part % count, blocks);
                  if (k.n[2] <= 0) continue;
                  const float* const row = sums + g * sums_phase + o * direct_round(other.line(k.n), ops.width) +
                                           (z * other.extent[1] + y) * other.extent[2];
                  for (i64 i = 0; i < k.n[2]; ++i) turned[i * a[2].out_step + g] = row[i];
                  width += k.n[2];
                }
                const i64 at = at_d + o * out.c_step +
                               ((c.first[1] + y) * a[1].out_step + a[1].out_first) * out.step[1] +
                               c.first[2] * a[2].out_step;
                write(turned, width, at, 0, 1, width);
              }
            }
          }
        }
      }
    }
  });
}

void gradient(const Problem& x) {
  const ConvDesc& d = x.d;
  const DirectPlan& q = x.q;
  const DirectOps& ops = x.ops;
  const DirectSides& s = x.sides;
  const ConvTensor &image_of = x.args.x, &dy = x.args.y;
  const Phase& phase = x.phases[0];
  const i64 bundles = (d.groups + q.channels - 1) / q.channels, depth = s.inputs * phase.taps;
  i64 blocks[3], count = 1;
  for (int i = 0; i < 3; ++i) {
    blocks[i] = (phase.axis[i].count + q.block[i] - 1) / q.block[i];
    count *= blocks[i];
  }
  ArenaLease scratch(x.p.workspace_bytes());
  float* const partial = reinterpret_cast<float*>(scratch.data() + x.p.threads * q.per_thread_bytes());
  const bool in_place = d.dtype == DType::f32 && (dy.step[2] == 1 || d.out[2] == 1);

  parallel(x.p.threads, [&](int thread, int threads) {
    float* const image = reinterpret_cast<float*>(scratch.data() + thread * q.per_thread_bytes());
    float* const grads = image + q.x_floats;
    const i64 parts = bundles * q.chunks, units = d.N * count;
    for (i64 part = parts * thread / threads, end = parts * (thread + 1) / threads; part < end; ++part) {
      const i64 g0 = part / q.chunks * q.channels, chunk = part % q.chunks;
      const i64 groups = std::min(q.channels, d.groups - g0), k0 = g0 * s.outputs;
      float* const dw = partial + (chunk * d.K + k0) * depth;
      std::fill(dw, dw + groups * s.outputs * depth, 0.0f);
      for (i64 unit = units * chunk / q.chunks, stop = units * (chunk + 1) / q.chunks; unit < stop; ++unit) {
        const i64 n = unit / count;
        const Block b = block_at(q, phase.axis, unit % count, blocks);
        const void* const origin =
            direct_at(image_of.data, n * image_of.n_step + g0 * s.inputs * image_of.c_step, d.dtype);
        copy_image(ops, image_of, origin, d.dtype, s.in, phase, b, groups * s.inputs, image);
        PlaneGradArgs t = {};
        t.off = phase.off.data(), t.x_depth = phase.extent[1] * phase.extent[2], t.x_row = phase.extent[2];
        t.dw_out = depth, t.taps = depth, t.depths = b.n[0], t.rows = b.n[1], t.cols = b.n[2];
        t.outputs = static_cast<int>(s.outputs);
        const i64 at = n * dy.n_step + k0 * dy.c_step + b.first[0] * dy.step[0] + b.first[1] * dy.step[1] +
                       b.first[2] * dy.step[2];
        const float* from;
        if (in_place) {
          from = static_cast<const float*>(dy.data) + at;
          t.dy_out = dy.c_step, t.dy_depth = dy.step[0], t.dy_row = dy.step[1];
        } else {
          from = grads;
          t.dy_row = b.n[2], t.dy_depth = b.n[1] * b.n[2], t.dy_out = b.n[0] * t.dy_depth;
          for (i64 z = 0; z < b.n[0]; ++z)
            for (i64 y = 0; y < b.n[1]; ++y)
              ops.copy(direct_at(dy.data, at + z * dy.step[0] + y * dy.step[1], d.dtype), dy.c_step, dy.step[2],
                       groups * s.outputs, b.n[2], grads + z * t.dy_depth + y * t.dy_row, t.dy_out);
        }
        for (i64 g = 0; g < groups; ++g) {
          t.x = image + g * s.inputs * phase.planes * phase.plane;
          t.dy = from + g * s.outputs * t.dy_out;
          t.dw = dw + g * s.outputs * depth;
          ops.plane_grad(t);
        }
      }
    }
  });
  direct_combine(d, partial, q.chunks, x.args.w, x.p.threads);
}

}  // namespace

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
      const DirectAxis a = direct_axis(d, i, f);
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
    const i64 line = direct_round(((b[0] - 1) * (b[1] + span[1]) + b[1] - 1) * (b[2] + span[2]) + b[2], ops.width);
    const i64 outputs = q.channels * s.outputs, padded = padded_outputs(s.outputs, ops);
    q.x_floats = direct_round(q.channels * s.inputs * planes[0] * planes[1] * planes[2] * extent + 16 * ops.width, 16);
    if (wgrad) {
      q.y_floats = direct_round(outputs * b[0] * b[1] * b[2], 16);
      q.row_floats = q.w_floats = 0;
    } else {
      q.y_floats = s.phases[2] * direct_round((outputs + 8) * line + 16 * ops.width, 16);
      q.row_floats = direct_round(std::max(b[2] * outputs, b[2] * s.phases[2]), 16);
      q.w_floats = q.channels * padded * s.inputs * all_taps + 2 * direct_round(outputs + 16, 16);
    }
    const i64 all = q.x_floats + q.y_floats + q.row_floats + q.w_floats;
    return all <= kBudget && (!small || (q.x_floats <= kImage && line <= kLine));
  };
  i64* const b = q.block;
  b[0] = b[1] = b[2] = 1;
  if (!fits(b, false) && (q.channels = 1, !fits(b, false))) return false;
  const auto grow = [&](int i, bool small) {  // to the most that fits, then evenly
    for (i64 most = count[i]; b[i] < most;) {
      const i64 old = b[i], half = (b[i] + most + 1) / 2;
      b[i] = half;
      if (fits(b, small)) continue;
      b[i] = old, most = half - 1;
    }
    const i64 blocks = (count[i] + b[i] - 1) / b[i];
    b[i] = (count[i] + blocks - 1) / blocks;
  };
  grow(2, true);
  if (b[2] < std::min<i64>(count[2], 64)) grow(2, false);
  grow(1, true);
  if (b[1] == count[1]) grow(0, true);
  fits(b, false);
  q.chunks = 0;
  if (wgrad) {
    const i64 bundles = (d.groups + q.channels - 1) / q.channels;
    i64 units = d.N;
    for (int i = 0; i < 3; ++i) units *= (count[i] + b[i] - 1) / b[i];
    q.chunks = std::max<i64>(1, std::min(units, (kChunks + bundles - 1) / bundles));
    q.partial_bytes = q.chunks * d.K * s.inputs * all_taps * 4;
  }
  return true;
}

void conv_run_grouped(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args) {
  const Problem problem(d, p, args);
  if (d.pass == ConvPass::wgrad) {
    gradient(problem);
    direct_bias_grad(d, p, args);
  } else {
    gather(problem);
  }
}

}  // namespace fastdl
