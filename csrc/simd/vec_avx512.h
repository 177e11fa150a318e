// The vector contract (vec.h) on AVX-512 (F, DQ, BW, VL).
#pragma once
#include <immintrin.h>

#include "simd/vec.h"

namespace fastdl {
namespace {

struct VecAvx512 {
  static constexpr int width = 16;
  using V = __m512;
  using M = __mmask16;

  static FASTDL_INLINE V zero() { return _mm512_setzero_ps(); }
  static FASTDL_INLINE V set1(float x) { return _mm512_set1_ps(x); }
  static FASTDL_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static FASTDL_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static FASTDL_INLINE M first(int n) { return static_cast<M>((1u << n) - 1); }
  static FASTDL_INLINE V load(const float* p, M m) { return _mm512_maskz_loadu_ps(m, p); }
  static FASTDL_INLINE void store(float* p, V v, M m) { _mm512_mask_storeu_ps(p, m, v); }
  static FASTDL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static FASTDL_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

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
};

}  // namespace
}  // namespace fastdl
