// Pairs of bfloat16 on AVX-512-BF16. A 32-bit lane of an operand holds two bf16 that follow each other along K; fma
// multiplies both pairs and adds the two products: acc + x0*y0 + x1*y1, in float32. The processor flushes subnormal
// operands and results to zero here, whatever the floating-point state.
#pragma once
#include "simd/vec_avx512.h"

namespace fastdl {
namespace {

// As VecAvx512, with the processor's own rounding to bf16 for operands of products: subnormals become zero.
struct VecAvx512Narrow : VecAvx512 {
  static FASTDL_INLINE void narrow_pairs(bf16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  // Lane j: x[j] below, y[j] above.
  static FASTDL_INLINE V narrow_pair(V x, V y) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

// As VecAvx512, results narrowed by the processor, too: subnormals become zero.
struct VecAvx512Flushing : VecAvx512 {
  using VecAvx512::store;
  static FASTDL_INLINE void store(bf16* p, V v, M m = kAll) {
    _mm256_mask_storeu_epi16(p, m, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

// As VecAvx512, two vectors at a time narrowed by the processor, which rounds them alike where nothing is subnormal.
struct VecAvx512Rounding : VecAvx512 {
  using VecAvx512::store;
  static FASTDL_INLINE void store(bf16* p, V x, V y) {
    constexpr int kSubnormal = 0x20;
    const int some = _mm512_fpclass_ps_mask(x, kSubnormal) | _mm512_fpclass_ps_mask(y, kSubnormal);
    if (__builtin_expect(some, 0)) return VecAvx512::store(p, x, y);
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
  }
};

struct VecAvx512Bf16 : VecAvx512 {
  static FASTDL_INLINE V fma(V x, V y, V acc) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }

  // Lane j: x[j] below, y[j] above, j in the mask.
  static FASTDL_INLINE V pair(const bf16* x, const bf16* y, M m) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, y));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // Widened elements as the first of pairs, the second zero; and such pairs with widened elements as their second.
  static FASTDL_INLINE V low(V x) { return _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(x), 16)); }
  static FASTDL_INLINE V join(V pairs, V y) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(pairs), _mm512_castps_si512(y)));
  }
  // pair of 32 elements each, in order.
  static FASTDL_INLINE void interleave(const bf16* x, const bf16* y, V* low, V* high) {
    const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Lane j of an index: element j of a below, of b (those from 32 on) above.
    const __m512i first = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x00100010));
    *low = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first, b));
    *high = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, second, b));
  }
  // Two rows of 32 elements x and y to pairs (x[j], y[j]): columns 0-3 and 4-7 of every 8 in one register each; and two
  // registers of sums over such pairs back to columns 0-15 and 16-31.
  static FASTDL_INLINE void interleave(V* x, V* y) {
    const __m512i a = _mm512_castps_si512(*x), b = _mm512_castps_si512(*y);
    *x = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
    *y = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
  }
  static FASTDL_INLINE void in_order(V* low, V* high) {
    const V a = _mm512_shuffle_f32x4(*low, *high, 0x44), b = _mm512_shuffle_f32x4(*low, *high, 0xee);
    *low = _mm512_shuffle_f32x4(a, a, 0xd8);
    *high = _mm512_shuffle_f32x4(b, b, 0xd8);
  }
  // 32 consecutive elements as pairs; the first n <= 32, zeros behind.
  static FASTDL_INLINE V pairs(const bf16* x) { return _mm512_loadu_ps(x); }
  static FASTDL_INLINE V pairs(const bf16* x, int n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((std::uint64_t{1} << n) - 1), x));
  }
};

}  // namespace
}  // namespace fastdl
