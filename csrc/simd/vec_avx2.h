// The vector contract (vec.h) on AVX2 + FMA.
#pragma once
#include <immintrin.h>

#include "simd/vec.h"

namespace fastdl {
namespace {

struct VecAvx2 {
  static constexpr int width = 8;
  static constexpr bool looks_up = false;
  using V = __m256;
  using M = __m256i;

  static FASTDL_INLINE V zero() { return _mm256_setzero_ps(); }
  static FASTDL_INLINE V set1(float x) { return _mm256_set1_ps(x); }
  static FASTDL_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static FASTDL_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static FASTDL_INLINE M first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTDL_INLINE V load(const float* p, M m) { return _mm256_maskload_ps(p, m); }
  static FASTDL_INLINE void store(float* p, V v, M m) { _mm256_maskstore_ps(p, m, v); }

  static FASTDL_INLINE V load(const bf16* p) { return widen_bf16(load16(p)); }
  static FASTDL_INLINE V load(const bf16* p, M m) { return widen_bf16(load16(p, m)); }
  static FASTDL_INLINE V load(const f16* p) { return _mm256_cvtph_ps(load16(p)); }
  static FASTDL_INLINE V load(const f16* p, M m) { return _mm256_cvtph_ps(load16(p, m)); }
  static FASTDL_INLINE V load(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static FASTDL_INLINE V load(const std::uint8_t* p, M m) {
    std::uint8_t x[8] = {};
    for (int i = 0, n = lanes(m); i < n; ++i) x[i] = p[i];
    return load(x);
  }
  static FASTDL_INLINE void store(bf16* p, V v) { store16(p, narrow_bf16(v)); }
  static FASTDL_INLINE void store(bf16* p, V v, M m) { store16(p, narrow_bf16(v), m); }
  static FASTDL_INLINE void store(f16* p, V v) { store16(p, narrow_f16(v)); }
  static FASTDL_INLINE void store(f16* p, V v, M m) { store16(p, narrow_f16(v), m); }

  static FASTDL_INLINE int lanes(M m) { return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
  static FASTDL_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static FASTDL_INLINE __m128i load16(const void* p, M m) {  // no masked loads of 16 bits here
    std::uint16_t x[8] = {};
    for (int i = 0, n = lanes(m); i < n; ++i) x[i] = static_cast<const std::uint16_t*>(p)[i];
    return load16(x);
  }
  static FASTDL_INLINE void store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static FASTDL_INLINE void store16(void* p, __m128i v, M m) {
    std::uint16_t x[8];
    store16(x, v);
    for (int i = 0, n = lanes(m); i < n; ++i) static_cast<std::uint16_t*>(p)[i] = x[i];
  }
  static FASTDL_INLINE V widen_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static FASTDL_INLINE __m128i narrow_bf16(V v) {
    const __m256i u = _mm256_castps_si256(v), high = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i x = _mm256_blendv_epi8(even, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  }
  static FASTDL_INLINE __m128i narrow_f16(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  // Elements 0, 2, 4.. and 1, 3, 5.. of 2 * width, or those of them that a mask of halves() holds; join rounds as
  // stores do.
  struct M2 {
    int n;
    __m256i pairs, last;  // 32-bit lanes held whole, and the one whose first half is
  };
  static FASTDL_INLINE M2 halves(int n) {  // 0..n-1, n <= 16
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), whole = _mm256_set1_epi32(n / 2);
    const __m256i odd = _mm256_set1_epi32(n % 2 ? n / 2 : -1);
    return {n, _mm256_cmpgt_epi32(whole, lane), _mm256_cmpeq_epi32(odd, lane)};
  }
  static FASTDL_INLINE void split(const bf16* p, V* even, V* odd) {
    split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), even, odd);
  }
  static FASTDL_INLINE void split(const bf16* p, const M2& m, V* even, V* odd) {
    const __m256i x = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), m.pairs);
    split(m.n % 2 ? _mm256_blendv_epi8(x, _mm256_set1_epi32(p[m.n - 1].bits), m.last) : x, even, odd);
  }
  static FASTDL_INLINE void split(__m256i x, V* even, V* odd) {
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static FASTDL_INLINE void join(bf16* p, V even, V odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), joined(even, odd));
  }
  static FASTDL_INLINE void join(bf16* p, const M2& m, V even, V odd) {
    const __m256i x = joined(even, odd);
    _mm256_maskstore_epi32(reinterpret_cast<int*>(p), m.pairs, x);
    if (m.n % 2 == 0) return;
    const __m256i last = _mm256_permutevar8x32_epi32(x, _mm256_set1_epi32(m.n / 2));
    p[m.n - 1].bits = static_cast<std::uint16_t>(_mm256_cvtsi256_si32(last));
  }
  static FASTDL_INLINE __m256i joined(V even, V odd) {
    const __m256i low = _mm256_srli_epi32(rounded_bf16(even), 16);
    return _mm256_blend_epi16(low, rounded_bf16(odd), 0xaa);
  }
  static FASTDL_INLINE __m256i rounded_bf16(V v) {  // in the upper half of each lane
    const __m256i u = _mm256_castps_si256(v);
    const __m256i bit = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), bit);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(even, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }

  static FASTDL_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static FASTDL_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static FASTDL_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static FASTDL_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
  static FASTDL_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  static FASTDL_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  static FASTDL_INLINE V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static FASTDL_INLINE V scale(V x, V n) {  // in two steps: 2^-150 and 2^128 are no float32
    const __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(e, half)));
  }
  static FASTDL_INLINE V power_of_two(__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  }
  static FASTDL_INLINE V select_le_zero(V x, V a, V b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_LE_OQ));
  }
  static FASTDL_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

  static FASTDL_INLINE void transpose(V (&r)[8]) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {  // pairs of floats within 128-bit lanes
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // quads
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // lanes
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

  static FASTDL_INLINE void sum4(V a, V b, V c, V d, float* out) {
    const V ab = _mm256_hadd_ps(a, b), cd = _mm256_hadd_ps(c, d);
    const V abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
};

}  // namespace
}  // namespace fastdl
