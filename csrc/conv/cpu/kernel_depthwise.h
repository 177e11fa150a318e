// Depthwise microkernels, vectors over channels, written once over a vector level L (simd/vec.h).
#pragma once
#include "conv/cpu/kernel_direct_args.h"
#include "gemm/cpu/kernel.h"

namespace fastdl {
namespace {

// COLS columns x NV channel vectors in registers; x is read from memory by each FMA (one load an FMA: the ports keep
// up), so any stride and dilation is as fast. avx512: 6x4 24 + 4 + 1 = 29 of 32; avx2, scalar: 6x2 12 + 2 + 1 = 15
// of 16.
template <class L, int NV, int COLS, bool kTail>
void strip(const StripArgs& a, i64 j0, i64 c0) {
  constexpr int W = L::width;
  const auto mask = L::first(kTail ? static_cast<int>(a.channels - c0) - (NV - 1) * W : W);
  const auto load = [&](const float* p, int v) __attribute__((always_inline)) {
    return kTail && v == NV - 1 ? L::load(p + v * W, mask) : L::load(p + v * W);
  };
  typename L::V acc[COLS][NV];
#pragma GCC unroll 6
  for (int j = 0; j < COLS; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[j][v] = L::zero();

  const float* const x0 = static_cast<const float*>(a.x) + j0 * a.x_col + c0;
  const float* const w0 = static_cast<const float*>(a.w) + c0;
  const i64 col = a.x_col;
  for (i64 t = 0; t < a.taps; ++t) {
    const float* const w = w0 + a.w_off[t];
    const float* const lo = x0 + a.off[t];
    const float* const hi = lo + 3 * col;  // x86 addresses p, p+s and p+2s without further registers
    typename L::V wv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) wv[v] = load(w, v);
#pragma GCC unroll 6
    for (int j = 0; j < COLS; ++j) {
      const float* const p = j < 3 ? lo + j * col : hi + (j - 3) * col;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[j][v] = L::fma(load(p, v), wv[v], acc[j][v]);
    }
  }
  float* const y = static_cast<float*>(a.y) + j0 * a.y_col + c0;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const auto b = a.bias ? load(static_cast<const float*>(a.bias) + c0, v) : L::zero();
#pragma GCC unroll 6
    for (int j = 0; j < COLS; ++j) {
      const auto x = a.bias ? L::add(acc[j][v], b) : acc[j][v];
      if (kTail && v == NV - 1) {
        L::store(y + j * a.y_col + v * W, x, mask);
      } else {
        L::store(y + j * a.y_col + v * W, x);
      }
    }
  }
}

template <class L, int NV, int COLS>
struct StripTable {
  void (*fn[NV][COLS][2])(const StripArgs&, i64, i64) = {};

  constexpr StripTable() { vectors<NV>(); }
  template <int V>
  constexpr void vectors() {
    columns<V, COLS>();
    if constexpr (V > 1) vectors<V - 1>();
  }
  template <int V, int C>
  constexpr void columns() {
    fn[V - 1][C - 1][0] = strip<L, V, C, false>;
    fn[V - 1][C - 1][1] = strip<L, V, C, true>;
    if constexpr (C > 1) columns<V, C - 1>();
  }
};

template <class L>
void run_strip(const StripArgs& a) {
  constexpr int W = L::width, NV = W == 16 ? 4 : 2, COLS = 6;
  static constexpr StripTable<L, NV, COLS> table;
  for (i64 c = 0; c < a.channels; c += NV * W) {
    const i64 left = a.channels - c;
    const int vectors = left >= NV * W ? NV : static_cast<int>((left + W - 1) / W);
    const auto& row = table.fn[vectors - 1];
    const bool tail = left < vectors * W;
    for (i64 j = 0; j < a.cols; j += COLS) {
      const i64 cols = a.cols - j < COLS ? a.cols - j : COLS;
      row[cols - 1][tail](a, j, c);
    }
  }
}

// The same of bfloat16 in memory: a vector of 32-bit lanes is two of floats, channels 0, 2, 4.. and 1, 3, 5.., whose
// widening is a shift and a mask. avx512: 6x2x2 24 + 4 + 2 + 1 = 31 of 32; avx2: 5x1x2 10 + 2 + 2 + 1 = 15 of 16.
template <class L, int NV, int COLS, bool kTail>
void strip_split(const StripArgs& a, i64 j0, i64 c0) {
  constexpr int W = 2 * L::width;
  const auto mask = L::halves(kTail ? static_cast<int>(a.channels - c0) - (NV - 1) * W : W);
  const auto load = [&](const bf16* p, int v, typename L::V* even, typename L::V* odd) __attribute__((always_inline)) {
    if (kTail && v == NV - 1) {
      L::split(p + v * W, mask, even, odd);
    } else {
      L::split(p + v * W, even, odd);
    }
  };
  typename L::V acc[COLS][NV][2];
#pragma GCC unroll 6
  for (int j = 0; j < COLS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[j][v][0] = acc[j][v][1] = L::zero();
  const bf16* const x0 = static_cast<const bf16*>(a.x) + j0 * a.x_col + c0;
  const bf16* const w0 = static_cast<const bf16*>(a.w) + c0;
  const i64 col = a.x_col;
  for (i64 t = 0; t < a.taps; ++t) {
    const bf16* const w = w0 + a.w_off[t];
    const bf16* const lo = x0 + a.off[t];
    const bf16* const hi = lo + 3 * col;
    typename L::V wv[NV][2];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) load(w, v, &wv[v][0], &wv[v][1]);
#pragma GCC unroll 6
    for (int j = 0; j < COLS; ++j) {
      const bf16* const p = j < 3 ? lo + j * col : hi + (j - 3) * col;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        typename L::V even, odd;
        load(p, v, &even, &odd);
        acc[j][v][0] = L::fma(even, wv[v][0], acc[j][v][0]);
        acc[j][v][1] = L::fma(odd, wv[v][1], acc[j][v][1]);
      }
    }
  }
  bf16* const y = static_cast<bf16*>(a.y) + j0 * a.y_col + c0;
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    typename L::V even = L::zero(), odd = L::zero();
    if (a.bias) load(static_cast<const bf16*>(a.bias) + c0, v, &even, &odd);
#pragma GCC unroll 6
    for (int j = 0; j < COLS; ++j) {
      const auto lo = a.bias ? L::add(acc[j][v][0], even) : acc[j][v][0];
      const auto hi = a.bias ? L::add(acc[j][v][1], odd) : acc[j][v][1];
      bf16* const to = y + j * a.y_col + v * W;
      kTail&& v == NV - 1 ? L::join(to, mask, lo, hi) : L::join(to, lo, hi);
    }
  }
}

template <class L, int NV, int COLS>
struct StripSplitTable {
  void (*fn[NV][COLS][2])(const StripArgs&, i64, i64) = {};

  constexpr StripSplitTable() { vectors<NV>(); }
  template <int V>
  constexpr void vectors() {
    columns<V, COLS>();
    if constexpr (V > 1) vectors<V - 1>();
  }
  template <int V, int C>
  constexpr void columns() {
    fn[V - 1][C - 1][0] = strip_split<L, V, C, false>;
    fn[V - 1][C - 1][1] = strip_split<L, V, C, true>;
    if constexpr (C > 1) columns<V, C - 1>();
  }
};

template <class L>
void run_strip_split(const StripArgs& a) {
  constexpr int W = 2 * L::width, NV = L::width == 16 ? 2 : 1, COLS = L::width == 16 ? 6 : 5;
  static constexpr StripSplitTable<L, NV, COLS> table;
  for (i64 c = 0; c < a.channels; c += NV * W) {
    const i64 left = a.channels - c;
    const int vectors = left >= NV * W ? NV : static_cast<int>((left + W - 1) / W);
    const bool tail = left < vectors * W;
    for (i64 j = 0; j < a.cols; j += COLS)
      table.fn[vectors - 1][(a.cols - j < COLS ? a.cols - j : COLS) - 1][tail](a, j, c);
  }
}

// Whether a level takes bfloat16 vectors apart that way.
template <class L, class T, class = void>
struct StripSplit {
  static constexpr void (*run)(const StripArgs&) = nullptr;
};
template <class L>
struct StripSplit<L, bf16, decltype(L::split(nullptr, nullptr, nullptr))> {
  static constexpr void (*run)(const StripArgs&) = run_strip_split<L>;
};

// TAPS sums x NV channel vectors in registers over all pixels. avx512: 12x2 24 + 2 + 1 = 27 of 32; avx2, scalar: 12x1.
template <class L, int NV, int TAPS, bool kTail>
void strip_grad(const StripGradArgs& a, i64 t0, i64 c0) {
  constexpr int W = L::width;
  const auto mask = L::first(kTail ? static_cast<int>(a.channels - c0) - (NV - 1) * W : W);
  const auto load = [&](const float* p, int v) __attribute__((always_inline)) {
    return kTail && v == NV - 1 ? L::load(p + v * W, mask) : L::load(p + v * W);
  };
  typename L::V acc[TAPS][NV];
  i64 off[TAPS];
#pragma GCC unroll 12
  for (int t = 0; t < TAPS; ++t) {
    off[t] = a.off[t0 + t] + c0;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[t][v] = L::zero();
  }
  for (i64 i = 0; i < a.rows; ++i) {
    const float* x = a.x + i * a.x_row;
    const float* dy = a.dy + i * a.dy_row + c0;
    for (i64 j = a.cols; j > 0; --j) {
      typename L::V g[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) g[v] = load(dy, v);
#pragma GCC unroll 12
      for (int t = 0; t < TAPS; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[t][v] = L::fma(load(x + off[t], v), g[v], acc[t][v]);
      x += a.x_col;
      dy += a.dy_col;
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < TAPS; ++t) {
    float* const dw = a.dw + (t0 + t) * a.dw_tap + c0;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const auto x = L::add(load(dw, v), acc[t][v]);
      if (kTail && v == NV - 1) {
        L::store(dw + v * W, x, mask);
      } else {
        L::store(dw + v * W, x);
      }
    }
  }
}

template <class L, int NV, int TAPS>
struct StripGradTable {
  void (*fn[NV][TAPS][2])(const StripGradArgs&, i64, i64) = {};

  constexpr StripGradTable() { vectors<NV>(); }
  template <int V>
  constexpr void vectors() {
    taps<V, TAPS>();
    if constexpr (V > 1) vectors<V - 1>();
  }
  template <int V, int T>
  constexpr void taps() {
    fn[V - 1][T - 1][0] = strip_grad<L, V, T, false>;
    fn[V - 1][T - 1][1] = strip_grad<L, V, T, true>;
    if constexpr (T > 1) taps<V, T - 1>();
  }
};

template <class L>
void run_strip_grad(const StripGradArgs& a) {
  constexpr int W = L::width, NV = W == 16 ? 2 : 1, TAPS = 12;
  static constexpr StripGradTable<L, NV, TAPS> table;
  const i64 blocks = (a.taps + TAPS - 1) / TAPS;  // of taps, cut evenly
  for (i64 c = 0; c < a.channels; c += NV * W) {
    const i64 left = a.channels - c;
    const int vectors = left >= NV * W ? NV : static_cast<int>((left + W - 1) / W);
    for (i64 b = 0; b < blocks; ++b) {
      const i64 t = a.taps * b / blocks, end = a.taps * (b + 1) / blocks;
      table.fn[vectors - 1][end - t - 1][left < vectors * W](a, t, c);
    }
  }
}

}  // namespace
}  // namespace fastdl
