// The vector contract (vec.h) on AVX-512 (F, DQ, BW, VL).
#pragma once
#include <immintrin.h>

#include "simd/vec.h"

namespace fastdl {
namespace {

struct VecAvx512 {
  static constexpr int width = 16;
  static constexpr bool looks_up = true;
  using V = __m512;
  using M = __mmask16;

  static FASTDL_INLINE V zero() { return _mm512_setzero_ps(); }
  static FASTDL_INLINE V set1(float x) { return _mm512_set1_ps(x); }
  static FASTDL_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static FASTDL_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static FASTDL_INLINE M first(int n) { return static_cast<M>((1u << n) - 1); }
  static FASTDL_INLINE V load(const float* p, M m) { return _mm512_maskz_loadu_ps(m, p); }
  static FASTDL_INLINE void store(float* p, V v, M m) { _mm512_mask_storeu_ps(p, m, v); }

  static constexpr M kAll = 0xffff;
  static FASTDL_INLINE V load(const bf16* p, M m = kAll) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
  static FASTDL_INLINE V load(const f16* p, M m = kAll) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
  static FASTDL_INLINE V load(const std::uint8_t* p, M m = kAll) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p)));
  }
  static FASTDL_INLINE void store(bf16* p, V v, M m = kAll) { _mm256_mask_storeu_epi16(p, m, narrow_bf16(v)); }
  static FASTDL_INLINE void store(f16* p, V v, M m = kAll) {
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // 2 * width elements in order.
  static FASTDL_INLINE __m512i narrow(V x, V y, bf16) {
    const __m512i odd =
        _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0x230021,
                          0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d);
    return _mm512_permutex2var_epi16(rounded_bf16(x), odd, rounded_bf16(y));
  }
  static FASTDL_INLINE __m512i narrow(V x, V y, f16) {
    const __m256i low = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT), 1);
  }
  template <class T>
  static FASTDL_INLINE void store(T* p, V x, V y) {
    _mm512_storeu_si512(p, narrow(x, y, T{}));
  }
  static FASTDL_INLINE __m256i narrow_bf16(V v) {
    const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet));
  }

  // Elements 0, 2, 4.. and 1, 3, 5.. of 2 * width, or those of them that a mask of halves() holds; join rounds as
  // stores do.
  using M2 = __mmask32;
  static FASTDL_INLINE M2 halves(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }  // 0..n-1
  static FASTDL_INLINE void split(const bf16* p, V* even, V* odd) { split(_mm512_loadu_si512(p), even, odd); }
  static FASTDL_INLINE void split(const bf16* p, M2 m, V* even, V* odd) {
    split(_mm512_maskz_loadu_epi16(m, p), even, odd);
  }
  static FASTDL_INLINE void split(__m512i x, V* even, V* odd) {
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static FASTDL_INLINE void join(bf16* p, V even, V odd) { _mm512_storeu_si512(p, joined(even, odd)); }
  static FASTDL_INLINE void join(bf16* p, M2 m, V even, V odd) { _mm512_mask_storeu_epi16(p, m, joined(even, odd)); }
  static FASTDL_INLINE __m512i joined(V even, V odd) {
    const __m512i low = _mm512_srli_epi32(rounded_bf16(even), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, rounded_bf16(odd));
  }
  static FASTDL_INLINE __m512i rounded_bf16(V v) {  // in the upper half of each lane
    const __m512i u = _mm512_castps_si512(v);
    const __m512i bit = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), bit);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    return _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  }

  static FASTDL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static FASTDL_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static FASTDL_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static FASTDL_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
  static FASTDL_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  static FASTDL_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  static FASTDL_INLINE V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static FASTDL_INLINE V scale(V x, V n) { return _mm512_scalef_ps(x, n); }
  static FASTDL_INLINE V select_le_zero(V x, V a, V b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_LE_OQ), b, a);
  }
  static FASTDL_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static FASTDL_INLINE V lookup(const float (&table)[32], V x) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(x), _mm512_load_ps(table + 16));
  }

  static FASTDL_INLINE void transpose(V (&r)[16]) {
    V t[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of floats within 128-bit lanes
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // quads: r[i+j] lane l = column 4l+j of rows i..i+3
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 16; i += 8) {  // lanes of neighbouring quads
      for (int j = 0; j < 4; ++j) {
        t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
        t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
      }
    }
    for (int j = 0; j < 8; ++j) {  // t[j]: columns j and j+8 of rows 0..7, t[j+8]: of rows 8..15
      r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
      r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
  }

  static FASTDL_INLINE __m128 fold(V v) {  // 16 lanes to 4
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  }
  static FASTDL_INLINE void sum4(V a, V b, V c, V d, float* out) {
    _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
  }
  // sum4 of four rows, out_row apart: 20 shuffles for 16 sums, half of those that sum4 takes.
  static FASTDL_INLINE void sum4x4(const V (&x)[4][4], float* out, i64 out_row) {
    V half[4][2], quarter[4];  // of column j: rows 0 and 2, rows 1 and 3 (by 256 bits); all rows (by 128 bits)
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 2; ++i) {
        const V a = x[i == 0 ? 0 : 2][j], b = x[i == 0 ? 1 : 3][j];
        half[j][i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
      }
      quarter[j] = _mm512_add_ps(_mm512_shuffle_f32x4(half[j][0], half[j][1], 0x88),
                                 _mm512_shuffle_f32x4(half[j][0], half[j][1], 0xdd));
    }
    const auto pair = [](V a, V b) __attribute__((always_inline)) {  // a0+a2, a1+a3, b2+b0, b3+b1 of every 128 bits
      return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
    };
    const V even = pair(quarter[0], quarter[1]), odd = pair(quarter[2], quarter[3]);
    const V sums = _mm512_add_ps(_mm512_shuffle_ps(even, odd, 0x88), _mm512_shuffle_ps(even, odd, 0xdd));
    _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(out + out_row, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(out + 2 * out_row, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(out + 3 * out_row, _mm512_extractf32x4_ps(sums, 3));
  }
};

}  // namespace
}  // namespace fastdl
