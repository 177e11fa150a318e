// The contract of a vector level, and its scalar version.
//
// A level is a struct of static functions over a register type V of `width` floats and a mask type M:
//
//   zero() set1(x)
//   load(p) store(p, v)           whole registers, any alignment
//   first(n)                      the mask of lanes 0..n-1, 0 <= n <= width
//   load(p, m) store(p, v, m)     lanes outside the mask are zero / untouched, and their memory is not accessed
//                                 both also for bf16 and f16: widened exactly, rounded to nearest even, NaN kept;
//                                 loads also for std::uint8_t
//   add sub mul div(a, b)
//   fma(a, b, c)                  a*b + c
//   min max(a, b)                 b where either is NaN
//   round(x)                      to the nearest integer
//   scale(x, n)                   x * 2^n, n integral, -150 <= n <= 128
//   select_le_zero(x, a, b)       a where x <= 0, else b
//   looks_up                      whether there is lookup(table, x): of 32 floats those that the lowest five bits of
//                                 each lane of x, as an integer, choose
//   transpose(r)                  V r[width], in place
//   sum4(a, b, c, d, out)         out[0..3] = the four horizontal sums, in a fixed order
//
// Kernels are templates over the level and stand once; everything is in an unnamed namespace, because each
// instruction-set unit must keep its own body (a linker may else pick an AVX-512 body for an AVX2 machine).
#pragma once
#include "base/types.h"

#define FASTDL_INLINE inline __attribute__((always_inline))

namespace fastdl {
namespace {

FASTDL_INLINE unsigned float_bits(float x) {
  unsigned u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
FASTDL_INLINE float float_of(unsigned u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// One element, in integer arithmetic: independent of the machine's level and floating-point state.
FASTDL_INLINE float widen(float x) { return x; }
FASTDL_INLINE float widen(std::uint8_t x) { return static_cast<float>(x); }
FASTDL_INLINE float widen(bf16 x) { return float_of(static_cast<unsigned>(x.bits) << 16); }
FASTDL_INLINE float widen(f16 x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // Inf, NaN (made quiet)
    return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
  if (magnitude < 0x400u)  // subnormal: a multiple of 2^-24
    return float_of(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | (magnitude + (112u << 10)) << 13);
}
FASTDL_INLINE void narrow(float x, float* out) { *out = x; }
FASTDL_INLINE void narrow(float x, bf16* out) {
  const unsigned u = float_bits(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(nan ? u >> 16 | 0x40u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
FASTDL_INLINE void narrow(float x, f16* out) {
  const unsigned u = float_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  unsigned h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and up round to Inf
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 aligns the last bit to 2^-24 and rounds
    h = float_bits(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | h);
}

// Four lanes of the compiler's own vector type, without intrinsics: SSE2 on any x86-64, NEON on aarch64. The reference
// for every other level. (Plain loops over float[4] would be vectorised too, but gcc 12 then loads past their ends.)
struct VecScalar {
  static constexpr int width = 4;
  static constexpr bool looks_up = false;
  typedef float V __attribute__((vector_size(16)));
  using M = int;

  static FASTDL_INLINE V zero() { return V{0, 0, 0, 0}; }
  static FASTDL_INLINE V set1(float x) { return V{x, x, x, x}; }
  static FASTDL_INLINE V load(const float* p) { return load(p, 4); }
  static FASTDL_INLINE void store(float* p, V v) { store(p, v, 4); }
  static FASTDL_INLINE M first(int n) { return n; }
  static FASTDL_INLINE V load(const float* p, M n) {
    V v = zero();
    __builtin_memcpy(&v, p, static_cast<unsigned>(n) * sizeof(float));
    return v;
  }
  static FASTDL_INLINE void store(float* p, V v, M n) {
    __builtin_memcpy(p, &v, static_cast<unsigned>(n) * sizeof(float));
  }
  template <class T>
  static FASTDL_INLINE V load(const T* p, M n = 4) {
    V v = zero();
    for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
    return v;
  }
  template <class T>
  static FASTDL_INLINE void store(T* p, V v, M n = 4) {
    for (int i = 0; i < n; ++i) narrow(v[i], p + i);
  }
  static FASTDL_INLINE V add(V a, V b) { return a + b; }
  static FASTDL_INLINE V sub(V a, V b) { return a - b; }
  static FASTDL_INLINE V mul(V a, V b) { return a * b; }
  static FASTDL_INLINE V div(V a, V b) { return a / b; }
  static FASTDL_INLINE V min(V a, V b) { return a < b ? a : b; }
  static FASTDL_INLINE V max(V a, V b) { return a > b ? a : b; }
  static FASTDL_INLINE V round(V x) {
    for (int i = 0; i < 4; ++i) x[i] = __builtin_nearbyintf(x[i]);
    return x;
  }
  static FASTDL_INLINE V scale(V x, V n) {  // in two steps: 2^-150 and 2^128 are no float32
    for (int i = 0; i < 4; ++i) {
      const int e = n[i] == n[i] ? static_cast<int>(n[i]) : 0, half = e / 2;
      x[i] = x[i] * power_of_two(half) * power_of_two(e - half);
    }
    return x;
  }
  static FASTDL_INLINE float power_of_two(int e) { return float_of(static_cast<unsigned>(e + 127) << 23); }
  static FASTDL_INLINE V select_le_zero(V x, V a, V b) { return x <= 0.0f ? a : b; }
  static FASTDL_INLINE V fma(V a, V b, V c) { return a * b + c; }  // two roundings: fused is a library call here
  static FASTDL_INLINE void transpose(V (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) {
        const float t = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = t;
      }
    }
  }
  static FASTDL_INLINE float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static FASTDL_INLINE void sum4(V a, V b, V c, V d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
};

}  // namespace
}  // namespace fastdl
