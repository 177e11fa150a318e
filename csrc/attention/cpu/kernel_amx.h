// P and dS as operands of tiles: rounded to bf16, or split into bf16 parts.
#pragma once
#include "attention/cpu/kernel_backward.h"
#include "gemm/cpu/kernel_amx.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl {
namespace {

// Element j of a row of parts: see layout_a.
template <int kParts>
FASTDL_INLINE i64 part_at(i64 j, int part) {
  return (j / kTileDepth * kParts + part) * kTileDepth + j % kTileDepth;
}

// Whether the parts of x are x rounded once, by the processor: a single one. (P and dS are never near the largest
// bf16.)
template <int kParts>
struct PartRows {
  static FASTDL_INLINE void store(float* row, i64 j, L::V v) {
    bf16* const out = reinterpret_cast<bf16*>(row);
    if constexpr (kParts == 1) {
      VecAvx512Narrow::narrow_pairs(out + j, v);
    } else {
      L::V part[kParts];
      split(v, part);
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part_at<kParts>(j, p)),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(part[p]), 16)));
    }
  }
};

// As PairGrads (kernel_backward.h), in parts.
template <int kParts>
struct PartGrads {
  static constexpr int rows = 2;
  static FASTDL_INLINE float* pair_row(float* p, const SoftmaxGradArgs& t, int i, int part) {
    return p + ((i / kTileDepth * kParts + part) * 16 + i % kTileDepth / 2) * t.scores.s_row;
  }
  static FASTDL_INLINE void store_pairs(float* p, const SoftmaxGradArgs& t, int i, i64 j, const L::V (&low)[kParts],
                                        const L::V (&high)[kParts]) {
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part)
      L::store(pair_row(p, t, i, part) + j,
               _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(bits(low[part]), 16), bits(high[part]))));
  }
  static FASTDL_INLINE void store_row(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&x)[kParts]) {
    bf16* const out = reinterpret_cast<bf16*>(t.ds_rows + i * t.rows_step);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part_at<kParts>(j, part)),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(x[part]), 16)));
  }
  static FASTDL_INLINE void store_p(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&p)[2]) {
    L::V low[kParts], high[kParts];
    split(p[0], low);
    split(p[1], high);
    store_pairs(t.p, t, i, j, low, high);
  }
  static FASTDL_INLINE void store_ds(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&ds)[2]) {
    L::V low[kParts], high[kParts];
    split(ds[0], low);
    split(ds[1], high);
    store_pairs(t.ds, t, i, j, low, high);
    if (i < t.scores.m) store_row(t, i, j, low);
    if (i + 1 < t.scores.m) store_row(t, i + 1, j, high);
  }
};
template <>
struct PartGrads<1> {
  static constexpr int rows = 2;
  static FASTDL_INLINE void store_p(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&p)[2]) {
    L::store(t.p + i / 2 * t.scores.s_row + j, VecAvx512Narrow::narrow_pair(p[0], p[1]));
  }
  static FASTDL_INLINE void store_ds(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&ds)[2]) {
    L::store(t.ds + i / 2 * t.scores.s_row + j, VecAvx512Narrow::narrow_pair(ds[0], ds[1]));
    for (int r = 0; r < 2; ++r)
      if (i + r < t.scores.m) PartRows<1>::store(t.ds_rows + (i + r) * t.rows_step, j, ds[r]);
  }
};

// See AttentionGradOps::turn.
inline void turn(const float* src, i64 src_row, int m, int n, float* dst, i64 dst_row) {
  for (int i = 0; i < m; i += 16)
    for (int j = 0; j < n; j += 16) {
      L::V r[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) r[k] = L::load(src + (j + k) * src_row + i);
      L::transpose(r);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) L::store(dst + (i + k) * dst_row + j, r[k]);
    }
}

// No decode: it waits for memory, whatever multiplies.
template <class T, int kParts>
constexpr AttentionOps attention_part_ops() {
  using Rows = PartRows<kParts>;
  return {nullptr,
          nullptr,
          nullptr,
          {softmax<L, Rows, NoMask>, softmax<L, Rows, std::uint8_t>, softmax<L, Rows, float>, softmax<L, Rows, T>},
          attention_finish<L, T>};
}

template <class T, int kParts>
constexpr AttentionGradOps attention_part_grads() {
  AttentionGradOps ops = attention_grad_ops<L, PartGrads<kParts>, T>();
  ops.turn = turn;
  return ops;
}

}  // namespace
}  // namespace fastdl
