// The vector contract (vec.h) on AVX2 + FMA.
#pragma once
#include <immintrin.h>

#include "simd/vec.h"

namespace fastdl {
namespace {

struct VecAvx2 {
  static constexpr int width = 8;
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
  static FASTDL_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
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
