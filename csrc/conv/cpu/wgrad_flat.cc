// The weight gradient by tiles where every pixel of x meets several taps. dy is turned once, x is paired once, and a
// tap is an offset into the pairs: rows of tiles, which may begin anywhere.
#include <cstring>

#include "conv/cpu/wgrad_part.h"
#include "gemm/cpu/part.h"
#include "simd/vec.h"

namespace fastdl::wgrad {
namespace {

constexpr i64 kDepth = 32;  // pixels of a step
constexpr i64 kTile = kTileRows * kTileRows;

// out = n runs of `size` bytes, step bytes apart, out_step apart.
void copy_runs(const char* src, i64 step, i64 size, i64 n, char* out, i64 out_step) {
  if (step == size && out_step == size) size *= n, n = 1;
  for (i64 i = 0; i < n; ++i) std::memcpy(out + i * out_step, src + i * step, static_cast<std::size_t>(size));
}

// dy as [k][pixel], zero behind the last, by way of stage: dy as it lies, with the gaps. What is turned or split are
// whole tiles then, written where lines begin. (Row by row: 30% more for all of 7x7, 12% for 56x56.)
void turn_y(const Part& x, const Block& b, const Flat& f, i64 planes, char* stage, char* out, float* peaks) {
  const ConvTensor& t = x.args.y;
  const i64 rows = b.count / planes, K = x.k.size(), item = item_size(x.d.dtype);
  const bool across = t.c_step == 1;  // stage: [pixel][k], else [k][pixel]
  const i64 pixel_step = across ? K : 1, k_step = across ? 1 : x.p.y_row / (2 * x.kernel.planes);
  for (int i = 0; i < b.count; ++i) {
    const Row& r = b.rows[i];
    const i64 pixel = (i / rows * f.h.each + i % rows) * f.w.each;
    const i64 from = r.n * t.n_step + (x.group * (x.d.K / x.d.groups) + x.k.begin) * t.c_step + r.z * t.step[0] +
                     r.h * t.step[1] + b.w * t.step[2];
    const char* const src = static_cast<const char*>(at(t.data, from, x.d.dtype));
    char* const to = stage + pixel * pixel_step * item;
    if (across) {
      copy_runs(src, t.step[2] * item, K * item, b.width, to, K * item);
    } else if (t.step[2] == 1) {
      copy_runs(src, t.c_step * item, b.width * item, K, to, k_step * item);
    } else {
      for (i64 k = 0; k < K; ++k)
        copy_runs(src + k * t.c_step * item, t.step[2] * item, item, b.width, to + k * k_step * item, item);
    }
    if (x.kernel.functions->raise) x.kernel.functions->raise({src, t.step[2], t.c_step, b.width, K, peaks, 0, 0});
  }
  ConvBandArgs a = {};
  a.src = stage, a.pixel_step = k_step, a.c_step = pixel_step, a.pixels = K, a.channels = f.pixels;
  a.dst = reinterpret_cast<float*>(out), a.row = x.p.y_row / 4;
  x.kernel.functions->band(a);
}

float* flat_peaks_of(const Part& x, const Scratch& s, i64 sub_images) {
  return s.band + 2 * x.kernel.planes * sub_images * x.p.x_floats;
}

// Taps of a dimension, those of other boxes too, that read a sub-image: their offsets in it, from `least` to `most`.
struct Offsets {
  i64 least, most;
  bool none() const { return least > most; }
};
Offsets offsets_of(const Part& x, int dim, i64 step, i64 sub) {
  Offsets o = {1, 0};
  for (i64 t = 0; t < x.d.kernel[dim]; ++t) {
    const i64 at = (t - x.tap[dim]) * x.d.dilation[dim] - sub;
    if (at % step != 0) continue;
    o = {o.none() ? at / step : o.least, at / step};
  }
  return o;
}

// The rows of image `n, z` that the chunk of this part has, whole ones.
Range rows_of_chunk(const Part& x, const Row& r) {
  const i64 H = x.d.out[1], image = (r.n * x.d.out[0] + r.z) * H;
  const i64 part = x.blocks.begin % x.p.segments > 0, rest = x.blocks.end % x.p.segments > 0;
  const i64 begin = first_row(x, x.blocks.begin) + part, end = first_row(x, x.blocks.end - 1) + (rest ? 0 : x.p.rows);
  return {std::clamp<i64>(begin - image, 0, H), std::clamp<i64>(end - image, 0, H)};
}

// x as taps of one depth meet it, [sub-image][two copies][part][pair][channel]: pairs that begin with even pixels, with
// odd ones. peaks: [sub-image][2][channel], the largest magnitude of what all taps meet, and of what some do.
void pair_x(const Part& x, const Block& b, const Flat& f, i64 planes, i64 t0, float* out, float* peaks) {
  const ConvDesc& d = x.d;
  const ConvTensor& t = x.args.x;
  const ConvFunctions& functions = *x.kernel.functions;
  const i64 x_row = flat_x_row(x.c.size()), parts = x.kernel.planes;
  ConvPairsArgs a = {};
  a.pixel_step = f.w.step * t.step[2], a.c_step = t.c_step, a.channels = x.c.size();
  a.row = x_row, a.part = x.p.x_floats;
  for (i64 sub = 0; sub < f.h.step * f.w.step; ++sub, out += 2 * parts * x.p.x_floats) {
    const i64 h0 = sub / f.w.step, w0 = sub % f.w.step;
    const Offsets h_taps = offsets_of(x, 1, f.h.step, h0), w_taps = offsets_of(x, 2, f.w.step, w0);
    if (h_taps.none() || w_taps.none()) continue;
    const i64 begin = f.w.begin_of(w0), end = f.w.end_of(w0);
    // The copy whose pairs the first pixel inside begins; the other one follows from it.
    const i64 odd = begin % 2;
    float* const copy = out + odd * parts * x.p.x_floats;
    float* const met = peaks + 2 * sub * x.p.c_block;
    for (i64 s = 0; s < planes; ++s) {
      const Row& first = b.rows[s * (b.count / planes)];
      const Range chunk = rows_of_chunk(x, first);
      const i64 z = first.z * d.stride[0] - d.pad[0] + (x.tap[0] + t0) * d.dilation[0];
      for (i64 i = h0; i < f.h.positions; i += f.h.step) {
        const i64 line = i / f.h.step, pixel = (s * f.h.each + line) * f.w.each;
        const bool inside = z >= 0 && z < d.in[0] && i >= f.h.begin && i < f.h.end && begin < end;
        float* const to = copy + (pixel / 2 + odd) * x_row;
        // Where a row has one block, what is not inside stays zero from the first block on. A pair of the last pixel of
        // a row and the first of the next belongs to the former.
        for (i64 p = 0; p < parts && (!inside || x.p.segments > 1); ++p)
          std::fill_n(to + p * x.p.x_floats, f.w.each / 2 * x_row, 0.0f);
        if (!inside) continue;
        const i64 from = first.n * t.n_step + (x.group * (d.C / d.groups) + x.c.begin) * t.c_step + z * t.step[0] +
                         (f.h.first + i) * t.step[1] + (f.w.first + w0) * t.step[2];
        const auto pixels = [&](i64 from_pixel, i64 to_pixel, float* dst) {
          a.src = at(t.data, from + from_pixel * a.pixel_step, d.dtype);
          a.pixels = to_pixel - from_pixel, a.dst = dst;
        };
        pixels(begin, end, copy + (pixel + begin + odd) / 2 * x_row);
        functions.pairs(a);
        if (!functions.raise) continue;
        pixels(begin, end, met + x.p.c_block);
        functions.raise(a);
        const i64 h = first.h + line;
        if (h - h_taps.most < chunk.begin || h - h_taps.least >= chunk.end) continue;
        const i64 low = std::max(begin, w_taps.most - b.w), high = std::min(end, d.out[2] + w_taps.least - b.w);
        pixels(low, std::max(low, high), met);
        functions.raise(a);
      }
    }
    float* const other = odd ? out - x_row : out + parts * x.p.x_floats;
    for (i64 p = 0; p < parts; ++p)
      functions.next_pairs(copy + p * x.p.x_floats, x_row, x.p.x_floats, other + p * x.p.x_floats);
  }
}

}  // namespace

i64 flat_y_row(const ConvKernel& kernel, i64 pixels) {
  // Whole tiles are written and read. An odd number of lines: the rows of a tile do not fall on one set of L1.
  const i64 lines = (ceil_div(pixels, kDepth) + 1) * kernel.planes;
  return (lines + 1 - lines % 2) * 64;
}
i64 flat_peaks(i64 sub_images, i64 columns, i64 channels) { return columns + 2 * sub_images * channels; }
i64 flat_x_row(i64 channels) { return round_up(channels, kTileRows) + 16; }
i64 flat_x_floats(i64 pixels, i64 channels) { return (ceil_div(pixels, 2) + kDepth / 2 + 2) * flat_x_row(channels); }

Flat flat_of(const ConvDesc& d, const i64* tap, const i64* taps, i64 h, i64 rows, i64 w, i64 width, i64 planes) {
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
  f.pixels = ((planes - 1) * f.h.each + rows - 1) * f.w.each + width;
  return f;
}

void run_flat(const Part& x, const Block& b, const Scratch& s, bool accumulate) {
  const i64 rows = std::min<i64>(b.count, x.d.out[1]), planes = b.count / rows, parts = x.kernel.planes;
  const Flat f = flat_of(x.d, x.tap, x.taps, b.rows[0].h, rows, b.w, b.width, planes);
  const i64 K = round_up(x.k.size(), kTileRows), subs = f.h.step * f.w.step;
  float* const peaks = flat_peaks_of(x, s, subs);
  if (!accumulate) {
    std::fill_n(s.stage, K * x.p.y_row / 2 / parts * item_size(x.d.dtype) / 4, 0.0f);
    std::fill_n(s.y, K * x.p.y_row / 4, 0.0f);
    std::fill_n(s.band, 2 * parts * subs * x.p.x_floats, 0.0f);
    std::fill_n(peaks, flat_peaks(subs, x.p.k_block, x.p.c_block), 0.0f);
  }
  char* const y = reinterpret_cast<char*>(s.y);
  turn_y(x, b, f, planes, reinterpret_cast<char*>(s.stage), y, peaks);
  const i64 taps = x.taps[1] * x.taps[2];
  ConvFlatArgs t = {};
  t.a_row = x.p.y_row, t.steps = ceil_div(f.pixels, kDepth);
  t.b_row = flat_x_row(x.c.size()), t.b_part = x.p.x_floats, t.accumulate = accumulate;
  for (i64 t0 = 0; t0 < x.taps[0]; ++t0) {
    pair_x(x, b, f, planes, t0, s.band, peaks + x.p.k_block);
    for (i64 j = 0; j < x.k.size(); j += kTileRows) {
      t.a = y + j * x.p.y_row;
      for (i64 i = 0; i < taps; ++i) {
        const i64 h = i / x.taps[2] * x.d.dilation[1], w = i % x.taps[2] * x.d.dilation[2];
        const i64 sub = h % f.h.step * f.w.step + w % f.w.step, pixel = h / f.h.step * f.w.each + w / f.w.step;
        const float* const pairs = s.band + (2 * sub + pixel % 2) * parts * x.p.x_floats + (pixel + 1) / 2 * t.b_row;
        for (i64 c = 0; c < x.c.size(); c += kTileRows) {
          t.b = pairs + c, t.c = s.sums + x.flat_at(t0 * taps + i, j, c);
          x.kernel.functions->flat(t);
        }
      }
    }
  }
  if (!x.with_bias()) return;
  // One column times dy, as far as the others are concerned. The first part of one is all of it.
  float* const bias = s.sums + x.flat_bias();
  alignas(64) float ones[3 * kTileRows] = {}, sums[kTile];
  std::fill_n(ones, kTileRows, float_of(0x3f803f80u));
  t.b = ones, t.b_row = 0, t.b_part = kTileRows, t.c = sums, t.accumulate = false;
  for (i64 j = 0; j < x.k.size(); j += kTileRows) {
    t.a = y + j * x.p.y_row;
    x.kernel.functions->flat(t);
    for (i64 k = 0; k < kTileRows; ++k) bias[j + k] = sums[k * kTileRows] + (accumulate ? bias[j + k] : 0);
  }
}

bool trusted(const Part& x, const Scratch& s) {
  const i64 floats = round_up(x.k.size(), kTileRows) * (x.panel_rows() - 1);
  unsigned some = 0;
  for (i64 i = 0; i < floats; ++i) {
    unsigned bits;
    std::memcpy(&bits, s.sums + i, sizeof(bits));
    some |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  if (some || !x.kernel.functions->raise) return some == 0;
  const Flat f = flat_of(x.d, x.tap, x.taps, 0, 1, 0, 1, 1);
  const i64 subs = f.h.step * f.w.step;
  const float* const y = flat_peaks_of(x, s, subs);
  float x_least = 1;
  for (const float* met = y + x.p.k_block; subs > 0 && met < y + flat_peaks(subs, x.p.k_block, x.p.c_block);
       met += 2 * x.p.c_block)
    for (i64 c = 0; c < x.c.size(); ++c) x_least = met[x.p.c_block + c] > 0 ? std::min(x_least, met[c]) : x_least;
  return !tiles_lose(least_peak(y, x.k.size()), x_least);
}

}  // namespace fastdl::wgrad
