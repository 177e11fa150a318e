// The GEMM microkernels, written once over a vector level L (simd/vec.h).
#pragma once
#include "gemm/cpu/kernel_args.h"
#include "simd/math.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

// C += A * B with MR rows broadcast against NV vectors of B. kUnitRow: a_row == 1 (packed or column-major A), so that
// rows are addressed by constant offsets. kTail: the last vector is partial.
template <class L, int MR, int NV, bool kUnitRow, bool kTail>
void tile(const TileArgs& t) {
  constexpr int W = L::width;
  const auto mask = L::first(kTail ? t.n - (NV - 1) * W : W);
  const auto load_b = [&](const float* p, int v) {
    return kTail && v == NV - 1 ? L::load(p + v * W, mask) : L::load(p + v * W);
  };

  typename L::V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    // C comes from memory while the products run.
    __builtin_prefetch(t.c + i * t.c_row, 1);
    if (NV > 1) __builtin_prefetch(t.c + i * t.c_row + t.n - 1, 1);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = L::zero();
  }

  // Rows in groups of four, one pointer each: x86 addresses p, p+s, p+2s and p+3s without further registers.
  constexpr int kGroups = (MR + 3) / 4;
  const i64 a_row = kUnitRow ? 1 : t.a_row;
  const float* a[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) a[g] = static_cast<const float*>(t.a) + 4 * g * a_row;
  const float* b = static_cast<const float*>(t.b);
  for (i64 k = t.k; k > 0; --k) {
    typename L::V bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = load_b(b, v);
    b += t.b_row;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const auto x = L::set1(a[i / 4][(i % 4) * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = L::fma(x, bv[v], acc[i][v]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) a[g] += t.a_col;
  }

  typename L::V bias[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    if (!t.bias) {
      bias[v] = L::zero();
    } else if (t.bias_step == 1) {
      bias[v] = load_b(t.bias, v);
    } else {
      float lanes[W] = {};
      for (int l = 0; l < W && v * W + l < t.n; ++l) lanes[l] = t.bias[(v * W + l) * t.bias_step];
      bias[v] = L::load(lanes);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    float* c = t.c + i * t.c_row;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      auto x = acc[i][v];
      if (t.accumulate) x = L::add(load_b(c, v), x);
      if (t.bias) x = L::add(x, bias[v]);
      if (kTail && v == NV - 1) {
        L::store(c + v * W, x, mask);
      } else {
        L::store(c + v * W, x);
      }
    }
  }
}

// Every tile up to MR x NV vectors: fn[rows - 1][vectors - 1][kUnitRow][kTail].
template <class L, int MR, int NV>
struct TileTable {
  void (*fn[MR][NV][2][2])(const TileArgs&) = {};

  constexpr TileTable() { rows<MR>(); }
  template <int M>
  constexpr void rows() {
    columns<M, NV>();
    if constexpr (M > 1) rows<M - 1>();
  }
  template <int M, int C>
  constexpr void columns() {
    fn[M - 1][C - 1][0][0] = tile<L, M, C, false, false>;
    fn[M - 1][C - 1][0][1] = tile<L, M, C, false, true>;
    fn[M - 1][C - 1][1][0] = tile<L, M, C, true, false>;
    fn[M - 1][C - 1][1][1] = tile<L, M, C, true, true>;
    if constexpr (C > 1) columns<M, C - 1>();
  }
};

template <class L, int MR, int NV>
void run_tile(const TileArgs& t) {
  static constexpr TileTable<L, MR, NV> table;
  const int vectors = (t.n + L::width - 1) / L::width;
  table.fn[t.m - 1][vectors - 1][t.a_row == 1][t.n % L::width != 0](t);
}

// A vector of consecutive elements along K for the dot kernels, one to a lane.
template <class L>
struct Single {
  static constexpr int elements = L::width;
  template <class T>
  static FASTDL_INLINE typename L::V load(const T* p) {
    return L::load(p);
  }
  template <class T>
  static FASTDL_INLINE typename L::V load(const T* p, int n) {
    return L::load(p, L::first(n));
  }
};

// MR rows of A against four columns of B, all contiguous along K. Columns past n repeat the last one and are dropped.
template <class L, class T, int MR, class Load>
void dot(const TileArgs& t) {
  constexpr int W = Load::elements, NR = 4;
  const T* const a = static_cast<const T*>(t.a);
  const T* b[NR];
  for (int j = 0; j < NR; ++j) b[j] = static_cast<const T*>(t.b) + (j < t.n ? j : t.n - 1) * t.b_col;

  typename L::V acc[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j)
      acc[i][j] = t.lanes && !t.first ? L::load(t.lanes + (i * NR + j) * L::width) : L::zero();

  const auto step = [&](auto load) __attribute__((always_inline)) {
    typename L::V x[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) x[i] = load(a + i * t.a_row);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      const auto y = load(b[j]);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) acc[i][j] = L::fma(x[i], y, acc[i][j]);
    }
  };
  i64 k = 0;
  // Memory is waited for: ask for columns to come, into L2, since L1 holds these for the next rows, all of which take
  // part: the first ones would wait for memory, the others for their own products. (Zen 4, M x 4096 x 4096, without /
  // into L1 up to 4 rows / into L2, in ms: bfloat16 M = 1 - / 0.68 / 0.57, 16 2.15 / - / 1.50; float32 16 4.1 / - /
  // 2.9; into L1 at six rows 4.9. Granite Rapids, float32, two threads, the next columns by every tile / those after
  // them in turns: 16 rows 3.3 / 2.5, 30 rows 5.6 / 4.1.)
  const i64 ahead = (t.turns > 1 ? 2 : 1) * NR * t.b_col;
  int turn = t.turn;
  for (; k + W <= t.k; k += W) {
    if (MR == 1 || --turn < 0) {
      turn = t.turns - 1;
      for (int j = 0; j < NR; ++j) __builtin_prefetch(b[j] + ahead + k, 0, 2);
    }
    step([&](const T* p) __attribute__((always_inline)) { return Load::load(p + k); });
  }
  if (k < t.k) {
    const int left = static_cast<int>(t.k - k);
    step([&](const T* p) __attribute__((always_inline)) { return Load::load(p + k, left); });
  }
  if (t.lanes && !t.last) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) L::store(t.lanes + (i * NR + j) * L::width, acc[i][j]);
    return;
  }

#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    float sum[NR];
    L::sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], sum);
    float* c = t.c + i * t.c_row;
    for (int j = 0; j < t.n; ++j) {
      float x = sum[j];
      if (t.accumulate) x = c[j] + x;
      if (t.bias) x = x + t.bias[j * t.bias_step];
      c[j] = x;
    }
  }
}

template <class L, class T, int MR, class Load = Single<L>>
void run_dot(const TileArgs& t) {
  if constexpr (MR > 1) {
    if (t.m < MR) return run_dot<L, T, MR - 1, Load>(t);
  }
  dot<L, T, MR, Load>(t);
}

// See PackFunction. Rows are stored as whole vectors in rising order: what a store writes past its row is
// overwritten by the next row, and past the last row by the next panel (or lands in the buffer's slack).
template <class L, class T>
void pack(const void* source, i64 k_step, i64 j_step, i64 k_count, int n, int panel, float* dst, float*) {
  constexpr int W = L::width;
  const T* const src = static_cast<const T*>(source);
  if (j_step == 1) {  // rows of the panel are contiguous: copy
    for (i64 k = 0; k < k_count; ++k) {
      const T* s = src + k * k_step;
      float* d = dst + k * panel;
      int j = 0;
      for (; j + W <= n; j += W) L::store(d + j, L::load(s + j));
      if (j < n) L::store(d + j, L::load(s + j, L::first(n - j))), j += W;
      for (; j < panel; j += W) L::store(d + j, L::zero());
    }
  } else if (k_step == 1) {  // columns are contiguous: transpose W x W blocks
    for (int j = 0; j < panel; j += W) {
      for (i64 k = 0; k < k_count; k += W) {
        const int depth = k_count - k < W ? static_cast<int>(k_count - k) : W;
        const auto mask = L::first(depth);
        typename L::V r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const T* s = src + (j + i) * j_step + k;
          r[i] = j + i >= n ? L::zero() : depth == W ? L::load(s) : L::load(s, mask);
        }
        L::transpose(r);
        float* d = dst + k * panel + j;
        if (depth == W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) L::store(d + i * panel, r[i]);
        } else {
          for (int i = 0; i < depth; ++i) L::store(d + i * panel, r[i]);
        }
      }
    }
  } else {
    for (i64 k = 0; k < k_count; ++k) {
      for (int j = 0; j < panel; ++j) dst[k * panel + j] = j < n ? widen(src[k * k_step + j * j_step]) : 0.0f;
    }
  }
}

// The first n <= width lanes. Whole vectors skip the mask, which is slow to store with below AVX-512.
template <class L>
struct Lanes {
  int n;
  typename L::M mask;

  explicit FASTDL_INLINE Lanes(i64 left) : n(left < L::width ? static_cast<int>(left) : L::width), mask(L::first(n)) {}
  template <class T>
  FASTDL_INLINE typename L::V load(const T* p) const {
    return n == L::width ? L::load(p) : L::load(p, mask);
  }
  template <class T>
  FASTDL_INLINE void store(T* p, typename L::V v) const {
    if (n == L::width) {
      L::store(p, v);
    } else {
      L::store(p, v, mask);
    }
  }
};

// Calls body with the activation as a template argument.
template <class Body>
FASTDL_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      return body(ActivationTag<Activation::none>());
    case Activation::relu:
      return body(ActivationTag<Activation::relu>());
    case Activation::gelu:
      return body(ActivationTag<Activation::gelu>());
    case Activation::gelu_tanh:
      return body(ActivationTag<Activation::gelu_tanh>());
    case Activation::silu:
      return body(ActivationTag<Activation::silu>());
  }
}

// See FinishArgs. Sums, bias and activation alone, a row at a time: whole rows are written as memory likes them, and no
// vector asks what else there is to do. (Granite Rapids, two threads, bfloat16 1x1 convolution 64 -> 256 of 8x56x56:
// 590 -> 790 GFLOP/s.)
template <class L, class T, Activation kActivation>
void finish_plain(const FinishArgs& t) {
  constexpr int W = L::width;
  constexpr bool kPairs = W == 16 && sizeof(T) == 2;
  const T* const bias = static_cast<const T*>(t.bias);
  for (int i = 0; i < t.m; ++i) {
    const float* const sum = t.sum + i * t.sum_row;
    T* const c = static_cast<T*>(t.c) + i * t.c_row;
    const auto result = [&](int j) __attribute__((always_inline)) {
      const auto x = L::load(sum + j);
      return activate<L, kActivation>(bias ? L::add(x, L::load(bias + j)) : x);
    };
    int j = 0;
    if constexpr (kPairs) {
      for (; j + 2 * W <= t.n; j += 2 * W) L::store(c + j, result(j), result(j + W));
    }
    for (; j + W <= t.n; j += W) L::store(c + j, result(j));
    if (j < t.n) {
      const Lanes<L> lanes(t.n - j);
      auto x = lanes.load(sum + j);
      if (bias) x = L::add(x, lanes.load(bias + j));
      lanes.store(c + j, activate<L, kActivation>(x));
    }
  }
}

// See FinishArgs: all that it may say. Where two vectors make a line of C, a row takes both: half a line written twice
// costs twice.
template <class L, class T, Activation kActivation>
void finish_with(const FinishArgs& t) {
  constexpr int W = L::width;
  constexpr bool kPairs = W == 16 && sizeof(T) == 2;
  const T* const bias = static_cast<const T*>(t.bias);
  const auto bias_at = [&](int j, const Lanes<L>& lanes) {
    if (!bias) return L::zero();
    if (t.bias_step == 1) return lanes.load(bias + j);
    float x[W] = {};
    for (int l = 0; l < lanes.n; ++l) x[l] = widen(bias[(j + l) * t.bias_step]);
    return L::load(x);
  };
  const auto result = [&](int i, int j, const Lanes<L>& lanes, typename L::V b) {
    const i64 at = i * t.c_row + j;
    auto x = lanes.load(t.sum + i * t.sum_row + j);
    if (t.accumulate) x = L::add(lanes.load(static_cast<const T*>(t.c) + at), x);
    x = L::add(x, b);
    if (t.pre) lanes.store(static_cast<T*>(t.pre) + at, x);
    x = activate<L, kActivation>(x);
    if (t.residual) x = L::add(x, lanes.load(static_cast<const T*>(t.residual) + at));
    return x;
  };
  T* const c = static_cast<T*>(t.c);
  int j = 0;
  if constexpr (kPairs) {
    for (; j + 2 * W <= t.n; j += 2 * W) {
      const Lanes<L> all(W);
      const auto b0 = bias_at(j, all), b1 = bias_at(j + W, all);
      for (int i = 0; i < t.m; ++i) L::store(c + i * t.c_row + j, result(i, j, all, b0), result(i, j + W, all, b1));
    }
  }
  for (; j < t.n; j += W) {
    const Lanes<L> lanes(t.n - j);
    const auto b = bias_at(j, lanes);
    for (int i = 0; i < t.m; ++i) {
      const auto x = result(i, j, lanes, b);
      lanes.store(c + i * t.c_row + j, x);
    }
  }
}

template <class L, class T>
void finish(const FinishArgs& t) {
  const bool plain = !t.accumulate && !t.pre && !t.residual && (!t.bias || t.bias_step == 1);
  with_activation(t.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    plain ? finish_plain<L, T, kActivation>(t) : finish_with<L, T, kActivation>(t);
  });
}

// See GemmHelpers::activation_grad.
template <class L, class T>
void activation_grad(const void* dy_, const void* z_, i64 count, Activation activation, void* dz_) {
  constexpr int W = L::width;
  const T* const dy = static_cast<const T*>(dy_);
  const T* const z = static_cast<const T*>(z_);
  T* const dz = static_cast<T*>(dz_);
  with_activation(activation, [&](auto tag) {
    for (i64 i = 0; i < count; i += W) {
      const Lanes<L> lanes(count - i);
      const auto slope = activate_grad<L, decltype(tag)::value>(lanes.load(z + i));
      lanes.store(dz + i, L::mul(lanes.load(dy + i), slope));
    }
  });
}

// NV vectors of column sums, the last partial where lanes is; see sum_rows.
template <class L, class T, int NV>
FASTDL_INLINE void sum_columns(const T* x, i64 rows, i64 row, i64 col, const Lanes<L>& lanes, float* out,
                               bool accumulate) {
  constexpr int W = L::width;
  constexpr i64 kChunk = 32;
  const auto load = [&](const T* p) {
    if (col == 1) return lanes.load(p);
    float x[W] = {};
    for (int l = 0; l < lanes.n; ++l) x[l] = widen(p[l * col]);
    return L::load(x);
  };
  typename L::V partial[64]
                       [NV];  // partial[d] sums 2^i chunks, i falling with d: the binary digits of the chunks so far
  int depth = 0;
  for (i64 i = 0; i < rows; i += kChunk) {
    const i64 end = i + kChunk < rows ? i + kChunk : rows;
    typename L::V sum[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] = L::zero();
    for (i64 r = i; r < end; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v] = L::add(sum[v], load(x + r * row + v * W * col));
    }
    for (i64 carry = i / kChunk; carry & 1; carry >>= 1) {
      --depth;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v] = L::add(partial[depth][v], sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) partial[depth][v] = sum[v];
    ++depth;
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    auto total = L::zero();
    for (int i = depth; i > 0; --i) total = L::add(total, partial[i - 1][v]);
    lanes.store(out + v * W, accumulate ? L::add(lanes.load(out + v * W), total) : total);
  }
}

// Column sums. Chunks of 32 rows are summed in order and the chunks pairwise, so that the rounding error grows with
// 32 + log2(rows/32) instead of rows (Higham, "The Accuracy of Floating Point Summation", 1993). Four vectors at a
// time: one row after the other is another page, which a single line of each does not pay for.
template <class L, class T>
void sum_rows(const void* source, i64 rows, i64 cols, i64 row, i64 col, float* out, bool accumulate) {
  constexpr int W = L::width, NV = 4;
  const T* const x = static_cast<const T*>(source);
  i64 j = 0;
  for (; j + NV * W <= cols; j += NV * W)
    sum_columns<L, T, NV>(x + j * col, rows, row, col, Lanes<L>(W), out + j, accumulate);
  for (; j < cols; j += W) sum_columns<L, T, 1>(x + j * col, rows, row, col, Lanes<L>(cols - j), out + j, accumulate);
}

template <class L, class T>
constexpr GemmHelpers helpers() {
  return {pack<L, T>, pack<L, T>, finish<L, T>, activation_grad<L, T>, sum_rows<L, T>, {}, {}, {}, {}, {}, {}};
}

}  // namespace
}  // namespace fastdl
