// Dense convolution for levels that multiply pairs of 16 bits: a float of an operand stands for two channels.
#pragma once
#include "conv/cpu/kernel.h"
#include "gemm/cpu/kernel_pairs.h"

namespace fastdl {
namespace {

// See ConvBandArgs: 16 bits as they are.
template <class L>
void conv_band_pairs(const ConvBandArgs& args) {
  constexpr int W = L::width;
  const ConvBandArgs t = in_one_line(args, 2);
  const bf16* const src = static_cast<const bf16*>(t.src);
  if (t.c_step != 1 && t.pixel_step == 1 && t.channels >= 8) {  // transpose blocks of W pairs of channels x W pixels
    for (i64 c = 0; c < t.channels; c += 2 * W) {
      const i64 left = t.channels - c;
      const Lanes<L> units((left + 1) / 2);
      for (i64 p = 0; p < t.pixels; p += W) {
        const Lanes<L> pixels(t.pixels - p);
        typename L::V r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const bf16* s = src + (c + 2 * i) * t.c_step + p;
          r[i] = 2 * i + 1 < left ? L::pair(s, s + t.c_step, pixels.mask)
                 : 2 * i < left   ? L::low(L::load(s, pixels.mask))
                                  : L::zero();
        }
        L::transpose(r);
        for (int i = 0; i < pixels.n; ++i) units.store(t.dst + (p + i) * t.row + c / 2, r[i]);
      }
    }
    return;
  }
  for (i64 p = 0; p < t.pixels; ++p) {
    const bf16* s = src + p * t.pixel_step;
    float* d = t.dst + p * t.row;
    if (t.c_step == 1) {
      for (i64 c = 0; c < t.channels; c += 2 * L::width) {
        const i64 left = t.channels - c;
        const int n = left < 2 * L::width ? static_cast<int>(left) : 2 * L::width;
        L::store(d + c / 2, L::pairs(s + c, n), L::first((n + 1) / 2));
      }
    } else {
      for (i64 c = 0; c < t.channels; c += 2) {
        const bf16 two[2] = {s[c * t.c_step], c + 1 < t.channels ? s[(c + 1) * t.c_step] : bf16{0}};
        __builtin_memcpy(d + c / 2, two, sizeof two);
      }
    }
  }
}

// Plain: the level in which fma is what it says, for all that is not a product of pairs.
template <class L, class Plain, int MR, int NV>
constexpr ConvFunctions dense_pairs() {
  return {conv_run_tile<L, MR, NV>, conv_rows_of<L, MR, NV>, conv_band_pairs<L>, conv_scatter<Plain, bf16>,
          conv_pack_panel<L, bf16, NV, true>};
}

}  // namespace
}  // namespace fastdl
