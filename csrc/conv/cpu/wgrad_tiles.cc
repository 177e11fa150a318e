// The weight gradient by tiles of 32 pixels: a panel of x for each 32 of (tap along the width, channel) is made when it
// is used; sums that are not finite or may have lost small values are computed again by FMA.
#include <cstring>

#include "conv/cpu/wgrad_part.h"
#include "simd/vec.h"

namespace fastdl::wgrad {
namespace {

// One row of a block in a tensor: pixels [begin, end) of it lie in memory from `first` on, the others are zeros.
struct Line {
  const char* first;
  i64 begin, end;
};

// Some channels of a block's pixels, as they lie in memory, and how they are copied: [pixel][32] or [row][pixels].
struct Pixels {
  const Line* lines;  // of the first channel
  i64 pixel_step, c_step;
  int n;
  bool by_pixel;
};
// Whichever runs along memory; a copy of few elements costs as much as one of an element.
bool by_pixel(const ConvTensor& t, i64 channels) { return t.c_step == 1 && channels > kFewChannels; }

bool follow_each_other(const Part& x, const Block& b, const Pixels& p) {
  const i64 bytes = b.width * p.pixel_step * item_size(x.d.dtype);
  for (int r = 0; r < b.count; ++r) {
    if (p.lines[r].begin != 0 || p.lines[r].end != b.width) return false;
    if (r > 0 && p.lines[r].first != p.lines[r - 1].first + bytes) return false;
  }
  return true;
}

// Copies them to rows `at` and on of a panel in stage.
void stage_pixels(const Part& x, const Block& b, const Pixels& p, int at, float* stage) {
  const i64 item = item_size(x.d.dtype);
  const i64 step = p.by_pixel ? x.kernel.mr : 1, row = p.by_pixel ? 1 : b.count * b.width;
  char* const to = reinterpret_cast<char*>(stage) + at * row * item;
  const auto bytes = [&](i64 count) { return static_cast<std::size_t>(count * item); };
  for (int r = 0; r < b.count; ++r) {
    const Line& line = p.lines[r];
    const i64 count = line.end - line.begin;
    if (p.by_pixel) {
      char* const dst = to + r * b.width * step * item;
      for (i64 i = 0; i < line.begin; ++i) std::memset(dst + i * step * item, 0, bytes(p.n));
      for (i64 i = 0; i < count; ++i)
        std::memcpy(dst + (line.begin + i) * step * item, line.first + i * p.pixel_step * item, bytes(p.n));
      for (i64 i = line.end; i < b.width; ++i) std::memset(dst + i * step * item, 0, bytes(p.n));
      continue;
    }
    for (int c = 0; c < p.n; ++c) {
      char* const dst = to + (c * row + r * b.width) * item;
      std::memset(dst, 0, bytes(line.begin));
      std::memset(dst + line.end * item, 0, bytes(b.width - line.end));
      if (count == 0) continue;  // A line outside the image has no address.
      const char* const src = line.first + c * p.c_step * item;
      if (p.pixel_step == 1) {
        std::memcpy(dst + line.begin * item, src, bytes(count));
      } else if (item == 4) {
        for (i64 i = 0; i < count; ++i) std::memcpy(dst + (line.begin + i) * 4, src + i * p.pixel_step * 4, 4);
      } else {
        for (i64 i = 0; i < count; ++i) std::memcpy(dst + (line.begin + i) * 2, src + i * p.pixel_step * 2, 2);
      }
    }
  }
}

// n staged rows as tiles.
void pack_staged(const Part& x, const Block& b, bool pixels_first, int n, PackFunction* pack, int panel,
                 const float* stage, float* out, float* peak) {
  const i64 pixels = b.count * b.width, row = pixels_first ? x.kernel.mr : pixels;
  pack(stage, pixels_first ? row : 1, pixels_first ? 1 : row, pixels, n, panel, out, peak);
}

// What output row r, `width` wide from w on, meets of x with a tap, channels from c on.
Line line_of_x(const Part& x, const Row& r, i64 w, i64 width, const i64* tap, i64 c) {
  const ConvDesc& d = x.d;
  const ConvTensor& t = x.args.x;
  const i64 z = r.z * d.stride[0] - d.pad[0] + (x.tap[0] + tap[0]) * d.dilation[0];
  const i64 h = r.h * d.stride[1] - d.pad[1] + (x.tap[1] + tap[1]) * d.dilation[1];
  if (z < 0 || z >= d.in[0] || h < 0 || h >= d.in[1]) return {nullptr, 0, 0};
  const i64 start = w * d.stride[2] - d.pad[2] + (x.tap[2] + tap[2]) * d.dilation[2];
  const Range in = inside(start, d.stride[2], width, d.in[2]);
  if (in.size() == 0) return {nullptr, 0, 0};
  const i64 offset = r.n * t.n_step + (x.group * (d.C / d.groups) + x.c.begin + c) * t.c_step + z * t.step[0] +
                     h * t.step[1] + (start + in.begin * d.stride[2]) * t.step[2];
  return {static_cast<const char*>(at(t.data, offset, d.dtype)), in.begin, in.end};
}

const char* row_of_y(const Part& x, const Row& r, i64 w, i64 k) {
  const ConvTensor& t = x.args.y;
  const i64 channel = x.group * (x.d.K / x.d.groups) + x.k.begin + k;
  return static_cast<const char*>(
      at(t.data, r.n * t.n_step + channel * t.c_step + r.z * t.step[0] + r.h * t.step[1] + w * t.step[2], x.d.dtype));
}

// By FMA: sums of m rows from `row` on, channels from c on of one tap, or of ones where it is null.
void compute_again(const Part& x, const Scratch& s, const SuspectArgs& suspect, const unsigned* columns, i64 j,
                   const i64* tap, i64 c, float* sums) {
  const ConvDesc& d = x.d;
  const GemmKernel& exact = exact_kernel(d.dtype);
  const int nr = x.kernel.nr;
  float* const out = s.again;
  float* const a = out + i64{x.kernel.mr} * nr;
  float* const b = a + exact.kc * exact.mr;
  std::fill_n(out, i64{x.kernel.mr} * nr, 0.0f);
  const i64 item = item_size(d.dtype), pixel_step = d.stride[2] * x.args.x.step[2];
  const auto element = [&](const Line& line, i64 channel, i64 pixel) {
    if (!tap) return 1.0f;
    if (pixel < line.begin || pixel >= line.end) return 0.0f;
    const char* const p = line.first + ((pixel - line.begin) * pixel_step + channel * x.args.x.c_step) * item;
    return d.dtype == DType::f32 ? widen(*reinterpret_cast<const float*>(p)) : widen(*reinterpret_cast<const f16*>(p));
  };
  for (i64 i = 0; i < d.N * d.out[0] * d.out[1]; ++i) {
    const Row r = {i / d.out[1] / d.out[0], i / d.out[1] % d.out[0], i % d.out[1]};
    for (i64 w = 0; w < d.out[2]; w += exact.kc) {
      const i64 depth = std::min(exact.kc, d.out[2] - w);
      const Line line = tap ? line_of_x(x, r, w, depth, tap, c) : Line{};
      exact.helpers->pack_b(row_of_y(x, r, w, j), x.args.y.step[2], x.args.y.c_step, depth, suspect.n, nr, b, nullptr);
      for (int m = 0; m < suspect.m; m += exact.mr) {
        TileArgs t = {};
        t.m = std::min(exact.mr, suspect.m - m), t.n = suspect.n, t.k = depth;
        for (int l = 0; l < t.m; ++l)
          for (i64 p = 0; p < depth; ++p) a[l * depth + p] = element(line, m + l, p);
        t.a = a, t.a_row = depth, t.a_col = 1, t.b = b, t.b_row = nr, t.b_col = 1;
        t.c = out + i64{m} * nr, t.c_row = nr, t.accumulate = true;
        exact.tile(t);
      }
    }
  }
  i64 count = 0;
  for (int m = 0; m < suspect.m; ++m)
    for (int n = 0; n < suspect.n; ++n)
      if (columns[m] >> n & 1) sums[m * nr + n] = out[m * nr + n], ++count;
  gemm_add_repaired(count);
}

}  // namespace

void run_tiles(const Part& x, const Block& b, const Scratch& s, bool accumulate) {
  const i64 nr = x.kernel.nr, mr = x.kernel.mr, pixels = b.count * b.width, steps = conv_units(x.kernel, pixels);
  float* const column_peaks = x.column_peaks(s.sums);
  float* const row_peaks = x.row_peaks(s.sums);
  if (!accumulate && column_peaks) std::fill_n(column_peaks, x.peak_floats(), 0.0f);
  const GemmHelpers& helpers = *x.packer.helpers;
  Line lines[kRuns];
  for (i64 j = 0; j < x.k.size(); j += nr) {
    const ConvTensor& y = x.args.y;
    for (int r = 0; r < b.count; ++r) lines[r] = {row_of_y(x, b.rows[r], b.w, j), 0, b.width};
    const Pixels p = {lines, y.step[2], y.c_step, static_cast<int>(std::min(nr, x.k.size() - j)),
                      by_pixel(y, x.k.size())};
    float* const out = s.y + j * steps;
    float* const peak = column_peaks ? column_peaks + j : nullptr;
    if (follow_each_other(x, b, p)) {
      helpers.pack_b(lines[0].first, p.pixel_step, p.c_step, pixels, p.n, x.kernel.nr, out, peak);
    } else {
      stage_pixels(x, b, p, 0, s.stage);
      pack_staged(x, b, p.by_pixel, p.n, helpers.pack_b, x.kernel.nr, s.stage, out, peak);
    }
  }
  TileArgs t = {};
  t.a_row = 1, t.b_row = nr, t.b_col = 1, t.c_row = nr, t.k = steps, t.accumulate = accumulate;
  const auto products = [&](const float* a, i64 row, int m) {
    t.a = a, t.a_col = round_up(m, 16), t.m = m;
    for (i64 j = 0; j < x.k.size(); j += nr) {
      t.b = s.y + j * steps, t.c = s.sums + j * x.panel_rows() + row * nr;
      t.n = static_cast<int>(std::min(nr, x.k.size() - j));
      x.packer.tile(t);
    }
  };
  // Rows are taps along the width times channels, 32 at a time: of few channels several taps.
  const ConvTensor& in = x.args.x;
  const i64 C = x.c.size(), lines_of_tap = x.taps[2] * C;
  for (i64 tap = 0; tap < x.taps[0] * x.taps[1]; ++tap) {
    for (i64 first = 0; first < lines_of_tap; first += mr) {
      const int m = static_cast<int>(std::min(mr, lines_of_tap - first)), panel = static_cast<int>(round_up(m, 16));
      const i64 row = tap * lines_of_tap + first;
      float* const peak = row_peaks ? row_peaks + row : nullptr;
      bool packed = false;
      for (int i = 0; i < m;) {
        const i64 taps[3] = {tap / x.taps[1], tap % x.taps[1], (first + i) / C}, c = (first + i) % C;
        for (int r = 0; r < b.count; ++r) lines[r] = line_of_x(x, b.rows[r], b.w, b.width, taps, c);
        const Pixels p = {lines, x.d.stride[2] * in.step[2], in.c_step, static_cast<int>(std::min<i64>(m - i, C - c)),
                          by_pixel(in, C)};
        packed = p.n == m && follow_each_other(x, b, p);
        if (packed) {
          helpers.pack_a(lines[0].first, p.pixel_step, p.c_step, pixels, m, panel, s.band, peak);
        } else {
          stage_pixels(x, b, p, i, s.stage);
        }
        i += p.n;
      }
      if (!packed) pack_staged(x, b, by_pixel(in, C), m, helpers.pack_a, panel, s.stage, s.band, peak);
      products(s.band, row, m);
    }
  }
  if (!x.with_bias()) return;
  float* const ones = s.band + steps * mr;
  const float one = 1;
  const bf16 narrow_one = {0x3f80};
  const f16 half_one = {0x3c00};
  const void* const kOnes[] = {&one, &narrow_one, &half_one};
  helpers.pack_a(kOnes[static_cast<int>(x.d.dtype)], 0, 0, pixels, 1, 16, ones, nullptr);
  if (row_peaks) row_peaks[x.panel_rows() - 1] = 1;
  products(ones, x.panel_rows() - 1, 1);
}

void repair(const Part& x, const Scratch& s) {
  if (x.p.flat || !x.packer.helpers->suspects) return;  // flat: see trusted
  const i64 nr = x.kernel.nr, mr = x.kernel.mr, C = x.c.size(), last = x.panel_rows() - 1;
  unsigned columns[32];
  for (i64 j = 0; j < x.k.size(); j += nr) {
    SuspectArgs a = {};
    a.sum_row = nr, a.n = static_cast<int>(std::min(nr, x.k.size() - j));
    const auto check = [&](i64 row, i64 m, const i64* tap, i64 c) {
      float* const sums = s.sums + j * x.panel_rows() + row * nr;
      a.sum = sums, a.m = static_cast<int>(m);
      if (conv_has_peaks(x.kernel)) a.a_peak = x.row_peaks(s.sums) + row, a.b_peak = x.column_peaks(s.sums) + j;
      if (x.packer.helpers->suspects(a, columns)) compute_again(x, s, a, columns, j, tap, c, sums);
    };
    for (i64 tap = 0; tap < x.all_taps(); ++tap) {
      const i64 taps[3] = {tap / x.taps[2] / x.taps[1], tap / x.taps[2] % x.taps[1], tap % x.taps[2]};
      for (i64 c = 0; c < C; c += mr) check(tap * C + c, std::min(mr, C - c), taps, c);
    }
    if (x.with_bias()) check(last, 1, nullptr, 0);
  }
}

}  // namespace fastdl::wgrad
