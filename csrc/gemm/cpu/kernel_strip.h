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

// Rows of a block of sums that are still to be activated, rounded and written: sums, bias and activation alone. All of
// them are by the time the next block is multiplied.
template <class T, Activation kActivation, bool kLooks>
struct WaitingRows {
  using R = VecAvx512Rounding;
  static constexpr bool kAdds = sizeof(T) == 4;  // sums of float32 may wait in C
  const float* sum;
  T* c;
  const i64* row_at;
  i64 left = 0;
  const bool adds;
  L::V bias[2];
  unsigned special = 0;
  // Of the block whose sums are still in tiles; rows 0: none are.
  T* held_c;
  const T* held_b;
  const i64* held_at;
  i64 held;

  WaitingRows(const GemmStripWaiting& w, bool accumulate)
      : adds(accumulate),
        held_c(static_cast<T*>(w.c)),
        held_b(static_cast<const T*>(w.bias)),
        held_at(w.row_at),
        held(w.rows) {}
  FASTDL_INLINE void save(GemmStripWaiting* w) const {
    w->c = held_c, w->bias = held_b, w->row_at = held_at, w->rows = held;
    if constexpr (kLooks) w->special |= special;
  }
  // Columns j to j + 32 of t are in tiles.
  FASTDL_INLINE void hold(const GemmStripArgs& t, i64 j) {
    held_c = static_cast<T*>(t.finish.c) + j, held_at = t.row_at, held = t.finish.m;
    held_b = t.finish.bias ? static_cast<const T*>(t.finish.bias) + j : nullptr;
  }
  // What tiles held lies at `sums`.
  FASTDL_INLINE void begin(const float* sums) {
    sum = sums, c = held_c, row_at = held_at, left = held;
    held = 0;
    for (int v = 0; v < 2; ++v) bias[v] = held_b ? R::load(held_b + 16 * v) : R::set1(-0.0f);
  }
  FASTDL_INLINE void some(i64 count) {
    for (; count > 0 && left > 0; --count, --left, sum += kBlock, ++row_at) {
      if (*row_at < 0) continue;
      L::V x = L::load(sum), y = L::load(sum + 16);
      if constexpr (kAdds) {
        if (adds) x = L::add(x, R::load(c + *row_at)), y = L::add(y, R::load(c + *row_at + 16));
      }
      if constexpr (kLooks) special |= specials(x) | specials(y);
      store(c + *row_at, activate<R, kActivation>(R::add(x, bias[0])), activate<R, kActivation>(R::add(y, bias[1])));
    }
  }
  static FASTDL_INLINE void store(bf16* p, L::V x, L::V y) { R::store(p, x, y); }
  static FASTDL_INLINE void store(f16* p, L::V x, L::V y) {
    R::store(p, x);
    R::store(p + 16, y);
  }
  static FASTDL_INLINE void store(float* p, L::V x, L::V y) {
    L::store(p, x);
    L::store(p + 16, y);
  }
};

constexpr i64 kLine = kBlock * 4;

template <int kRows, int kCols>
FASTDL_INLINE void store_tiles(float* sums) {
  tile_store<0>(sums, kLine);
  if constexpr (kCols > 1) tile_store<1>(sums + 16, kLine);
  if constexpr (kRows > 1) tile_store<2>(sums + 16 * kBlock, kLine);
  if constexpr (kRows > 1 && kCols > 1) tile_store<3>(sums + 16 * kBlock + 16, kLine);
}

// The first step of a whole block: the tiles of the one before are stored between its loads, just before they are
// needed. (A core, K = 256, 576, 1024, TFLOP/s: stored after the block 2.9, 3.1, 1.9, so 3.3, 3.3, 1.9.)
template <class P>
FASTDL_INLINE void first_step(const TileLayout& a, const char* at_a, const TileLayout& b, const char* at_b,
                              float* before) {
  const char *const tile_a = at_a + P::a[0] * a.part, *const tile_b = at_b + P::b[0] * b.part;
  load<false, 4>(tile_a, a.line);
  load<true, 6>(tile_b, b.line);
  tile_store<0>(before, kLine);
  tile_zero<0>();
  tile_dpbf16ps<0, 4, 6>();
  load<false, 5>(tile_a + a.tile, a.line);
  tile_store<2>(before + 16 * kBlock, kLine);
  tile_zero<2>();
  tile_dpbf16ps<2, 5, 6>();
  load<true, 7>(tile_b + b.tile, b.line);
  tile_store<1>(before + 16, kLine);
  tile_zero<1>();
  tile_dpbf16ps<1, 4, 7>();
  tile_store<3>(before + 16 * kBlock + 16, kLine);
  tile_zero<3>();
  tile_dpbf16ps<3, 5, 7>();
  multiply<P, Stream::b, 2, 2, 1>(a, at_a, b, at_b);
}

// Tiles 0 to 3 = all of K. Of a whole block the first step is first_step, which stores what they hold; `between` is
// called with each step.
template <class P, int kRows, int kCols, bool kWhole, class Between>
FASTDL_INLINE void strip_block(const GemmStripArgs& t, const TileLayout& a, const TileLayout& tail, TileLayout b,
                               float* before, Between between) {
  if constexpr (!kWhole) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  const i64 steps = t.run / (16 * P::parts);
  const i64* at = t.runs;
  bool first = kWhole;
  for (i64 r = t.run_count; r > 0; --r) {
    const char* p = a.p + *at++ * 4;
    i64 k = steps;
    if (kWhole && first) {
      first_step<P>(a, p, b, b.p, before);
      between();
      first = false, --k, p += a.depth, b.p += b.depth;
    }
    for (; k > 0; --k, p += a.depth, b.p += b.depth) {
      multiply<P, Stream::b, kRows, kCols, 0>(a, p, b, b.p);
      between();
    }
  }
  if (tail.p) multiply<P, Stream::b, kRows, kCols, 0>(tail, tail.p, b, b.p);
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
  using Waiting = WaitingRows<T, kActivation, kLooks>;
  const FinishArgs& f = t.finish;
  const i64 depth = P::parts * 2 * kTileBytes, steps = t.run_count * (t.run / (16 * P::parts));
  const char *const first_a = static_cast<const char*>(t.a), *const first_b = reinterpret_cast<const char*>(t.b);
  const TileLayout a = !t.a_packed ? TileLayout{first_a, t.a_row, 16 * t.a_row, kTileRowBytes, P::parts * kTileRowBytes}
                                   : TileLayout{first_a, kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  const TileLayout tail = {static_cast<const char*>(t.tail), kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  TileLayout b = {first_b, kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  const bool wait = (Waiting::kAdds || !f.accumulate) && !f.pre && !f.residual && (!f.bias || f.bias_step == 1);
  const i64 each = steps > 0 ? (kBlock + steps - 1) / steps : 0;
  Fetch fetch(t.ahead, (f.n + kBlock - 1) / kBlock * steps, Fetch::kMostOfStrip);
  Waiting waiting(*t.waiting, f.accumulate);
  const auto release = [&]() __attribute__((always_inline)) {
    if (waiting.held == 0) return;
    store_tiles<2, 2>(t.sums);
    waiting.begin(t.sums);
    waiting.some(waiting.left);
  };
  if (f.n == 0) release();
  for (int j = 0; j < f.n; j += kBlock, b.p += t.b_panel * 4) {
    const int cols = f.n - j < kBlock ? f.n - j : kBlock;
    if (wait && steps > 0 && f.m > 16 && cols == kBlock) {
      bool first = true;
      strip_block<P, 2, 2, true>(t, a, tail, b, t.sums, [&]() __attribute__((always_inline)) {
        if (first) waiting.begin(t.sums);
        first = false;
        fetch.turn();
        waiting.some(each);
      });
      waiting.hold(t, j);
      continue;
    }
    release();
    float* const sums = t.sums;
    if (f.m > 16) {
      if (cols > 16) {
        strip_block<P, 2, 2, false>(t, a, tail, b, sums, [] {});
        store_tiles<2, 2>(sums);
      } else {
        strip_block<P, 2, 1, false>(t, a, tail, b, sums, [] {});
        store_tiles<2, 1>(sums);
      }
    } else if (cols > 16) {
      strip_block<P, 1, 2, false>(t, a, tail, b, sums, [] {});
      store_tiles<1, 2>(sums);
    } else {
      strip_block<P, 1, 1, false>(t, a, tail, b, sums, [] {});
      store_tiles<1, 1>(sums);
    }
    if constexpr (kLooks) waiting.special |= specials_of(sums, f.m, cols);
    finish_block<T>(t, sums, j, cols);
  }
  waiting.save(t.waiting);
}

// See GemmHelpers::strip.
template <class P, class T, bool kLooks = false>
void strip(const GemmStripArgs& t) {
  with_activation(t.finish.activation, [&](auto tag) { run_strip<P, T, kLooks, decltype(tag)::value>(t); });
}

}  // namespace
}  // namespace fastdl
