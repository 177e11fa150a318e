// The contract of a vector level, and its scalar version.
//
// A level is a struct of static functions over a register type V of `width` floats and a mask type M:
//
//   zero() set1(x)
//   load(p) store(p, v)           whole registers, any alignment
//   first(n)                      the mask of lanes 0..n-1, 0 <= n <= width
//   load(p, m) store(p, v, m)     lanes outside the mask are zero / untouched, and their memory is not accessed
//   add(a, b)
//   fma(a, b, c)                  a*b + c
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

// Four lanes of the compiler's own vector type, without intrinsics: SSE2 on any x86-64, NEON on aarch64. The reference
// for every other level. (Plain loops over float[4] would be vectorised too, but gcc 12 then loads past their ends.)
struct VecScalar {
  static constexpr int width = 4;
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
  static FASTDL_INLINE V add(V a, V b) { return a + b; }
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
