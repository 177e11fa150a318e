// The contract of a vector level, and its scalar version.
//
// A level is a struct of static functions over a register type V of `width` floats and a mask type M:
//   zero() set1(x) load(p) store(p, v)          whole registers, any alignment
//   first(n)                                    the mask of lanes 0..n-1, 0 <= n <= width
//   load(p, m) store(p, v, m)                   masked: lanes outside are zero / untouched, their memory is not accessed
//   add(a, b)  fma(a, b, c) = a*b + c
//   transpose(r)                                V r[width], in place
//   sum4(a, b, c, d, out)                       out[0..3] = the four horizontal sums, in a fixed order
// Kernels are templates over the level and stand once; everything is in an unnamed namespace, because each
// instruction-set unit must keep its own body (a linker may else pick an AVX-512 body for an AVX2 machine).
#pragma once
#include "base/types.h"

#define FASTDL_INLINE inline __attribute__((always_inline))

namespace fastdl {
namespace {

// Four lanes in plain C++: the reference for every other level, and what compilers turn into SSE2 or NEON.
struct VecScalar {
  static constexpr int width = 4;
  struct V {
    float x[4];
  };
  using M = int;

  static FASTDL_INLINE V zero() { return {{0, 0, 0, 0}}; }
  static FASTDL_INLINE V set1(float x) { return {{x, x, x, x}}; }
  static FASTDL_INLINE V load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static FASTDL_INLINE void store(float* p, V v) {
    for (int i = 0; i < 4; ++i) p[i] = v.x[i];
  }
  static FASTDL_INLINE M first(int n) { return n; }
  static FASTDL_INLINE V load(const float* p, M n) {
    V v = zero();
    for (int i = 0; i < n; ++i) v.x[i] = p[i];
    return v;
  }
  static FASTDL_INLINE void store(float* p, V v, M n) {
    for (int i = 0; i < n; ++i) p[i] = v.x[i];
  }
  static FASTDL_INLINE V add(V a, V b) {
    for (int i = 0; i < 4; ++i) a.x[i] += b.x[i];
    return a;
  }
  static FASTDL_INLINE V fma(V a, V b, V c) {  // two roundings: a fused one is a library call below AVX2
    for (int i = 0; i < 4; ++i) c.x[i] += a.x[i] * b.x[i];
    return c;
  }
  static FASTDL_INLINE void transpose(V (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) {
        const float t = r[i].x[j];
        r[i].x[j] = r[j].x[i];
        r[j].x[i] = t;
      }
    }
  }
  static FASTDL_INLINE void sum4(V a, V b, V c, V d, float* out) {
    const V* v[4] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) out[i] = (v[i]->x[0] + v[i]->x[2]) + (v[i]->x[1] + v[i]->x[3]);
  }
};

}  // namespace
}  // namespace fastdl
