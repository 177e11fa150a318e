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
  // The first n <= 32 of consecutive elements as pairs, zeros behind.
  static FASTDL_INLINE V pairs(const bf16* x, int n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((std::uint64_t{1} << n) - 1), x));
  }
};

}  // namespace
}  // namespace fastdl
