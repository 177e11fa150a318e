// What depthwise kernels read: packed weights, copies of the image, rows of it fetched ahead.
#include "conv/cpu/depthwise_problem.h"

namespace fastdl::depthwise {

// Images from which rows to come are fetched ahead, 0.8 of the time at 14 MB; of what the caches hold, as the 3 MB of
// 8x512x14x14, the processor's own prefetching is ahead, and more of it costs up to 1.05 times (Zen 4).
constexpr i64 kFetchBytes = i64{8} << 20;

bool fetch_pays(const ConvDesc& d) {
  const DirectSides s = direct_sides(d);
  return d.N * d.C * s.in[0] * s.in[1] * s.in[2] * item_size(d.dtype) >= kFetchBytes;
}

void Problem::copy_weights(i64 c0, i64 channels, float* dst, i64 row) const {
  const ConvTensor& w = args.w;
  const void* const from = at(w.data, c0 * w.n_step, d.dtype);
  if (w.step[2] == 1 && w.step[1] == d.kernel[2] && w.step[0] == d.kernel[1] * d.kernel[2])
    return ops.copy(from, 1, w.n_step, taps, channels, dst, row);
  for (i64 z = 0; z < d.kernel[0]; ++z)
    for (i64 y = 0; y < d.kernel[1]; ++y, dst += d.kernel[2] * row)
      ops.copy(at(from, z * w.step[0] + y * w.step[1], d.dtype), w.step[2], w.n_step, d.kernel[2], channels, dst, row);
}

void copy_image(const Problem& x, const ConvTensor& image, const void* origin, const i64* size, const i64* first,
                i64 depth_step, const i64* extent, i64 channels, float* dst, i64 row) {
  for (i64 z = 0; z < extent[0]; ++z) {
    const i64 id = first[0] + z * depth_step;
    for (i64 y = 0; y < extent[1]; ++y, dst += extent[2] * row) {
      const i64 ih = first[1] + y;
      i64 lo = extent[2], hi = extent[2];
      if (id >= 0 && id < size[0] && ih >= 0 && ih < size[1]) {
        lo = std::min(extent[2], std::max<i64>(0, -first[2]));
        hi = std::max(lo, std::min(extent[2], size[2] - first[2]));
      }
      std::fill(dst, dst + lo * row, 0.0f);
      std::fill(dst + hi * row, dst + extent[2] * row, 0.0f);
      if (lo == hi) continue;
      const i64 left = id * image.step[0] + ih * image.step[1] + (first[2] + lo) * image.step[2];
      x.ops.copy(at(origin, left, x.d.dtype), image.step[2], image.c_step, hi - lo, channels, dst + lo * row, row);
    }
  }
}

}  // namespace fastdl::depthwise
