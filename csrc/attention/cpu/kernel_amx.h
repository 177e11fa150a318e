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

// x = the sum of the parts, each the rest so far rounded to bfloat16 by the processor, which is half the instructions
// of split (gemm/cpu/kernel_split.h): P and dS are NaN or far from the largest bfloat16. lane: a part in the lower half
// of a lane; as float32 it is that shifted.
FASTDL_INLINE __m512i lane(__m256i part) { return _mm512_cvtepu16_epi32(part); }
FASTDL_INLINE __m512i as_float(__m512i lanes) { return _mm512_slli_epi32(lanes, 16); }
template <int kParts>
FASTDL_INLINE void round_parts(L::V x, __m256i (&out)[kParts]) {
#pragma GCC unroll 3
  for (int p = 0; p < kParts; ++p) {
    out[p] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    if (p + 1 < kParts) x = L::sub(x, _mm512_castsi512_ps(as_float(lane(out[p]))));
  }
}

template <int kParts>
struct PartRows {
  static FASTDL_INLINE void store_parts(float* row, i64 j, const __m256i (&part)[kParts]) {
    bf16* const out = reinterpret_cast<bf16*>(row);
#pragma GCC unroll 3
    for (int p = 0; p < kParts; ++p)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part_at<kParts>(j, p)), part[p]);
  }
  static FASTDL_INLINE void store(float* row, i64 j, L::V v) {
    __m256i part[kParts];
    round_parts(v, part);
    store_parts(row, j, part);
  }
};

// As PairGrads (kernel_backward.h), in parts.
template <int kParts>
struct PartGrads {
  static constexpr int rows = 2;
  static FASTDL_INLINE void store_pairs(float* p, const SoftmaxGradArgs& t, int i, i64 j, const __m256i (&low)[kParts],
                                        const __m256i (&high)[kParts]) {
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      const i64 row = (i / kTileDepth * kParts + part) * 16 + i % kTileDepth / 2;
      const __m512i pair = _mm512_or_si512(lane(low[part]), as_float(lane(high[part])));
      L::store(p + row * t.scores.s_row + j, _mm512_castsi512_ps(pair));
    }
  }
  static FASTDL_INLINE void store_p(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&p)[2]) {
    __m256i low[kParts], high[kParts];
    round_parts(p[0], low);
    round_parts(p[1], high);
    store_pairs(t.p, t, i, j, low, high);
  }
  static FASTDL_INLINE void store_ds(const SoftmaxGradArgs& t, int i, i64 j, const L::V (&ds)[2]) {
    __m256i low[kParts], high[kParts];
    round_parts(ds[0], low);
    round_parts(ds[1], high);
    store_pairs(t.ds, t, i, j, low, high);
    if (i < t.scores.m) PartRows<kParts>::store_parts(t.ds_rows + i * t.rows_step, j, low);
    if (i + 1 < t.scores.m) PartRows<kParts>::store_parts(t.ds_rows + (i + 1) * t.rows_step, j, high);
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
