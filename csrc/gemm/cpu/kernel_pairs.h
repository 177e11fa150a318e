// Packing for kernels that multiply pairs along K: a float of a packed panel stands for two 16-bit elements.
#pragma once
#include "gemm/cpu/kernel.h"

namespace fastdl {
namespace {

// As pack (kernel.h), with dst[k/2*panel + j] = (src[k*k_step + j*j_step], src[(k+1)*k_step + j*j_step]) for even k; an
// odd last k is paired with zero.
template <class L>
void pack_pairs(const void* source, i64 k_step, i64 j_step, i64 k_count, int n, int panel, float* dst, float*) {
  constexpr int W = L::width;
  const bf16* const src = static_cast<const bf16*>(source);
  const i64 pairs = (k_count + 1) / 2;
  if (k_step == 1 && j_step != 1) {  // columns are contiguous: transpose blocks of W columns x W pairs
    for (int j = 0; j < panel; j += W) {
      for (i64 p = 0; p < pairs; p += W) {
        const i64 left = k_count - 2 * p;
        const int elements = left < 2 * W ? static_cast<int>(left) : 2 * W;
        typename L::V r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = j + i < n ? L::pairs(src + (j + i) * j_step + 2 * p, elements) : L::zero();
        L::transpose(r);
        float* d = dst + p * panel + j;
        if (elements == 2 * W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) L::store(d + i * panel, r[i]);
        } else {
          for (int i = 0; 2 * i < elements; ++i) L::store(d + i * panel, r[i]);
        }
      }
    }
    return;
  }
  for (i64 p = 0; p < pairs; ++p) {
    const bf16* low = src + 2 * p * k_step;
    const bf16* high = low + k_step;
    const bool odd = 2 * p + 1 == k_count;
    int j = 0;
    for (; j_step == 1 && !odd && j + 2 * W <= n; j += 2 * W) {
      typename L::V x, y;
      L::interleave(low + j, high + j, &x, &y);
      L::store(dst + p * panel + j, x);
      L::store(dst + p * panel + j + W, y);
    }
    for (; j < panel; j += W) {
      const int lanes = n - j < W ? (n - j < 0 ? 0 : n - j) : W;
      bf16 x[W] = {}, y[W] = {};
      if (j_step != 1) {
        for (int l = 0; l < lanes; ++l) {
          x[l] = low[(j + l) * j_step];
          if (!odd) y[l] = high[(j + l) * j_step];
        }
      }
      const auto mask = L::first(lanes);
      const bf16* a = j_step == 1 ? low + j : x;
      const bf16* b = odd || j_step != 1 ? y : high + j;
      L::store(dst + p * panel + j, L::pair(a, b, mask));
    }
  }
}

// Single (kernel.h) for levels that multiply pairs: two elements to a lane.
template <class L>
struct Pairs {
  static constexpr int elements = 2 * L::width;
  static FASTDL_INLINE typename L::V load(const bf16* p) { return L::load(reinterpret_cast<const float*>(p)); }
  static FASTDL_INLINE typename L::V load(const bf16* p, int n) { return L::pairs(p, n); }
};

// Plain: the level in which fma is what it says, for all that is not a product of pairs.
template <class L, class Plain>
constexpr GemmHelpers pair_helpers() {
  return {pack_pairs<L>,
          pack_pairs<L>,
          finish<Plain, bf16>,
          activation_grad<Plain, bf16>,
          sum_rows<Plain, bf16>,
          {},
          {},
          {},
          {},
          {},
          {}};
}

}  // namespace
}  // namespace fastdl
