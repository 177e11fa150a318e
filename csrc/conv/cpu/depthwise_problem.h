// A depthwise convolution as its schedules see it.
#pragma once
#include <algorithm>

#include "conv/cpu/direct.h"

namespace fastdl::depthwise {

struct Problem : DirectProblem {
  const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2];  // of all phases

  using DirectProblem::DirectProblem;
  // dst[tap][row] = the weights of the channels c0..c0+channels-1.
  void copy_weights(i64 c0, i64 channels, float* dst, i64 row) const;
};

// dst[z][y][x][row] = channels of the pixels from `first` on, `extent` of them, zeros outside the image of `size`;
// depths lie depth_step apart.
void copy_image(const Problem& x, const ConvTensor& image, const void* origin, const i64* size, const i64* first,
                i64 depth_step, const i64* extent, i64 channels, float* dst, i64 row);

// Pixels between the first and the last that the taps of an axis meet.
inline i64 reach(const ConvAxis& a) { return a.taps ? (a.taps - 1) * a.tap_step : 0; }

// Whether rows to come are fetched ahead of an image that is read in place.
bool fetch_pays(const ConvDesc& d);

// wgrad of bfloat16, where vectors are taken apart.
inline bool splits_grad(const ConvDesc& d, const DirectOps& ops) {
  return d.dtype == DType::bf16 && ops.slide_grad_split;
}

// dw, without dbias.
void gradient(const Problem& x);

}  // namespace fastdl::depthwise
