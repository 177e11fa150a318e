// Operands of tile products: float32 and float16 are split into bfloat16 parts while they are packed.
//
// A packed panel, mr rows of A or nr columns of B, is a run of tiles (simd/tile_amx.h) in the order of their use:
//   [ceil(K/32)][part][panel/16][16][16] pairs of bf16 along K      A tile: [row][pair]      B tile: [pair][column]
// 64 rows of A are two panels of 32, one behind the other.
#pragma once
#include "gemm/cpu/kernel.h"
#include "simd/tile_amx.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl {
namespace {

using L = VecAvx512;

constexpr int kTileDepth = 32;  // elements along K in a tile
constexpr int kTileFloats = 256;
constexpr int kBlock = 32;  // rows and columns of a block: two tiles each

// --- splitting -----------------------------------------------------------------------------------------------------
// How a vector of operands becomes tile rows of pairs: row() takes 32 elements that follow each other along K, pair()
// two vectors that do, lane by lane. Both give one vector of pairs a part, and collect the largest magnitudes.

// bfloat16 as it is.
struct Whole {
  static constexpr int parts = 1;
  static constexpr bool limited = false, as_it_lies = true;
  static FASTDL_INLINE void row(const bf16* x, int n, L::V (&out)[1], L::V*) {
    out[0] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((std::uint64_t{1} << n) - 1), x));
  }
  static FASTDL_INLINE void pair(const bf16* x, const bf16* y, L::M m, L::V (&out)[1], L::V*) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x));
    const __m512i high = y ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, y)) : _mm512_setzero_si512();
    out[0] = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

FASTDL_INLINE __m512i bits(L::V x) { return _mm512_castps_si512(x); }
FASTDL_INLINE __m512i magnitude(L::V x) { return _mm512_and_si512(bits(x), _mm512_set1_epi32(0x7fffffff)); }

// x = out[0] + out[1] + ..., each the rest so far rounded to bfloat16, to nearest even; the parts keep their place in
// the upper half of a lane. Three parts hold any float32 exactly, as far as they are normal numbers. Inf, NaN and what
// would round to Inf are cut off instead, Inf and NaN without further parts, so that the sum of the parts is x again.
constexpr int kRoundsToInfinity = 0x7f7f8000;
template <int kParts>
FASTDL_INLINE void split(L::V x, L::V (&out)[kParts]) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x7fff);
#pragma GCC unroll 3
  for (int p = 0; p < kParts; ++p) {
    const __m512i u = bits(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i part = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(u, half), odd), high);
    if (p == 0) {
      const auto large = _mm512_cmpge_epu32_mask(magnitude(x), _mm512_set1_epi32(kRoundsToInfinity));
      if (__builtin_expect(large, 0)) {
        const auto nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        part = _mm512_mask_and_epi32(part, large, u, high);
        part = _mm512_mask_or_epi32(part, nan, part, _mm512_set1_epi32(0x400000));
        const auto finite = _mm512_cmplt_epu32_mask(magnitude(x), _mm512_set1_epi32(0x7f800000));
        out[p] = _mm512_castsi512_ps(part);
        x = _mm512_maskz_sub_ps(finite, x, out[p]);  // Inf - Inf would be NaN
        continue;
      }
    }
    out[p] = _mm512_castsi512_ps(part);
    x = L::sub(x, out[p]);
  }
}

// Two vectors in parts, by the processor's own rounding: lane for lane in out[p], those of x in its lower half. Where
// nothing is large: see split. It flushes subnormals, which tile products do not see either.
template <int kParts>
FASTDL_INLINE void split_pairs(L::V x, L::V y, __m512i (&out)[kParts]) {
#pragma GCC unroll 3
  for (int p = 0; p < kParts; ++p) {
    out[p] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
    if (p + 1 == kParts) break;
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(out[p]));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(out[p], 1));
    x = L::sub(x, _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
    y = L::sub(y, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
  }
}

template <int kParts>
struct Parts {
  static constexpr int parts = kParts;
  static constexpr bool limited = true, as_it_lies = false;
  template <class T>
  static FASTDL_INLINE void row(const T* x, int n, L::V (&out)[kParts], L::V* peak) {
    const auto x0 = L::load(x, L::first(n < 16 ? n : 16));
    const auto x1 = n > 16 ? L::load(x + 16, L::first(n - 16)) : L::zero();
    __m512i parts[kParts];
    in_parts(x0, x1, parts, peak);
#pragma GCC unroll 3
    for (int p = 0; p < kParts; ++p) out[p] = _mm512_castsi512_ps(parts[p]);
  }
  template <class T>
  static FASTDL_INLINE void pair(const T* x, const T* y, L::M m, L::V (&out)[kParts], L::V* peak) {
    const auto x0 = L::load(x, m);
    const auto x1 = y ? L::load(y, m) : L::zero();
    __m512i parts[kParts];
    in_parts(x0, x1, parts, peak);
    const __m512i order =
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
#pragma GCC unroll 3
    for (int p = 0; p < kParts; ++p) out[p] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, parts[p]));
  }
  static FASTDL_INLINE void in_parts(L::V x, L::V y, __m512i (&out)[kParts], L::V* peak) {
    const __m512i most = _mm512_max_epu32(magnitude(x), magnitude(y));
    *peak = _mm512_castsi512_ps(_mm512_max_epu32(bits(*peak), most));
    if (__builtin_expect(_mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(kRoundsToInfinity)), 0)) {
      L::V low[kParts], high[kParts];
      split(x, low);
      split(y, high);
      for (int p = 0; p < kParts; ++p)
        out[p] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(low[p]), 16))),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(high[p]), 16)), 1);
      return;
    }
    split_pairs(x, y, out);
  }
  static FASTDL_INLINE void raise(L::V* peak, L::V x) {
    *peak = _mm512_castsi512_ps(_mm512_max_epu32(bits(*peak), magnitude(x)));
  }
};

// --- packing -------------------------------------------------------------------------------------------------------
// One tile of each part: 16 lines (rows of A, columns of B), n <= 32 elements along K. Rows of A that are contiguous
// along K are tile rows as they lie; so are, turned, columns of B. The other way round elements are paired first.
template <class T, class S, bool kIsA>
FASTDL_INLINE void pack_tile(const T* src, i64 k_step, i64 j_step, int n, int lines, float* dst, i64 part, L::V* peak,
                             i64 row = 16, int rows = 16) {
  L::V r[S::parts][16], x[S::parts];
  const bool along_k = k_step == 1;
  if (along_k && kIsA && lines == 16 && rows == 16) {  // nothing to turn: 500 -> 420 cycles for three parts of 32 x 32
    for (int j = 0; j < 16; ++j) {
      S::row(src + j * j_step, n, x, peak + j);
#pragma GCC unroll 3
      for (int p = 0; p < S::parts; ++p) L::store(dst + p * part + row * j, x[p]);
    }
    return;
  }
  if (along_k) {
    for (int j = 0; j < 16; ++j) {
      if (j < lines) {
        S::row(src + j * j_step, n, x, peak + j);
      } else {
        for (auto& v : x) v = L::zero();
      }
      for (int p = 0; p < S::parts; ++p) r[p][j] = x[p];
    }
  } else {
    const auto mask = L::first(lines);
    for (int k = 0; k < kTileDepth; k += 2) {
      if (k >= n) {
        for (auto& v : x) v = L::zero();
      } else if (j_step == 1) {
        S::pair(src + k * k_step, k + 1 < n ? src + (k + 1) * k_step : nullptr, mask, x, peak);
      } else {
        T low[16] = {}, high[16] = {};
        for (int j = 0; j < lines; ++j) {
          low[j] = src[k * k_step + j * j_step];
          if (k + 1 < n) high[j] = src[(k + 1) * k_step + j * j_step];
        }
        S::pair(low, high, mask, x, peak);
      }
      for (int p = 0; p < S::parts; ++p) r[p][k / 2] = x[p];
    }
  }
  for (int p = 0; p < S::parts; ++p) {
    if (along_k != kIsA) L::transpose(r[p]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < rows) L::store(dst + p * part + row * i, r[p][i]);
  }
}

// Tiles of n <= 16 lines one behind the other along K, `part` floats from part to part; peak: see PackFunction.
template <class T, class S, bool kIsA>
FASTDL_INLINE void pack_lines(const T* src, i64 k_step, i64 j_step, i64 k_count, int n, i64 part, float* dst,
                              float* peak) {
  L::V peaks[16];
  for (auto& v : peaks) v = L::zero();
  for (i64 k = 0; k < k_count; k += kTileDepth) {
    const int depth = k_count - k < kTileDepth ? static_cast<int>(k_count - k) : kTileDepth;
    float* const out = dst + k / kTileDepth * S::parts * part;
    pack_tile<T, S, kIsA>(src + k * k_step, k_step, j_step, depth, n, out, part, peaks);
  }
  if (!S::limited || !peak || n == 0) return;
  if (k_step == 1) {  // peaks[j]: of line j, lane by lane; else peaks[0] holds a line a lane
    float largest[16];
    for (int i = 0; i < 16; ++i) largest[i] = float_of(_mm512_reduce_max_epu32(bits(peaks[i])));
    peaks[0] = L::load(largest);
  }
  const auto mask = L::first(n);
  Parts<1>::raise(&peaks[0], L::load(peak, mask));
  L::store(peak, peaks[0], mask);
}

// See PackFunction. Tiles of A past its last row are not written: nobody reads them.
template <class T, class S, bool kIsA>
void pack_tiles(const void* source, i64 k_step, i64 j_step, i64 k_count, int n, int panel, float* dst, float* peak) {
  const T* const src = static_cast<const T*>(source);
  const i64 tiles = panel < kBlock ? 1 : 2, part = tiles * kTileFloats;
  const i64 steps = (k_count + kTileDepth - 1) / kTileDepth * S::parts;
  for (int j = 0; j < (kIsA ? n : panel); j += 16) {
    const int lines = n - j < 0 ? 0 : n - j < 16 ? n - j : 16;
    pack_lines<T, S, kIsA>(src + j * j_step, k_step, j_step, k_count, lines, part,
                           dst + j / kBlock * steps * part + j / 16 % tiles * kTileFloats, peak ? peak + j : nullptr);
  }
}

}  // namespace
}  // namespace fastdl
