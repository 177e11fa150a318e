// Where a block's image lies in scratch, and how it gets there.
#include <cstring>

#include "conv/cpu/grouped_problem.h"

namespace fastdl::grouped {

Axis axis_of(const ConvDesc& d, int dim, i64 phase) {
  constexpr i64 kSpan = 64;  // taps further apart get copies of their own
  const ConvAxis a = conv_axis(d, dim, phase);
  Axis x;
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

void Phase::lay_out(const DirectPlan& p, i64 inputs) {
  plane = planes = 1;
  for (int i = 0; i < 3; ++i) {
    extent[i] = std::min(p.block[i], axis[i].count) + axis[i].span;
    plane *= extent[i];
    planes *= static_cast<i64>(axis[i].base.size());
    taps *= static_cast<i64>(axis[i].tap.size());
  }
  const Axis &z = axis[0], &y = axis[1], &x = axis[2];
  for (i64 c = 0; c < inputs && taps; ++c)
    for (size_t a = 0; a < z.tap.size(); ++a)
      for (size_t b = 0; b < y.tap.size(); ++b)
        for (size_t e = 0; e < x.tap.size(); ++e)
          off.push_back(
              (c * planes + (z.plane[a] * i64(y.base.size()) + y.plane[b]) * i64(x.base.size()) + x.plane[e]) * plane +
              (z.shift[a] * extent[1] + y.shift[b]) * extent[2] + x.shift[e]);
}

Problem::Problem(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& a)
    : DirectProblem(desc, plan, a), sides(direct_sides(desc)) {
  std::vector<Axis> axes[3];
  bundles = ceil_div(d.groups, q.channels), pixels = 1;
  for (int i = 0; i < 3; ++i) {
    for (i64 f = 0; f < sides.phases[i]; ++f) axes[i].push_back(axis_of(d, i, f));
    pixels *= blocks[i] = ceil_div(axis_of(d, i, 0).count, q.block[i]);  // the first phase is the longest
  }
  for (const auto& z : axes[0]) {
    for (const auto& y : axes[1]) {
      for (const auto& w : axes[2]) {
        phases.emplace_back();
        Phase& f = phases.back();
        f.axis[0] = z, f.axis[1] = y, f.axis[2] = w;
        f.lay_out(q, sides.inputs / ops.unit);
      }
    }
  }
}

Block Problem::block(const Phase& phase, i64 index) const {
  Block b;
  for (int i = 2; i >= 0; index /= blocks[i--]) {
    b.first[i] = index % blocks[i] * q.block[i];
    b.n[i] = std::min(q.block[i], phase.axis[i].count - b.first[i]);
  }
  return b;
}

void copy_image(const Problem& x, const ConvTensor& image, const void* origin, const Phase& f, const Block& b,
                i64 channels, float* dst) {
  const i64* const in = x.sides.in;
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
              lo = std::min(width, iw < 0 ? ceil_div(-iw, step) : 0);
              hi = std::max(lo, iw < in[2] ? std::min(width, ceil_div(in[2] - iw, step)) : 0);
            }
            if (lo == hi) continue;
            const i64 first = id * image.step[0] + ih * image.step[1] + (iw + lo * step) * image.step[2];
            x.ops.image(at(origin, first, x.d.dtype), image.c_step, step * image.step[2], channels, hi - lo, line + lo,
                        row);
          }
        }
        dst += f.plane;
      }
    }
  }
}

int outputs_at(i64 left, const DirectOps& ops) {
  if (left >= ops.outputs) return ops.outputs;
  return left == 1 ? 1 : left == 2 ? 2 : left < 7 ? 4 : 8;
}
i64 padded_outputs(i64 outputs, const DirectOps& ops) {
  i64 o = 0;
  while (o < outputs) o += outputs_at(outputs - o, ops);
  return o;
}

}  // namespace fastdl::grouped
