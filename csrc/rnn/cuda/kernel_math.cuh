// Functions of the cells, to float32's accuracy: the polynomials of simd/math.h. NaN goes through.
#pragma once
#include "ptx/convert.cuh"

namespace fastdl {

// x = n ln 2 + r, |r| <= ln(2)/2, for |x| <= 87; power = 2^n.
struct Reduced {
  float r, power;
};
FASTDL_DEVICE Reduced reduce_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, its lowest bits
  const float rounded = fma_rn(x, 1.44269504f, kRound), n = rounded - kRound;
  const float r = fma_rn(n, 2.12194440e-4f, fma_rn(n, -0.693359375f, x));
  return {r, bits_float((float_bits(rounded) + 127u) << 23)};
}
// NaN stays.
FASTDL_DEVICE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// 1 / (1 + exp(-x))
FASTDL_DEVICE float logistic(float x) {
  const Reduced e = reduce_exp(clamp(-x, -87.0f, 87.0f));
  float p = 0.001381461275741458f;
  p = fma_rn(p, e.r, 0.008368710055947304f);
  p = fma_rn(p, e.r, 0.04166838899254799f);
  p = fma_rn(p, e.r, 0.1666652113199234f);
  p = fma_rn(p, e.r, 0.4999999403953552f);
  p = fma_rn(p, e.r, 1.0f);
  p = fma_rn(p, e.r, 1.0f);
  return x < -87.0f ? 0.0f : reciprocal_approx(fma_rn(p, e.power, 1.0f));
}

// m / (m + 2), m = exp(2x) - 1: nothing cancels.
FASTDL_DEVICE float tanh(float x) {
  const Reduced e = reduce_exp(clamp(x + x, -44.0f, 44.0f));
  float q = 0.0013882509665563703f;
  q = fma_rn(q, e.r, 0.008366580121219158f);
  q = fma_rn(q, e.r, 0.04166720062494278f);
  q = fma_rn(q, e.r, 0.1666654348373413f);
  q = fma_rn(q, e.r, 0.4999999701976776f);
  const float p = fma_rn(e.r * e.r, q, e.r), power = e.power;
  const float m = fma_rn(power, p, power - 1.0f);
  return m / (m + 2.0f);
}

}  // namespace fastdl
