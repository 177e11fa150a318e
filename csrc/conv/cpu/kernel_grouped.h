// Microkernels of grouped convolutions, vectors over pixels, written once over a vector level L (simd/vec.h).
#pragma once
#include "conv/cpu/kernel_direct_args.h"
#include "gemm/cpu/kernel.h"

namespace fastdl {
namespace {

// OUT outputs x NV pixel vectors in registers: each vector of x, seldom aligned, serves OUT products.
// avx512: 8x3 24 + 3 + 1 = 28 of 32, 4x6 24 + 6 + 1 = 31; avx2, scalar: 4x3 12 + 3 + 1 = 16 of 16.
template <class L>
constexpr int plane_vectors(int outputs) {
  constexpr bool kWide = L::width == 16;
  return outputs == 1 ? (kWide ? 12 : 8) : outputs == 2 ? (kWide ? 10 : 5) : outputs == 4 ? (kWide ? 6 : 3) : 3;
}
constexpr int kPlaneVectors = 12;

template <class L, int OUT, int NV>
void plane(const PlaneArgs& a, i64 i0) {
  constexpr int W = L::width;
  typename L::V acc[OUT][NV];
#pragma GCC unroll 8
  for (int o = 0; o < OUT; ++o)
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) acc[o][v] = L::zero();
  const float* const x0 = a.x + i0;
  const float* w = a.w;
  for (i64 t = 0; t < a.taps; ++t) {
    const float* const x = x0 + a.off[t];
    if constexpr (OUT == 1) {
      const auto wv = L::set1(*w);
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) acc[0][v] = L::fma(L::load(x + v * W), wv, acc[0][v]);
    } else {
      typename L::V xv[NV];
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) xv[v] = L::load(x + v * W);
#pragma GCC unroll 8
      for (int o = 0; o < OUT; ++o) {
        const auto wv = L::set1(w[o]);
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) acc[o][v] = L::fma(xv[v], wv, acc[o][v]);
      }
    }
    w += OUT;
  }
#pragma GCC unroll 8
  for (int o = 0; o < OUT; ++o) {
    float* const y = a.y + o * a.y_out + i0;
    const auto b = a.bias ? L::set1(a.bias[o]) : L::zero();
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) {
      auto x = acc[o][v];
      if (a.accumulate) x = L::add(L::load(y + v * W), x);
      if (a.bias) x = L::add(x, b);
      L::store(y + v * W, x);
    }
  }
}

template <class L, int OUT>
struct PlaneTable {
  void (*fn[kPlaneVectors])(const PlaneArgs&, i64) = {};

  constexpr PlaneTable() { vectors<plane_vectors<L>(OUT)>(); }
  template <int V>
  constexpr void vectors() {
    fn[V - 1] = plane<L, OUT, V>;
    if constexpr (V > 1) vectors<V - 1>();
  }
};

template <class L, int OUT>
void run_plane_of(const PlaneArgs& a) {
  static constexpr PlaneTable<L, OUT> table;
  constexpr int NV = plane_vectors<L>(OUT);
  const i64 vectors = (a.count + L::width - 1) / L::width, tiles = (vectors + NV - 1) / NV;
  for (i64 i = 0; i < tiles; ++i) {  // cut evenly
    const i64 begin = vectors * i / tiles, end = vectors * (i + 1) / tiles;
    table.fn[end - begin - 1](a, begin * L::width);
  }
}

template <class L>
constexpr int plane_outputs() {
  return L::width == 16 ? 8 : 4;
}

template <class L>
void run_plane(const PlaneArgs& a) {
  switch (a.outputs) {
    case 1:
      return run_plane_of<L, 1>(a);
    case 2:
      return run_plane_of<L, 2>(a);
    case 4:
      return run_plane_of<L, 4>(a);
    default:
      if constexpr (plane_outputs<L>() == 8) return run_plane_of<L, 8>(a);
  }
}

// OUT rows of dy against TAPS shifted rows of x. avx512: 4x6 24 + 4 + 1 = 29 of 32; avx2, scalar: 2x6 12 + 2 + 1 = 15
// of 16. Lanes past the end of a row are not read at all: a zero there would meet an infinite x.
template <class L>
constexpr int grad_taps(int outputs) {
  return outputs == 1 ? 12 : 6;
}

template <class L, int OUT, int TAPS>
void plane_grad(const PlaneGradArgs& a, i64 o0, i64 t0) {
  constexpr int W = L::width;
  typename L::V acc[OUT][TAPS];
  i64 off[TAPS];
#pragma GCC unroll 12
  for (int t = 0; t < TAPS; ++t) {
    off[t] = a.off[t0 + t];
#pragma GCC unroll 4
    for (int o = 0; o < OUT; ++o) acc[o][t] = L::zero();
  }
  const i64 whole = a.cols / W * W;
  const auto mask = L::first(static_cast<int>(a.cols - whole));
  const auto step = [&](const float* x, const float* dy, auto load) __attribute__((always_inline)) {
    typename L::V g[OUT];
#pragma GCC unroll 4
    for (int o = 0; o < OUT; ++o) g[o] = load(dy + o * a.dy_out);
#pragma GCC unroll 12
    for (int t = 0; t < TAPS; ++t) {
      const auto xv = load(x + off[t]);
#pragma GCC unroll 4
      for (int o = 0; o < OUT; ++o) acc[o][t] = L::fma(xv, g[o], acc[o][t]);
    }
  };
  for (i64 d = 0; d < a.depths; ++d) {
    for (i64 h = 0; h < a.rows; ++h) {
      const float* const x = a.x + d * a.x_depth + h * a.x_row;
      const float* const dy = a.dy + o0 * a.dy_out + d * a.dy_depth + h * a.dy_row;
      for (i64 i = 0; i < whole; i += W)
        step(x + i, dy + i, [](const float* p) __attribute__((always_inline)) { return L::load(p); });
      if (whole < a.cols)
        step(x + whole, dy + whole, [&](const float* p) __attribute__((always_inline)) { return L::load(p, mask); });
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < OUT; ++o) {
    float sum[(TAPS + 3) / 4 * 4];
#pragma GCC unroll 3
    for (int t = 0; t < TAPS; t += 4) {
      const auto at = [&](int i)
                          __attribute__((always_inline)) { return i < TAPS ? acc[o][i < TAPS ? i : 0] : L::zero(); };
      L::sum4(at(t), at(t + 1), at(t + 2), at(t + 3), sum + t);
    }
    float* const dw = a.dw + (o0 + o) * a.dw_out + t0;
    for (int t = 0; t < TAPS; ++t) dw[t] += sum[t];
  }
}

template <class L, int OUT>
struct PlaneGradTable {
  void (*fn[12])(const PlaneGradArgs&, i64, i64) = {};

  constexpr PlaneGradTable() { taps<grad_taps<L>(OUT)>(); }
  template <int T>
  constexpr void taps() {
    fn[T - 1] = plane_grad<L, OUT, T>;
    if constexpr (T > 1) taps<T - 1>();
  }
};

template <class L, int OUT>
void run_plane_grad_of(const PlaneGradArgs& a, i64 o0) {
  static constexpr PlaneGradTable<L, OUT> table;
  constexpr int TAPS = grad_taps<L>(OUT);
  const i64 blocks = (a.taps + TAPS - 1) / TAPS;
  for (i64 b = 0; b < blocks; ++b) {
    const i64 t = a.taps * b / blocks, end = a.taps * (b + 1) / blocks;
    table.fn[end - t - 1](a, o0, t);
  }
}

template <class L>
void run_plane_grad(const PlaneGradArgs& a) {
  int o = 0;
  if constexpr (L::width == 16)
    for (; o + 4 <= a.outputs; o += 4) run_plane_grad_of<L, 4>(a, o);
  for (; o + 2 <= a.outputs; o += 2) run_plane_grad_of<L, 2>(a, o);
  if (o < a.outputs) run_plane_grad_of<L, 1>(a, o);
}

// See CopyFunction.
template <class L, class T>
void copy_block(const void* source, i64 i_step, i64 j_step, i64 m, i64 n, float* dst, i64 row) {
  constexpr int W = L::width;
  const T* const src = static_cast<const T*>(source);
  if (j_step == 1) {
    for (i64 i = 0; i < m; ++i) {
      const T* const s = src + i * i_step;
      float* const d = dst + i * row;
      i64 j = 0;
      for (; j + W <= n; j += W) L::store(d + j, L::load(s + j));
      if (j < n) {
        const Lanes<L> lanes(n - j);
        lanes.store(d + j, lanes.load(s + j));
      }
    }
  } else if (i_step == 1) {  // W x W blocks, transposed
    for (i64 j = 0; j < n; j += W) {
      const int width = n - j < W ? static_cast<int>(n - j) : W;
      const Lanes<L> out(width);
      for (i64 i = 0; i < m; i += W) {
        const Lanes<L> in(m - i);
        typename L::V r[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) r[l] = l < width ? in.load(src + i + (j + l) * j_step) : L::zero();
        L::transpose(r);
        float* const d = dst + i * row + j;
        if (in.n == W) {
#pragma GCC unroll 16
          for (int l = 0; l < W; ++l) out.store(d + l * row, r[l]);
        } else {
          for (int l = 0; l < in.n; ++l) out.store(d + l * row, r[l]);
        }
      }
    }
  } else {
    for (i64 i = 0; i < m; ++i)
      for (i64 j = 0; j < n; ++j) dst[i * row + j] = widen(src[i * i_step + j * j_step]);
  }
}

}  // namespace
}  // namespace fastdl
