// The recurrent products on tiles: W is packed as GEMM packs B, rows of h are read where they lie
// (gemm/cpu/kernel_amx.h).
#pragma once
#include "gemm/cpu/kernel_amx.h"
#include "rnn/cpu/kernel.h"

namespace fastdl {
namespace {

// See RnnFunctions::pack. Panels of 32 columns, 16 of them of one gate.
template <class T, class Form, int kCellGates, int kPanels>
void pack_gates(const void* source, i64 w_row, i64 w_col, i64 H, i64 K, i64 unit, float* dst, float* peak) {
  constexpr int kColumns = kPanels * kBlock, kUnits = kColumns / kCellGates;
  static_assert(kUnits % 16 == 0, "a tile holds one gate");
  const i64 panel = (K + kTileDepth - 1) / kTileDepth * Form::parts * 2 * kTileFloats;
  for (int j = 0; j < kColumns; j += 16) {
    const i64 gate = j / kUnits, first = unit + j % kUnits, left = H - first;
    const int n = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
    const T* const w = static_cast<const T*>(source) + (gate * H + (n ? first : 0)) * w_row;
    float* const out = dst + j / kBlock * panel + j % kBlock / 16 * kTileFloats;
    pack_lines<T, Form, false>(w, w_col, w_row, K, n, 2 * kTileFloats, out, peak ? peak + j : nullptr);
  }
}

template <int kParts>
void split_rows(const RnnSplitArgs& a) {
  for (i64 i = 0; i < a.m; ++i) {
    L::V peak = L::zero();
    for (int s = 0; s < a.segments; ++s) {
      const float* const x = a.x + i * a.row + s * a.H;
      for (i64 j = 0; j < a.n; j += 16) {
        const auto mask = L::first(a.n - j < 16 ? static_cast<int>(a.n - j) : 16);
        const auto v = L::load(x + j, mask);
        Parts<1>::raise(&peak, v);
        L::V part[kParts];
        split(v, part);
        for (int p = 0; p < kParts; ++p)
          _mm256_mask_storeu_epi16(reinterpret_cast<bf16*>(a.parts + i * a.row + p * a.part) + s * a.H + j, mask,
                                   _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(part[p]), 16)));
      }
    }
    if (a.peak) a.peak[i] = float_of(_mm512_reduce_max_epu32(bits(peak)));
  }
}

// T: in memory, S: the form of h; P: the products of the parts that Form makes of W.
template <class T, class S, class Form, class P, RnnCell kCell, int kPanels>
constexpr RnnFunctions tile_functions() {
  constexpr int kCellGates = kGates[static_cast<int>(kCell)], kUnits = kPanels * kBlock / kCellGates;
  return {run_rows<P>,
          pack_gates<T, Form, kCellGates, kPanels>,
          update<VecAvx512Flushing, T, S, kCell, kUnits>,
          grad<VecAvx512Flushing, T, S, kCell>,
          convert<L, T, S>,
          convert<L, S, T>,
          convert<L, T, float>,
          convert<L, float, T>,
          merge<L, T, S>,
          Form::limited ? split_rows<Form::parts> : nullptr};
}

}  // namespace
}  // namespace fastdl
