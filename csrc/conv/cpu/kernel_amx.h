// Dense convolution on tiles (gemm/cpu/kernel_amx.h): the image is copied as rows of bfloat16 parts, of which tiles are
// gathered.
#pragma once
#include "conv/cpu/kernel.h"
#include "gemm/cpu/kernel_amx.h"
#include "gemm/cpu/kernel_pairs.h"

namespace fastdl {
namespace {

// See ConvFunctions::gather: panels of 32 rows, [16 floats of the runs][32][16].
inline void conv_gather(const ConvTileArgs& t, float* panel) {
  for (int i = 0; i < t.m; i += kBlock) {
    const int m = t.m - i < kBlock ? t.m - i : kBlock;
    for (i64 r = 0; r < t.run_count; ++r) {
      for (i64 k = t.runs[r]; k < t.runs[r] + t.run; k += 16, panel += 16 * kBlock)
        for (int j = 0; j < m; ++j) L::store(panel + 16 * j, L::load(t.rows[i + j] + k));
    }
  }
}

// See ConvBandArgs.
template <class T, class S>
void conv_band_tiles(const ConvBandArgs& t) {
  const T* const src = static_cast<const T*>(t.src);
  if (S::as_it_lies && t.c_step == 1 && t.channels % kTileDepth == 0) {
    for (i64 p = 0; p < t.pixels; ++p) {
      const T* const s = src + p * t.pixel_step;
      for (i64 c = 0; c < t.channels; c += kTileDepth)
        _mm512_storeu_si512(t.dst + p * t.row + c / 2, _mm512_loadu_si512(s + c));
    }
    return;
  }
  for (i64 p = 0; p < t.pixels; p += 16) {
    const int lines = t.pixels - p < 16 ? static_cast<int>(t.pixels - p) : 16;
    L::V peaks[16];
    for (auto& v : peaks) v = L::zero();
    for (i64 c = 0; c < t.channels; c += kTileDepth) {
      const int depth = t.channels - c < kTileDepth ? static_cast<int>(t.channels - c) : kTileDepth;
      pack_tile<T, S, true>(src + p * t.pixel_step + c * t.c_step, t.c_step, t.pixel_step, depth, lines,
                            t.dst + p * t.row + c / kTileDepth * S::parts * 16, 16, peaks, t.row, lines);
    }
    if (!S::limited || !t.peak) continue;
    if (t.c_step == 1) {  // see pack_tiles
      float largest[16];
      for (int i = 0; i < 16; ++i) largest[i] = float_of(_mm512_reduce_max_epu32(bits(peaks[i])));
      peaks[0] = L::load(largest);
    }
    const auto mask = L::first(lines);
    Parts<1>::raise(&peaks[0], L::load(t.peak + p, mask));
    L::store(t.peak + p, peaks[0], mask);
  }
}

// See ConvPackArgs. Blocks of 16 columns x 16 weights are turned; a pair gets its second half in a second visit.
template <class T, class S>
void conv_pack_tiles(const ConvPackArgs& t) {
  const T* const src = static_cast<const T*>(t.src);
  const i64 steps = (t.channels + kTileDepth - 1) / kTileDepth, count = t.channels * t.taps;
  constexpr i64 part = 2 * kTileFloats, step = S::parts * part;
  for (int j = 0; j < kBlock; j += 16) {
    float* const dst = t.dst + j / 16 * kTileFloats;
    for (i64 tap = 0; tap < t.taps && t.channels % kTileDepth != 0; ++tap)
      for (int p = 0; p < S::parts; ++p)
        for (int k = 0; k < 16; ++k) L::store(dst + ((tap + 1) * steps - 1) * step + p * part + 16 * k, L::zero());
    auto peak = L::zero();
    i64 c = 0, tap = 0;
    for (i64 e = 0; e < count; e += 16) {
      const Lanes<L> lanes(count - e);
      L::V r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = j + i < t.n ? lanes.load(src + (j + i) * t.j_step + e) : L::zero();
      L::transpose(r);
      for (int i = 0; i < lanes.n; ++i) {
        L::V x[S::parts];
        if constexpr (S::limited) {
          Parts<1>::raise(&peak, r[i]);
          split(r[i], x);
        } else {
          x[0] = r[i];
        }
        float* const d = dst + (tap * steps + c / kTileDepth) * step + c % kTileDepth / 2 * 16;
        for (int p = 0; p < S::parts; ++p) {
          const __m512i low = c % 2 ? bits(L::load(d + p * part)) : _mm512_srli_epi32(bits(x[p]), 16);
          L::store(d + p * part, _mm512_castsi512_ps(c % 2 ? _mm512_or_si512(low, bits(x[p])) : low));
        }
        if (++tap == t.taps) tap = 0, ++c;
      }
    }
    if (!S::limited || !t.peak) continue;
    Parts<1>::raise(&peak, L::load(t.peak + j));
    L::store(t.peak + j, peak);
  }
}

// See ConvFunctions::product.
template <class P>
void conv_product(const TileArgs& t, const i64* runs, i64 count) {
  Steps steps = all_steps<P>(t);
  steps.end *= count, steps.at = runs;
  run_panels<P, P::parts == 1, Stream::none>(t, steps);
}

// See ConvFlatArgs. B comes from L2, A from L1 as far as it fits.
template <class P>
void conv_flat(const ConvFlatArgs& t) {
  const i64 row = t.b_row * 4;
  const TileLayout a = {static_cast<const char*>(t.a), t.a_row, 16 * t.a_row, kTileRowBytes, P::parts * kTileRowBytes};
  const TileLayout b = {reinterpret_cast<const char*>(t.b), row, kTileRowBytes, t.b_part * 4, 16 * row};
  run_block<P, P::parts == 1, Stream::b>(Sums{t.c, kBlock, kBlock, kBlock, t.accumulate}, a, b,
                                         Steps{0, t.steps, t.steps});
}

// See ConvPairsArgs.
template <class T, class S>
void conv_pairs(const ConvPairsArgs& t) {
  const T* const src = static_cast<const T*>(t.src);
  if constexpr (S::as_it_lies) {
    pack_pairs<VecAvx512Bf16>(src, t.pixel_step, t.c_step, t.pixels, static_cast<int>(t.channels),
                              static_cast<int>(t.row), t.dst, nullptr);
  } else {
    for (i64 p = 0; p < t.pixels; p += kTileDepth) {
      const int depth = t.pixels - p < kTileDepth ? static_cast<int>(t.pixels - p) : kTileDepth;
      for (i64 c = 0; c < (t.channels + kBlock - 1) / kBlock * kBlock; c += 16) {
        const int lines = t.channels - c < 0 ? 0 : t.channels - c < 16 ? static_cast<int>(t.channels - c) : 16;
        L::V peaks[16];
        for (auto& v : peaks) v = L::zero();
        pack_tile<T, S, false>(src + p * t.pixel_step + c * t.c_step, t.pixel_step, t.c_step, depth, lines,
                               t.dst + p / 2 * t.row + c, t.part, peaks, t.row, (depth + 1) / 2);
      }
    }
  }
}

// See ConvFunctions::raise.
inline void conv_raise(const ConvPairsArgs& t) {
  const float* const src = static_cast<const float*>(t.src);
  for (i64 c = 0; c < t.channels; c += t.c_step == 1 ? 16 : 1) {
    if (t.c_step == 1) {
      const auto mask = L::first(t.channels - c < 16 ? static_cast<int>(t.channels - c) : 16);
      auto peak = L::load(t.dst + c, mask);
      for (i64 p = 0; p < t.pixels; ++p) Parts<1>::raise(&peak, L::load(src + p * t.pixel_step + c, mask));
      L::store(t.dst + c, peak, mask);
      continue;
    }
    auto peak = L::set1(t.dst[c]);
    for (i64 p = 0; p < t.pixels; p += 16) {
      const int n = t.pixels - p < 16 ? static_cast<int>(t.pixels - p) : 16;
      if (t.pixel_step == 1) {
        Parts<1>::raise(&peak, L::load(src + p + c * t.c_step, L::first(n)));
        continue;
      }
      float some[16] = {};
      for (int i = 0; i < n; ++i) some[i] = src[(p + i) * t.pixel_step + c * t.c_step];
      Parts<1>::raise(&peak, L::load(some));
    }
    t.dst[c] = float_of(_mm512_reduce_max_epu32(bits(peak)));
  }
}

// See ConvFunctions::next_pairs.
inline void conv_next_pairs(const float* in, i64 row, i64 count, float* out) {
  for (i64 i = row; i < count; i += 16) {
    const __m512i low = _mm512_srli_epi32(bits(L::load(in + i - row)), 16);
    const __m512i high = _mm512_slli_epi32(bits(L::load(in + i)), 16);
    _mm512_storeu_si512(out + i, _mm512_or_si512(low, high));
  }
}

// See ConvFunctions::finite.
inline bool conv_finite(const float* band, i64 floats) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 some = 0;
  for (i64 i = 0; i < floats; i += 16)
    some |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits(L::load(band + i)), exponent), exponent);
  return some == 0;
}

template <class T, class S, class P>
constexpr ConvFunctions dense_tiles() {
  ConvFunctions f = {};
  f.band = conv_band_tiles<T, S>, f.scatter = conv_scatter<L, T>, f.pack = conv_pack_tiles<T, S>;
  f.product = conv_product<P>, f.gather = conv_gather;
  if constexpr (S::as_it_lies) f.finite = conv_finite;
  return f;
}

template <class T, class S, class P>
constexpr ConvFunctions wgrad_tiles() {
  ConvFunctions f = {};
  f.band = conv_band_tiles<T, S>, f.pairs = conv_pairs<T, S>, f.next_pairs = conv_next_pairs, f.flat = conv_flat<P>;
  if constexpr (S::limited) f.raise = conv_raise;
  return f;
}

}  // namespace
}  // namespace fastdl
