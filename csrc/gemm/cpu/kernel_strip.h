// A strip of C on tiles of bfloat16: up to 32 rows of A against panels of B, one block of 32 x 32 after the other along
// the rows of C. While a block is multiplied, the one before it becomes C, a few rows with each step along K: tile
// products leave the vector units idle, and stores that miss the caches have time to get there. (Granite Rapids, two
// threads, a loop of nothing else, 3200 x 1024 x 256 and 512 x 3072 x 768, TFLOP/s: after each block 3.2 and 2.8,
// so 3.8 and 3.4.)
#pragma once
#include "gemm/cpu/kernel_amx.h"

namespace fastdl {
namespace {

// Lanes that are Inf or NaN.
FASTDL_INLINE unsigned specials(L::V x) { return _mm512_fpclass_ps_mask(x, 0x99); }

// Rows of a block of sums that are still to be activated, rounded and written: sums, bias and activation alone.
template <class T, Activation kActivation, bool kLooks>
struct WaitingRows {
  using R = VecAvx512Rounding;
  const float* sum;
  T* c;
  const T* b;
  const i64* row_at;
  i64 left;
  unsigned special = 0;
  L::V bias[2];

  explicit WaitingRows(const GemmStripWaiting& w)
      : sum(w.sum), c(static_cast<T*>(w.c)), b(static_cast<const T*>(w.bias)), row_at(w.row_at), left(w.left) {
    load_bias();
  }
  FASTDL_INLINE void save(GemmStripWaiting* w) const {
    w->sum = sum, w->c = c, w->bias = b, w->row_at = row_at, w->left = left;
    if constexpr (kLooks) w->special |= special;
  }
  FASTDL_INLINE void load_bias() {
    for (int v = 0; v < 2; ++v) bias[v] = b ? R::load(b + 16 * v) : R::set1(-0.0f);
  }
  // Columns j to j + 32 of t, whose sums begin at `sums`.
  FASTDL_INLINE void begin(const GemmStripArgs& t, const float* sums, i64 j) {
    const FinishArgs& f = t.finish;
    sum = sums, c = static_cast<T*>(f.c) + j, row_at = t.row_at, left = f.m;
    b = f.bias ? static_cast<const T*>(f.bias) + j : nullptr;
    load_bias();
  }
  FASTDL_INLINE void some(i64 count) {
    for (; count > 0 && left > 0; --count, --left, sum += kBlock, ++row_at) {
      if (*row_at < 0) continue;
      const L::V x = L::load(sum), y = L::load(sum + 16);
      if constexpr (kLooks) special |= specials(x) | specials(y);
      store(c + *row_at, activate<R, kActivation>(R::add(x, bias[0])), activate<R, kActivation>(R::add(y, bias[1])));
    }
  }
  static FASTDL_INLINE void store(bf16* p, L::V x, L::V y) { R::store(p, x, y); }
  static FASTDL_INLINE void store(float* p, L::V x, L::V y) {
    L::store(p, x);
    L::store(p + 16, y);
  }
};

// sums[32][32] = all of K; `between` is called with each step.
template <class P, int kRows, int kCols, class Between>
FASTDL_INLINE void strip_block(const GemmStripArgs& t, const TileLayout& a, const TileLayout& tail, TileLayout b,
                               float* sums, Between between) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  const i64 steps = t.run / (16 * P::parts);
  const i64* at = t.runs;
  for (i64 r = t.run_count; r > 0; --r) {
    const char* p = a.p + *at++ * 4;
    for (i64 k = steps; k > 0; --k, p += a.depth, b.p += b.depth) {
      multiply<P, Stream::b, kRows, kCols, 0>(a, p, b, b.p);
      between();
    }
  }
  if (tail.p) multiply<P, Stream::b, kRows, kCols, 0>(tail, tail.p, b, b.p);
  constexpr i64 kLine = kBlock * 4;
  tile_store<0>(sums, kLine);
  if constexpr (kCols > 1) tile_store<1>(sums + 16, kLine);
  if constexpr (kRows > 1) tile_store<2>(sums + 16 * kBlock, kLine);
  if constexpr (kRows > 1 && kCols > 1) tile_store<3>(sums + 16 * kBlock + 16, kLine);
}

inline unsigned specials_of(const float* sums, int m, int n) {
  unsigned some = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; j += 16) some |= specials(L::load(sums + i * kBlock + j, L::first(n - j < 16 ? n - j : 16)));
  return some;
}

// What does not wait: blocks that are not whole, and all that FinishArgs may ask for; rows evenly apart at a time.
template <class T>
void finish_block(const GemmStripArgs& t, const float* sums, i64 j, int cols) {
  for (int i = 0, count; i < t.finish.m; i += count) {
    count = 1;
    const i64 first = t.row_at[i];
    if (first < 0) continue;
    FinishArgs f = t.finish;
    f.c_row = i + 1 < f.m ? t.row_at[i + 1] - first : 0;
    while (i + count < f.m && t.row_at[i + count] >= 0 && t.row_at[i + count] == first + count * f.c_row) ++count;
    f.sum = sums + i * kBlock, f.sum_row = kBlock, f.m = count, f.n = cols;
    f.c = static_cast<T*>(f.c) + first + j;
    if (f.residual) f.residual = static_cast<const T*>(f.residual) + first + j;
    if (f.pre) f.pre = static_cast<T*>(f.pre) + first + j;
    if (f.bias) f.bias = static_cast<const T*>(f.bias) + j * f.bias_step;
    finish<VecAvx512Rounding, T>(f);
  }
}

template <class P, class T, bool kLooks, Activation kActivation>
void run_strip(const GemmStripArgs& t) {
  const FinishArgs& f = t.finish;
  const i64 depth = P::parts * 2 * kTileBytes, steps = t.run_count * (t.run / (16 * P::parts));
  const char *const first_a = static_cast<const char*>(t.a), *const first_b = reinterpret_cast<const char*>(t.b);
  const TileLayout a = !t.a_packed ? TileLayout{first_a, t.a_row, 16 * t.a_row, kTileRowBytes, P::parts * kTileRowBytes}
                                   : TileLayout{first_a, kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  const TileLayout tail = {static_cast<const char*>(t.tail), kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  TileLayout b = {first_b, kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  const bool wait = !f.accumulate && !f.pre && !f.residual && (!f.bias || f.bias_step == 1);
  const i64 each = steps > 0 ? (kBlock + steps - 1) / steps : 0;
  Fetch fetch(t.ahead, (f.n + kBlock - 1) / kBlock * steps, Fetch::kMostOfStrip);
  WaitingRows<T, kActivation, kLooks> waiting(*t.waiting);
  i64 slot = t.waiting->slot;
  if (f.n == 0) waiting.some(kBlock);
  for (int j = 0; j < f.n; j += kBlock, b.p += t.b_panel * 4) {
    float* const sums = t.sums + slot * kBlock * kBlock;
    const int cols = f.n - j < kBlock ? f.n - j : kBlock;
    const auto between = [&]() __attribute__((always_inline)) {
      fetch.turn();
      waiting.some(each);
    };
    if (f.m > 16) {
      cols > 16 ? strip_block<P, 2, 2>(t, a, tail, b, sums, between) : strip_block<P, 2, 1>(t, a, tail, b, sums, [] {});
    } else {
      cols > 16 ? strip_block<P, 1, 2>(t, a, tail, b, sums, [] {}) : strip_block<P, 1, 1>(t, a, tail, b, sums, [] {});
    }
    waiting.some(kBlock);
    if (wait && cols == kBlock) {
      waiting.begin(t, sums, j);
      slot ^= 1;
    } else {
      if constexpr (kLooks) waiting.special |= specials_of(sums, f.m, cols);
      finish_block<T>(t, sums, j, cols);
    }
  }
  waiting.save(t.waiting);
  t.waiting->slot = slot;
}

// See GemmHelpers::strip.
template <class P, class T, bool kLooks = false>
void strip(const GemmStripArgs& t) {
  with_activation(t.finish.activation, [&](auto tag) { run_strip<P, T, kLooks, decltype(tag)::value>(t); });
}

}  // namespace
}  // namespace fastdl
