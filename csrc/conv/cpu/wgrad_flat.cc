// The weight gradient by tiles where every pixel of x meets several taps. dy is turned once, x is paired once, and a
// tap is an offset into the pairs: rows of tiles, which may begin anywhere.
#include <cstring>

#include "conv/cpu/wgrad_part.h"
#include "simd/vec.h"

namespace fastdl::wgrad {
namespace {

constexpr i64 kItem = 2;    // bytes of an element
constexpr i64 kDepth = 32;  // pixels of a step
constexpr i64 kTile = kTileRows * kTileRows;

// dy as [k][pixel], zero behind the last.
void turn_y(const Part& x, const Block& b, const Flat& f, i64 planes, float* x_stage, float* out) {
  const ConvTensor& t = x.args.y;
  const i64 rows = b.count / planes, end = round_up(f.pixels, kDepth);
  char* const to = reinterpret_cast<char*>(out);
  ConvBandArgs a = {};
  a.pixel_step = t.c_step, a.c_step = t.step[2], a.pixels = x.k.size(), a.channels = b.width, a.row = f.y_row / 4;
  const bool staged = t.c_step == 1;
  const i64 K = x.k.size(), item = kItem;
  char* const stage = reinterpret_cast<char*>(x_stage);
  for (int i = 0; i < b.count; ++i) {
    const Row& r = b.rows[i];
    const i64 pixel = (i / rows * f.h.each + i % rows) * f.w.each;
    const i64 from = r.n * t.n_step + (x.group * (x.d.K / x.d.groups) + x.k.begin) * t.c_step + r.z * t.step[0] +
                     r.h * t.step[1] + b.w * t.step[2];
    if (staged) {
      const char* src = static_cast<const char*>(at(t.data, from, x.d.dtype));
      char* dst = stage + pixel * K * item;
      if (t.step[2] == K) {
        std::memcpy(dst, src, static_cast<std::size_t>(b.width * K * item));
      } else {
        for (i64 w = 0; w < b.width; ++w) std::memcpy(dst + w * K * item, src + w * t.step[2] * item, static_cast<std::size_t>(K * item));
      }
      continue;
    }
    a.src = at(t.data, from, x.d.dtype), a.dst = reinterpret_cast<float*>(to + pixel * kItem);
    x.kernel.functions->band(a);
  }
  if (staged) {
    a.src = stage, a.c_step = K, a.channels = f.pixels, a.dst = reinterpret_cast<float*>(to);
    x.kernel.functions->band(a);
  }
  for (i64 k = 0; k < x.k.size(); ++k)
    std::memset(to + k * f.y_row + f.pixels * kItem, 0, static_cast<std::size_t>((end - f.pixels) * kItem));
}

// x as taps of one depth meet it, [sub-image][two copies][pair][channel]: pairs that begin with even pixels, with odd
// ones.
void pair_x(const Part& x, const Block& b, const Flat& f, i64 planes, i64 t0, float* out) {
  const ConvDesc& d = x.d;
  const ConvTensor& t = x.args.x;
  const GemmKernel& pairs = gemm_pack_kernel(Isa::kAvx512Bf16, d.dtype, Precision::fma);
  for (i64 sub = 0; sub < f.h.step * f.w.step; ++sub, out += 2 * f.x_floats) {
    const i64 h0 = sub / f.w.step, w0 = sub % f.w.step;
    const i64 begin = std::max<i64>(0, ceil_div(f.w.begin - w0, f.w.step));
    const i64 end = std::max(begin, ceil_div(f.w.end - w0, f.w.step));
    // The copy whose pairs the first pixel inside begins; the other one follows from it.
    const i64 odd = begin % 2;
    float* const copy = out + odd * f.x_floats;
    for (i64 s = 0; s < planes; ++s) {
      const Row& first = b.rows[s * (b.count / planes)];
      const i64 z = first.z * d.stride[0] - d.pad[0] + (x.tap[0] + t0) * d.dilation[0];
      for (i64 i = h0; i < f.h.positions; i += f.h.step) {
        const i64 pixel = (s * f.h.each + i / f.h.step) * f.w.each;
        float* const to = copy + pixel / 2 * f.x_row;
        const bool inside = z >= 0 && z < d.in[0] && i >= f.h.begin && i < f.h.end && begin < end;
        // Where a row has one block, what is not inside stays zero from the first block on. A pair of the last pixel of
        // a row and the first of the next belongs to the former.
        if (!inside || x.p.segments > 1) std::fill_n(to + odd * f.x_row, f.w.each / 2 * f.x_row, 0.0f);
        if (!inside) continue;
        const i64 from = first.n * t.n_step + (x.group * (d.C / d.groups) + x.c.begin) * t.c_step + z * t.step[0] +
                         (f.h.first + i) * t.step[1] + (f.w.first + w0 + begin * f.w.step) * t.step[2];
        pairs.helpers->pack_b(at(t.data, from, d.dtype), f.w.step * t.step[2], t.c_step, end - begin,
                              static_cast<int>(x.c.size()), static_cast<int>(f.x_row), to + (begin + odd) / 2 * f.x_row,
                              nullptr);
      }
    }
    float* const other = odd ? out - f.x_row : out + f.x_floats;
    x.kernel.functions->next_pairs(copy, f.x_row, f.x_floats, other);
  }
}

}  // namespace

void flat_sizes(i64 rows, i64 width, i64 planes, i64 C, Flat* f) {
  f->pixels = ((planes - 1) * f->h.each + rows - 1) * f->w.each + width;
  // Whole tiles are written and read. An odd number of lines: the rows of a tile do not fall on one set of L1.
  const i64 lines = ceil_div(f->pixels, kDepth) + 1;
  f->y_row = (lines + 1 - lines % 2) * kDepth * kItem;
  f->x_row = round_up(C, kTileRows) + 16;
  f->x_floats = (ceil_div(dense::sub_pixels(f->h, f->w, planes), 2) + kDepth / 2 + 2) * f->x_row;
}

Flat flat_of(const ConvDesc& d, const i64* tap, const i64* taps, i64 h, i64 rows, i64 w, i64 width, i64 planes, i64 C) {
  // Pixels fall on steps alike in all boxes: the sums of a step are one rounding.
  const auto line = [&](int i, i64 from, i64 n) {
    ConvAxis a = conv_axis(d, i, 0);
    const i64 each = dense::line_of(a, from, n, true, 0, d.in[i]).each;
    a.first += tap[i] * d.dilation[i], a.taps = taps[i];
    dense::Line l = dense::line_of(a, from, n, true, 0, d.in[i]);
    l.each = each;
    return l;
  };
  Flat f = {};
  f.h = line(1, h, rows), f.w = line(2, w, width);
  f.w.each = round_up(f.w.each, 2);  // rows begin with a pair
  flat_sizes(rows, width, planes, C, &f);
  return f;
}

void run_flat(const Part& x, const Block& b, const Scratch& s, bool accumulate) {
  const i64 rows = std::min<i64>(b.count, x.d.out[1]), planes = b.count / rows;
  const Flat f = flat_of(x.d, x.tap, x.taps, b.rows[0].h, rows, b.w, b.width, planes, x.c.size());
  if (!accumulate) {
    std::memset(s.stage, 0, static_cast<std::size_t>(f.pixels * x.k.size() * kItem));
    std::fill_n(s.band, 2 * f.h.step * f.w.step * f.x_floats, 0.0f);
    std::memset(s.y, 0, static_cast<std::size_t>(round_up(x.k.size(), kTileRows) * f.y_row));
  }
  turn_y(x, b, f, planes, s.stage, s.y);
  const i64 taps = x.taps[1] * x.taps[2];
  ConvFlatArgs t = {};
  t.a_row = f.y_row, t.steps = ceil_div(f.pixels, kDepth);
  const auto take = [&](i64 j) {
    t.a = reinterpret_cast<const char*>(s.y) + j * f.y_row;
    t.m = kTileRows;
  };
  t.b_row = f.x_row, t.accumulate = accumulate;
  for (i64 t0 = 0; t0 < x.taps[0]; ++t0) {
    pair_x(x, b, f, planes, t0, s.band);
    for (i64 j = 0; j < x.k.size(); j += kTileRows) {
      take(j);
      for (i64 i = 0; i < taps; ++i) {
        const i64 h = i / x.taps[2] * x.d.dilation[1], w = i % x.taps[2] * x.d.dilation[2];
        const i64 sub = h % f.h.step * f.w.step + w % f.w.step, pixel = h / f.h.step * f.w.each + w / f.w.step;
        const float* const pairs = s.band + (2 * sub + pixel % 2) * f.x_floats + (pixel + 1) / 2 * f.x_row;
        for (i64 c = 0; c < x.c.size(); c += kTileRows) {
          t.b = pairs + c, t.c = s.sums + x.flat_at(t0 * taps + i, j, c);
          x.kernel.functions->flat(t);
        }
      }
    }
  }
  if (!x.with_bias()) return;
  // One column times dy, as far as the others are concerned.
  float* const bias = s.sums + x.flat_bias();
  alignas(64) float ones[kTileRows], sums[kTile];
  std::fill_n(ones, kTileRows, float_of(0x3f803f80u));
  t.b = ones, t.b_row = 0, t.c = sums, t.accumulate = false;
  for (i64 j = 0; j < x.k.size(); j += kTileRows) {
    take(j);
    x.kernel.functions->flat(t);
    for (i64 k = 0; k < t.m; ++k) bias[j + k] = sums[k * kTileRows] + (accumulate ? bias[j + k] : 0);
  }
}

bool finite(const Part& x, const float* sums) {
  const i64 floats = round_up(x.k.size(), kTileRows) * (x.panel_rows() - 1);
  unsigned some = 0;
  for (i64 i = 0; i < floats; ++i) {
    unsigned bits;
    std::memcpy(&bits, sums + i, sizeof(bits));
    some |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return some == 0;
}

}  // namespace fastdl::wgrad
