// A strip of C on tiles of bfloat16: up to 32 rows of A against panels of B, one block of 32 x 32 after the other along
// the rows of C. While a block is multiplied, the one before it becomes C, a few rows with each step along K: tile
// products leave the vector units idle, and stores that miss the caches have time to get there. (Granite Rapids, two
// threads, a loop of nothing else, 3200 x 1024 x 256 and 512 x 3072 x 768, TFLOP/s: after each block 3.2 and 2.8,
// so 3.8 and 3.4.)
#pragma once
#include "gemm/cpu/kernel_amx.h"

namespace fastdl {
namespace {

// Rows of a block of sums that are still to be activated, rounded and written: sums, bias and activation alone.
template <class T, Activation kActivation>
struct WaitingRows {
  using R = VecAvx512Rounding;
  const float* sum = nullptr;
  T* c = nullptr;
  i64 c_row = 0;
  int left = 0;
  L::V bias[2];

  // Columns j to j + 32 of f, whose sums begin at `sums`.
  FASTDL_INLINE void begin(const FinishArgs& f, const float* sums, i64 j) {
    sum = sums, c = static_cast<T*>(f.c) + j, c_row = f.c_row, left = f.m;
    const T* const b = static_cast<const T*>(f.bias);
    for (int v = 0; v < 2; ++v) bias[v] = b ? R::load(b + j + 16 * v) : R::set1(-0.0f);
  }
  FASTDL_INLINE void some(int count) {
    for (; count > 0 && left > 0; --count, --left, sum += kBlock, c += c_row)
      R::store(c, activate<R, kActivation>(R::add(R::load(sum), bias[0])),
               activate<R, kActivation>(R::add(R::load(sum + 16), bias[1])));
  }
};

// sums[32][32] = all of K; `between` is called with each step.
template <class P, int kRows, int kCols, class Between>
FASTDL_INLINE void strip_block(TileLayout a, const TileLayout& tail, TileLayout b, i64 steps, float* sums,
                               Between between) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (i64 k = 0; k < steps; ++k, a.p += a.depth, b.p += b.depth) {
    multiply<P, Stream::b, kRows, kCols, 0>(a, a.p, b, b.p);
    between();
  }
  if (tail.p) multiply<P, Stream::b, kRows, kCols, 0>(tail, tail.p, b, b.p);
  constexpr i64 kLine = kBlock * 4;
  tile_store<0>(sums, kLine);
  if constexpr (kCols > 1) tile_store<1>(sums + 16, kLine);
  if constexpr (kRows > 1) tile_store<2>(sums + 16 * kBlock, kLine);
  if constexpr (kRows > 1 && kCols > 1) tile_store<3>(sums + 16 * kBlock + 16, kLine);
}

// What does not wait: blocks that are not whole, and all that FinishArgs may ask for.
template <class T>
void finish_block(const FinishArgs& all, const float* sums, i64 j, int cols) {
  FinishArgs f = all;
  f.sum = sums, f.sum_row = kBlock, f.n = cols;
  f.c = static_cast<T*>(f.c) + j;
  if (f.residual) f.residual = static_cast<const T*>(f.residual) + j;
  if (f.pre) f.pre = static_cast<T*>(f.pre) + j;
  if (f.bias) f.bias = static_cast<const T*>(f.bias) + j * f.bias_step;
  finish<VecAvx512Rounding, T>(f);
}

template <class P, class T, Activation kActivation>
void run_strip(const GemmStripArgs& t) {
  const FinishArgs& f = t.finish;
  const i64 depth = P::parts * 2 * kTileBytes, steps = t.k / (16 * P::parts) - (t.tail != nullptr);
  const char *const first_a = static_cast<const char*>(t.a), *const first_b = reinterpret_cast<const char*>(t.b);
  const TileLayout a = !t.a_packed ? TileLayout{first_a, t.a_row, 16 * t.a_row, 0, kTileRowBytes}
                                   : TileLayout{first_a, kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  const TileLayout tail = {static_cast<const char*>(t.tail), kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  TileLayout b = {first_b, kTileRowBytes, kTileBytes, 2 * kTileBytes, depth};
  const bool wait = !f.accumulate && !f.pre && !f.residual && (!f.bias || f.bias_step == 1);
  const int each = steps > 0 ? static_cast<int>((kBlock + steps - 1) / steps) : 0;
  Fetch fetch(t.ahead, (f.n + kBlock - 1) / kBlock * steps);
  WaitingRows<T, kActivation> waiting;
  int slot = 0;
  for (int j = 0; j < f.n; j += kBlock, b.p += t.b_panel * 4) {
    float* const sums = t.sums + slot * kBlock * kBlock;
    const int cols = f.n - j < kBlock ? f.n - j : kBlock;
    const auto between = [&]() __attribute__((always_inline)) {
      fetch.turn();
      waiting.some(each);
    };
    if (f.m > 16) {
      cols > 16 ? strip_block<P, 2, 2>(a, tail, b, steps, sums, between)
                : strip_block<P, 2, 1>(a, tail, b, steps, sums, [] {});
    } else {
      cols > 16 ? strip_block<P, 1, 2>(a, tail, b, steps, sums, [] {})
                : strip_block<P, 1, 1>(a, tail, b, steps, sums, [] {});
    }
    waiting.some(kBlock);
    if (wait && cols == kBlock) {
      waiting.begin(f, sums, j);
      slot ^= 1;
    } else {
      finish_block<T>(f, sums, j, cols);
    }
  }
  waiting.some(kBlock);
}

// See GemmHelpers::strip.
template <class P, class T>
void strip(const GemmStripArgs& t) {
  with_activation(t.finish.activation, [&](auto tag) { run_strip<P, T, decltype(tag)::value>(t); });
}

}  // namespace
}  // namespace fastdl
