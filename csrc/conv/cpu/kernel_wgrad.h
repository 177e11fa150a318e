// The microkernel of the weight gradient: products summed over pixels that lie in runs.
#pragma once
#include "conv/cpu/kernel_args.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

// MR lines of the image broadcast against NV vectors of output channels. Nothing has a tail: panels are filled with
// zeros and sums are as wide as they are.
template <class L, int MR, int NV>
void wgrad_tile(const ConvWgradArgs& t) {
  constexpr int W = L::width;
  typename L::V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    // The sums come from memory while the products run.
    __builtin_prefetch(t.c + i * t.nr, 1);
    if (NV > 1) __builtin_prefetch(t.c + i * t.nr + W, 1);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = L::zero();
  }
  for (int r = 0; r < t.run_count; ++r) {
    const float* a = t.a + t.runs[r].a;
    const float* b = t.b + t.runs[r].b;
    for (i64 k = t.runs[r].steps; k > 0; --k) {
      typename L::V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = L::load(b + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const auto x = L::set1(a[i]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = L::fma(x, bv[v], acc[i][v]);
      }
      a += t.a_step;
      b += t.nr;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    float* c = t.c + i * t.nr;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) L::store(c + v * W, t.accumulate ? L::add(L::load(c + v * W), acc[i][v]) : acc[i][v]);
  }
}

// Every tile up to MR x NV vectors.
template <class L, int MR, int NV>
struct WgradTable {
  void (*fn[MR][NV])(const ConvWgradArgs&) = {};

  constexpr WgradTable() { rows<MR>(); }
  template <int M>
  constexpr void rows() {
    columns<M, NV>();
    if constexpr (M > 1) rows<M - 1>();
  }
  template <int M, int C>
  constexpr void columns() {
    fn[M - 1][C - 1] = wgrad_tile<L, M, C>;
    if constexpr (C > 1) columns<M, C - 1>();
  }
};

template <class L, int MR, int NV>
void run_wgrad_tile(const ConvWgradArgs& t) {
  static constexpr WgradTable<L, MR, NV> table;
  table.fn[t.m - 1][(t.n + L::width - 1) / L::width - 1](t);
}

template <class L, int MR, int NV>
constexpr ConvFunctions wgrad_functions() {
  ConvFunctions f = {};
  f.wgrad_tile = run_wgrad_tile<L, MR, NV>;
  return f;
}

}  // namespace
}  // namespace fastdl
