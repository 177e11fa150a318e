// The tile contract: eight tiles of 16 rows x 64 bytes, products of bfloat16 pairs. Two implementations of one source:
// the processor's, or, built with FASTDL_EMULATE_AMX, a model of it that runs on AVX-512 machines.
//
//   tile_configure()              all eight tiles 16 x 64 bytes; their contents and the shape belong to the thread
//   tile_release()                gives the tiles back: contexts switch without them
//   tile_zero<T>()
//   tile_load<T>(p, step)         rows of 64 bytes, `step` bytes apart
//   tile_stream<T>(p, step)       the same, of what is not needed again soon
//   tile_store<T>(p, step)
//   tile_dpbf16ps<C, A, B>()      C(i,j) += sum_k A(i,2k)*B(k,2j) + A(i,2k+1)*B(k,2j+1): C 16x16 float, A rows of 32
//                                 elements along K, B row k the pair of rows 2k, 2k+1 of the operand
//
// Products and sums are float32, rounded to nearest even; subnormal operands and results are zeros, whatever the
// floating-point state. A call sums the even products in the order of k, the odd ones likewise, then adds the two sums,
// then adds that to C: 16 + 2 roundings (Intel SDM, TDPBF16PS).
#pragma once
#include <immintrin.h>

#include "simd/vec.h"

#ifndef FASTDL_EMULATE_AMX
#define FASTDL_EMULATE_AMX 0
#endif

namespace fastdl {
namespace {

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = 1024;

#if FASTDL_EMULATE_AMX

struct alignas(64) TileState {
  unsigned char tile[8][kTileRows][kTileRowBytes];
};
thread_local TileState g_tiles;

// Not inlined: the compiler may move arithmetic across a write of the control register, but not across a call.
__attribute__((noinline)) void emulate_dpbf16ps(float* c, const unsigned* a, const float* b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < kTileRows; ++i) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k) {
      const __m512i y = _mm512_loadu_si512(b + 16 * k), x = _mm512_set1_epi32(static_cast<int>(a[16 * i + k]));
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
    }
    _mm512_storeu_ps(c + 16 * i, _mm512_add_ps(_mm512_loadu_ps(c + 16 * i), _mm512_add_ps(even, odd)));
  }
}

FASTDL_INLINE void tile_configure() { __builtin_memset(&g_tiles, 0, sizeof g_tiles); }
FASTDL_INLINE void tile_release() { __builtin_memset(&g_tiles, 0xff, sizeof g_tiles); }  // NaN: use after release shows

template <int T>
FASTDL_INLINE void tile_zero() {
  __builtin_memset(g_tiles.tile[T], 0, kTileBytes);
}
template <int T>
FASTDL_INLINE void tile_load(const void* p, i64 step) {
  for (int r = 0; r < kTileRows; ++r)
    __builtin_memcpy(g_tiles.tile[T][r], static_cast<const char*>(p) + r * step, kTileRowBytes);
}
template <int T>
FASTDL_INLINE void tile_stream(const void* p, i64 step) {
  tile_load<T>(p, step);
}
template <int T>
FASTDL_INLINE void tile_store(void* p, i64 step) {
  for (int r = 0; r < kTileRows; ++r)
    __builtin_memcpy(static_cast<char*>(p) + r * step, g_tiles.tile[T][r], kTileRowBytes);
}
template <int C, int A, int B>
FASTDL_INLINE void tile_dpbf16ps() {
  const unsigned state = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // nothing raised, round to nearest even, operands and results flushed
  emulate_dpbf16ps(reinterpret_cast<float*>(g_tiles.tile[C]), reinterpret_cast<const unsigned*>(g_tiles.tile[A]),
                   reinterpret_cast<const float*>(g_tiles.tile[B]));
  _mm_setcsr(state);
}

#else

// In static memory: gcc 12 drops the stores to one on the stack.
struct alignas(64) TileConfig {
  unsigned char palette, start_row, reserved[14];
  unsigned short row_bytes[16];
  unsigned char rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// One instruction each. Assembler text, because the compiler's intrinsics take a literal tile number only, and do not
// say that they read memory.
FASTDL_INLINE void tile_configure() { _tile_loadconfig(&kTileConfig); }
FASTDL_INLINE void tile_release() { _tile_release(); }

template <int T>
FASTDL_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
FASTDL_INLINE void tile_load(const void* p, i64 step) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(step), "i"(T) : "memory");
}
template <int T>
FASTDL_INLINE void tile_stream(const void* p, i64 step) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(step), "i"(T) : "memory");
}
template <int T>
FASTDL_INLINE void tile_store(void* p, i64 step) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(step), "i"(T) : "memory");
}
template <int C, int A, int B>
FASTDL_INLINE void tile_dpbf16ps() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace fastdl
