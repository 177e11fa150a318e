// Decode on levels that multiply pairs of bf16: K and V in place, P as pairs.
#pragma once
#include "attention/cpu/kernel.h"

namespace fastdl {
namespace {

// As decode_scores (kernel.h): pairs along d.
template <class L, int MR>
void decode_scores_pairs_rows(const DecodeScoresArgs& t, int row, int begin, int end) {
  constexpr int W = 2 * L::width, NR = 4;
  const bf16* const q = static_cast<const bf16*>(t.q) + row * t.q_row;
  float* const s = t.s + row * t.s_row;
  const i64 ahead = decode_ahead<bf16>(t.k_row, t.d);
  for (int j = begin; j < end; j += NR) {
    const bf16* k[NR];
    for (int l = 0; l < NR; ++l) k[l] = static_cast<const bf16*>(t.k) + (j + l < t.n ? j + l : t.n - 1) * t.k_row;
    if (row == 0) {
      for (int l = 0; l < NR; ++l) prefetch_row(k[l] + ahead, t.d);
    }
    typename L::V acc[MR][NR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < NR; ++l) acc[i][l] = L::zero();
    const auto step = [&](auto load) __attribute__((always_inline)) {
      typename L::V x[NR];
#pragma GCC unroll 4
      for (int l = 0; l < NR; ++l) x[l] = load(k[l]);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const auto y = load(q + i * t.q_row);
#pragma GCC unroll 4
        for (int l = 0; l < NR; ++l) acc[i][l] = L::fma(y, x[l], acc[i][l]);
      }
    };
    int d = 0;
    for (; d + W <= t.d; d += W) {
      step([&](const bf16* p) __attribute__((always_inline)) { return L::pairs(p + d); });
    }
    if (d < t.d) {
      step([&](const bf16* p) __attribute__((always_inline)) { return L::pairs(p + d, t.d - d); });
    }
    decode_sums<L>(acc, s + j, t.s_row);
  }
}

template <class L>
void decode_scores_pairs(const DecodeScoresArgs& t) {
  for (int begin = 0; begin < t.n; begin += kDecodeKeys) {
    const int end = begin + kDecodeKeys < t.n ? begin + kDecodeKeys : t.n;
    int row = 0;
    for (; row + 4 <= t.m; row += 4) decode_scores_pairs_rows<L, 4>(t, row, begin, end);
    if (row + 2 <= t.m) decode_scores_pairs_rows<L, 2>(t, row, begin, end), row += 2;
    if (row < t.m) decode_scores_pairs_rows<L, 1>(t, row, begin, end);
  }
}

// As decode_values: pairs along the keys, the rows of V interleaved in registers. Each 2 kDecodeKeys keys are summed
// afresh and added to o, which also puts the columns back in order. Registers: 16 sums + 4 of V + 1 of P.
template <class L, int MR, int NP, bool kTail>
FASTDL_INLINE void decode_values_pairs_tile(const DecodeValuesArgs& t, int row, int column, int begin, int end) {
  constexpr int W = L::width;
  const int left = t.dv - column, last = left < NP * 2 * W ? left - (NP - 1) * 2 * W : 2 * W;
  const i64 ahead = decode_ahead<bf16>(t.v_row, t.dv);
  typename L::V acc[MR][2 * NP];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < 2 * NP; ++v) acc[i][v] = L::zero();
  for (int j = begin; j < end; j += 2) {
    const bf16* const p = static_cast<const bf16*>(t.v) + j * t.v_row + column;
    const bool odd = j + 1 == t.n;
    if (row == 0 && column == 0) {
      prefetch_row(p + ahead, t.dv);
      prefetch_row(p + ahead + t.v_row, t.dv);
    }
    typename L::V x[2 * NP];
#pragma GCC unroll 4
    for (int v = 0; v < NP; ++v) {
      const auto load = [&](const bf16* from) __attribute__((always_inline)) {
        return kTail && v == NP - 1 ? L::pairs(from + v * 2 * W, last) : L::pairs(from + v * 2 * W);
      };
      x[2 * v] = load(p);
      x[2 * v + 1] = odd ? L::zero() : load(p + t.v_row);
      L::interleave(&x[2 * v], &x[2 * v + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const auto y = L::set1(t.p[(row + i) * t.p_row + j / 2]);
#pragma GCC unroll 4
      for (int v = 0; v < 2 * NP; ++v) acc[i][v] = L::fma(y, x[v], acc[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    float* const o = t.o + (row + i) * t.o_row + column;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * NP; v += 2) {
      L::in_order(&acc[i][v], &acc[i][v + 1]);
#pragma GCC unroll 2
      for (int u = v; u < v + 2; ++u) {
        if (u * W >= left) continue;
        L::store(o + u * W, begin == 0 ? acc[i][u] : L::add(L::load(o + u * W), acc[i][u]));
      }
    }
  }
}

template <class L, int MR>
void decode_values_pairs_rows(const DecodeValuesArgs& t, int row, int begin, int end) {
  constexpr int W = 2 * L::width;
  int column = 0;
  for (; column + 2 * W <= t.dv; column += 2 * W) decode_values_pairs_tile<L, MR, 2, false>(t, row, column, begin, end);
  if (column + W < t.dv) {
    decode_values_pairs_tile<L, MR, 2, true>(t, row, column, begin, end);
  } else if (column < t.dv) {
    decode_values_pairs_tile<L, MR, 1, true>(t, row, column, begin, end);
  }
}

template <class L>
void decode_values_pairs(const DecodeValuesArgs& t) {
  constexpr int kKeys = 2 * kDecodeKeys;  // of half the bytes
  for (int begin = 0; begin < t.n; begin += kKeys) {
    const int end = begin + kKeys < t.n ? begin + kKeys : t.n;
    int row = 0;
    for (; row + 4 <= t.m; row += 4) decode_values_pairs_rows<L, 4>(t, row, begin, end);
    for (; row < t.m; ++row) decode_values_pairs_rows<L, 1>(t, row, begin, end);
  }
}

// Plain: the level in which fma is what it says.
template <class L, class Plain>
constexpr AttentionOps attention_pair_ops() {
  AttentionOps ops = attention_ops<Plain, PairRows<Plain>, bf16, 4, 4>();
  ops.scores = decode_scores_pairs<L>;
  ops.values = decode_values_pairs<L>;
  return ops;
}

}  // namespace
}  // namespace fastdl
