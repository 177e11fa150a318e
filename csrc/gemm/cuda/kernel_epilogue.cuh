// What becomes of the sums: bias, activation and its gradient, residual; and those that are computed again.
#pragma once
#include "gemm/cuda/kernel_args.h"
#include "ptx/convert.cuh"

namespace fastdl {
namespace {

// --- activations: the polynomials of simd/math.h, NaN goes through -------------------------------------------------
FASTDL_DEVICE float exp_f32(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
  const float n = fma_rn(x, 1.44269504f, kRound) - kRound;
  const float r = fma_rn(n, 2.12194440e-4f, fma_rn(n, -0.693359375f, x));
  float p = 0.001381461275741458f;
  p = fma_rn(p, r, 0.008368710055947304f);
  p = fma_rn(p, r, 0.04166838899254799f);
  p = fma_rn(p, r, 0.1666652113199234f);
  p = fma_rn(p, r, 0.4999999403953552f);
  p = fma_rn(p, r, 1.0f);
  p = fma_rn(p, r, 1.0f);
  const int whole = x == x ? static_cast<int>(n) : 0, half = whole / 2;  // 2^n in two factors: n is -150 to 128
  return p * bits_float(static_cast<u32>(half + 127) << 23) * bits_float(static_cast<u32>(whole - half + 127) << 23);
}
FASTDL_DEVICE float logistic_f32(float x) { return reciprocal_approx(1.0f + exp_f32(-x)); }
FASTDL_DEVICE void normal_f32(float x, float* density, float* phi) {
  const float s = x < 0 ? -x : x, t = reciprocal_approx(fma_rn(s, 0.25f, 1.0f));
  float q = 0.025723371654748917f;
  q = fma_rn(q, t, -0.1528088003396988f);
  q = fma_rn(q, t, 0.29612088203430176f);
  q = fma_rn(q, t, -0.20578229427337646f);
  q = fma_rn(q, t, 0.20175780355930328f);
  q = fma_rn(q, t, 0.03292803093791008f);
  q = fma_rn(q, t, 0.1037466749548912f);
  q = fma_rn(q, t, 0.09851684421300888f);
  q = fma_rn(q, t, 0.09979747980833054f);
  *density = exp_f32(s * s * -0.5f);
  const float tail = q * t * *density;
  *phi = x <= 0 ? tail : 1.0f - tail;
}

constexpr float kGeluScale = 0.7978845608f, kGeluCube = 0.044715f;  // sqrt(2/pi); Hendrycks and Gimpel, 2016

FASTDL_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x <= 0 ? 0.0f : x;
    case Activation::silu:
      return x * logistic_f32(x);
    case Activation::gelu: {
      float density, phi;
      normal_f32(x, &density, &phi);
      return x * phi;
    }
    case Activation::gelu_tanh:  // (1 + tanh u) / 2 = logistic(2u)
      return x * logistic_f32(x * fma_rn(x * x, kGeluCube, 1.0f) * (2 * kGeluScale));
    default:
      return x;
  }
}

// d activate(x) / dx
FASTDL_DEVICE float activation_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x <= 0 ? 0.0f : 1.0f;  // as torch has it: 0 at 0, 1 at NaN
    case Activation::silu: {
      const float s = logistic_f32(x);
      return fma_rn(x * s, 1.0f - s, s);
    }
    case Activation::gelu: {
      float density, phi;
      normal_f32(x, &density, &phi);
      return fma_rn(x * density, 0.3989422804f, phi);  // 1 / sqrt(2 pi)
    }
    case Activation::gelu_tanh: {
      const float square = x * x, u = x * fma_rn(square, kGeluCube, 1.0f) * (2 * kGeluScale);
      const float slope = fma_rn(square, 3 * kGeluCube, 1.0f) * (2 * kGeluScale), s = logistic_f32(u);
      return fma_rn(x * (s * (1.0f - s)), slope, s);
    }
    default:
      return 1.0f;
  }
}

// --- memory --------------------------------------------------------------------------------------------------------
// n neighbours at p, as one access where `whole`; else the first `count`, the rest zeros.
template <class T, int n>
FASTDL_DEVICE void load_floats(float (&x)[n], const T* p, bool whole, int count) {
  if (whole) {
    const Pack<T, n> v = *reinterpret_cast<const Pack<T, n>*>(p);
#pragma unroll
    for (int e = 0; e < n; ++e) x[e] = to_float(v.x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < n; ++e) x[e] = e < count ? to_float(p[e]) : 0.0f;
  }
}
template <class T, int n>
FASTDL_DEVICE void store_floats(T* p, const float (&x)[n], bool whole, int count) {
  if (whole) {
    Pack<T, n> v;
#pragma unroll
    for (int e = 0; e < n; ++e) v.x[e] = from_float<T>(x[e]);
    *reinterpret_cast<Pack<T, n>*>(p) = v;
  } else {
#pragma unroll
    for (int e = 0; e < n; ++e)
      if (e < count) p[e] = from_float<T>(x[e]);
  }
}

// --- sums to elements of C -----------------------------------------------------------------------------------------
constexpr int kFinish = 4;  // neighbours along N that a thread finishes together

// z = sum [+ C] [+ bias], pre = z, C = activation(z) [+ residual] for `count` neighbours from column j on; `at`: their
// place in c.
template <class T>
FASTDL_DEVICE void finish(const CudaGemmArgs& p, float (&x)[kFinish], i64 at, i64 j, int count) {
  const bool whole = p.c_vector && count == kFinish;
  float y[kFinish];
  if (p.accumulate) {
    load_floats(y, static_cast<const T*>(p.c) + at, whole, count);
#pragma unroll
    for (int e = 0; e < kFinish; ++e) x[e] = y[e] + x[e];
  }
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + j * p.bias_step;
#pragma unroll
    for (int e = 0; e < kFinish; ++e)
      if (e < count) x[e] += to_float(bias[e * p.bias_step]);
  }
  if (p.pre) store_floats(static_cast<T*>(p.pre) + at, x, whole, count);
  if (p.activation != Activation::none) {
#pragma unroll 1
    for (int e = 0; e < kFinish; ++e) {
      // One copy of the code: the registers rotate through it.
      const float z = activate(p.activation, x[0]);
      x[0] = x[1], x[1] = x[2], x[2] = x[3], x[3] = z;
    }
  }
  if (p.residual) {
    load_floats(y, static_cast<const T*>(p.residual) + at, whole, count);
#pragma unroll
    for (int e = 0; e < kFinish; ++e) x[e] += y[e];
  }
  store_floats(static_cast<T*>(p.c) + at, x, whole, count);
}

// --- sums that bfloat16 parts cannot be relied on for --------------------------------------------------------------
// What is Inf or NaN may be so of its parts alone; tiny rows and columns lose parts that matter (kTinyPeak).
FASTDL_DEVICE bool is_suspect(float sum, float a_peak, float b_peak) {
  if ((float_bits(sum) & 0x7f800000u) == 0x7f800000u) return true;
  if (!(a_peak > 0 && b_peak > 0)) return false;
  return a_peak < kTinyPeak || b_peak < kTinyPeak || a_peak * b_peak < kTinyProduct;
}
// Fused multiply-adds, the sums of 128 each added up.
FASTDL_DEVICE float exact_sum(const float* a, i64 a_step, const float* b, i64 b_step, i64 K) {
  float sum = 0;
  for (i64 k = 0; k < K;) {
    float part = 0;
    const i64 end = K - k < 128 ? K : k + 128;
#pragma unroll 4
    for (; k < end; ++k) part = fma_rn(a[k * a_step], b[k * b_step], part);
    sum += part;
  }
  return sum;
}

}  // namespace
}  // namespace fastdl
