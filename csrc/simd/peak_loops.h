// The loops of peak.h, written once over a vector level.
#pragma once
#include "simd/vec.h"

namespace fastdl {
namespace {

// kChains independent accumulators: enough to cover the latency of two FMA units, few enough to stay in registers.
template <class L, int kChains>
double fma_loop(i64 turns, float* sink) {
  typename L::V acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = L::set1(1.0f + static_cast<float>(i));
  const auto x = L::set1(0.999f), y = L::set1(1e-3f);
  for (i64 t = 0; t < turns; ++t) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = L::fma(acc[i], x, y);
  }
  auto sum = L::zero();
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum = L::add(sum, acc[i]);
  L::store(sink, sum);
  return 2.0 * L::width * kChains * static_cast<double>(turns);
}

template <class L>
void read_loop(const float* data, i64 count, float* sink) {
  constexpr int W = L::width, kChains = 8;
  typename L::V acc[kChains];
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) acc[i] = L::zero();
  for (i64 k = 0; k < count; k += kChains * W) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) acc[i] = L::add(acc[i], L::load(data + k + i * W));
  }
#pragma GCC unroll 8
  for (int i = 1; i < kChains; ++i) acc[0] = L::add(acc[0], acc[i]);
  L::store(sink, acc[0]);
}

}  // namespace
}  // namespace fastdl
