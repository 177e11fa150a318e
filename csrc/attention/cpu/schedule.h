// What the schedules share: addresses, the keys that rows see, the softmax of a piece of the score matrix.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "attention/schedule.h"

namespace fastdl {

// Floats of the running values of a strip: whole vectors at any level.
inline i64 row_slots(const AttentionKernel& k) { return round_up(k.mr, 16); }

// Tiles read and write whole rows of 16, packed in the order of their use (gemm/cpu/kernel_split.h).
inline i64 lines(const AttentionKernel& k, i64 rows) { return is_tiled(k) ? round_up(rows, 16) : rows; }
// Floats of a packed line, a row or column of an operand, of so many elements.
inline i64 steps(const AttentionKernel& k, i64 depth) { return round_up(depth, k.k_step) / k.k_unit * k.planes; }

// Strips whose scores are at hand at a time: tiles compute the next ones early, and where P takes their place, multiply
// it by V late.
inline int score_buffers(const AttentionKernel& k) { return !is_tiled(k) ? 1 : k.planes == 1 ? 3 : 2; }
constexpr i64 kStripLimit = 8;  // of a query block, forward

// What bf16 parts get wrong: Inf, NaN and sums that may overflow on the way, from operands of kLargePeak on; values
// whose lower parts are flushed, below kTinyPeak. Such operands, by the largest magnitudes of their lines, are
// multiplied by FMA.
constexpr float kLargePeak = 0x1p30f;
inline bool is_large(const float* peak, i64 n) {
  return !std::all_of(peak, peak + n, [](float x) { return x < kLargePeak; });
}
inline bool is_tiny(const float* peak, i64 n) {
  return std::any_of(peak, peak + n, [](float x) { return x > 0 && x < kTinyPeak; });
}

// From the unit that running maxima are in to that of the scores.
inline float max_unit(const AttentionDesc& d) { return plain(d) ? d.scale : 1.0f; }
// lse from the running maximum and sum of a row. The two are added without a loss: rounding is known exactly from what
// the smaller part still adds (Knuth's sum of two).
inline void store_lse(const AttentionDesc& d, float max, float sum, float* lse) {
  lse[1] = 0;
  if (sum == 0) {
    lse[0] = -INFINITY;
    return;
  }
  const double a = static_cast<double>(max) * max_unit(d), b = std::log(static_cast<double>(sum));
  const double whole = a + b, part = whole - a, lost = (a - (whole - part)) + (b - part);
  lse[0] = static_cast<float>(whole);
  const double rest = (whole - static_cast<double>(lse[0])) + lost;
  if (std::isfinite(rest)) lse[1] = static_cast<float>(rest);
}

// Keys [begin, end).
struct Seen {
  i64 begin, end;
};

// The keys that the rows [begin, end) of a sequence see, not cut to those that exist.
inline Seen window(const AttentionDesc& d, const AttentionSpan& span, i64 begin, i64 end) {
  constexpr i64 kFar = i64{1} << 48;  // so that nothing overflows
  return {begin + std::clamp(d.lo, -kFar, kFar) + span.offset, end + std::clamp(d.hi, -kFar, kFar) + span.offset};
}
inline Seen seen(const AttentionDesc& d, const AttentionSpan& span, i64 begin, i64 end) {
  const Seen w = window(d, span, begin, end);
  return {std::clamp<i64>(w.begin, 0, span.Lk), std::clamp<i64>(w.end, 0, span.Lk)};
}

// A piece of the score matrix: element (0,0) is row `row` of query head `head`, key `key`; n keys exist from there on.
// The caller sets s, m, begin, end and what is carried from piece to piece.
inline SoftmaxArgs softmax_args(const AttentionDesc& d, const AttentionArgs& args, const AttentionSpan& span,
                                i64 sequence, i64 head, i64 row, i64 key, i64 n) {
  SoftmaxArgs f = {};
  const Seen w = window(d, span, row, row + 1);
  f.see_begin = w.begin - key, f.see_end = w.end - key, f.n = static_cast<int>(n);
  f.scale = d.scale, f.softcap = d.softcap, f.plain = plain(d);
  if (d.mask != MaskKind::none) {
    const i64 offset =
        sequence * d.mask_step.batch + head * d.mask_step.head + row * d.mask_step.row + key * d.mask_step.col;
    f.mask = d.mask == MaskKind::boolean ? static_cast<const char*>(args.mask) + offset
                                         : at(args.mask, offset, d.mask == MaskKind::f32 ? DType::f32 : d.dtype);
    f.mask_row = d.mask_step.row, f.mask_col = d.mask_step.col;
  }
  f.dropout = {d.seed, sequence, head, row, key, dropout_threshold(d.dropout_p)};
  return f;
}

// A[m, depth] against the columns of packed panels (columns.begin a multiple of nr), `depth` floats a line.
inline ProductsAhead panel_products(const AttentionKernel& kernel, const float* a, i64 a_row, int m,
                                    const float* panels, i64 depth, Seen columns, float* c, i64 c_row) {
  const i64 nr = kernel.nr, width = columns.end - columns.begin;
  ProductsAhead x = {};
  if (width <= 0) return x;
  TileArgs& t = x.first;
  t.m = static_cast<int>(lines(kernel, m)), t.n = static_cast<int>(nr), t.k = depth;
  t.a = a, t.a_row = a_row ? a_row : 1, t.a_col = a_row ? 1 : t.m, t.b_row = nr, t.b_col = 1;
  t.b = panels + columns.begin * depth, t.c = c + columns.begin, t.c_row = c_row;
  x.tile = kernel.tile, x.count = static_cast<int>(ceil_div(width, nr)), x.b_step = nr * depth;
  x.last_n = static_cast<int>(std::min(nr, round_up(width - (x.count - 1) * nr, 16)));
  return x;
}
inline void run(const ProductsAhead& x) {
  for (int j = 0; j < x.count; ++j) {
    TileArgs t = x.first;
    t.b = static_cast<const float*>(t.b) + j * x.b_step, t.c += j * t.n;
    if (j == x.count - 1) t.n = x.last_n;
    x.tile(t);
  }
}

void attention_run_decode(const AttentionDesc& desc, const AttentionPlan& plan, const AttentionArgs& args);

}  // namespace fastdl
