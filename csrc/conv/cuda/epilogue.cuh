// From a float32 sum to what is written: z = sum + bias, pre = z, out = activation(z) + residual.
#pragma once
#include "conv/desc.h"
#include "ptx/convert.cuh"

namespace fastdl {

template <class T>
struct ConvEpilogue {
  T* out;
  i64 n_step, c_step, step[3];
  const T* bias;
  i64 bias_step;
  const T* residual;
  T* pre;
  Activation activation;
  bool channels_last;  // neighbours in memory are channels, else pixels
};

// exp(x), relative error 2^-22: the power's integer part is exact, what x loses to the product is added back.
FASTDL_DEVICE float exp_positive_range(float x) {
  const float t = x * 1.44269504f, rest = fma_rn(x, 1.44269504f, -t) + x * 1.92596299e-8f;
  const float y = exp2_approx(t);
  return fma_rn(y * 0.693147181f, rest, y);
}
FASTDL_DEVICE float logistic(float x) {
  const float clamped = x < -88.0f ? -88.0f : x;
  return reciprocal_approx(1.0f + exp_positive_range(-clamped));
}
// Phi(x), the normal distribution function: as simd/math.h.
FASTDL_DEVICE float normal_phi(float x) {
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
  const float tail = q * t * exp_positive_range(s > 18.0f ? -162.0f : s * s * -0.5f);
  return x != x ? x : x <= 0 ? tail : 1.0f - tail;
}
FASTDL_DEVICE float conv_activate(float x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return x < 0 ? 0.0f : x;
    case Activation::gelu:
      return x * normal_phi(x);
    case Activation::gelu_tanh:
      return x * logistic(x * fma_rn(x * x, 0.044715f, 1.0f) * 1.5957691216f);
    case Activation::silu:
      return x * logistic(x);
    default:
      return x;
  }
}

// `offset`: of the element in out, from its first on.
template <class T>
FASTDL_DEVICE void conv_finish(const ConvEpilogue<T>& e, float sum, i64 column, i64 offset) {
  if (e.bias) sum += to_float(e.bias[column * e.bias_step]);
  if (e.pre) e.pre[offset] = from_float<T>(sum);
  if (e.activation != Activation::none) sum = conv_activate(sum, e.activation);
  if (e.residual) sum += to_float(e.residual[offset]);
  e.out[offset] = from_float<T>(sum);
}

// V neighbours along the channels, that lie side by side and aligned.
template <class T, int V>
FASTDL_DEVICE void conv_finish_pack(const ConvEpilogue<T>& e, float (&sum)[V], i64 column, i64 offset) {
  if constexpr (V == 1) {
    conv_finish(e, sum[0], column, offset);
  } else {
    Pack<T, V> out;
    if (e.bias)
      for (int v = 0; v < V; ++v) sum[v] += to_float(e.bias[(column + v) * e.bias_step]);
    if (e.pre) {
      for (int v = 0; v < V; ++v) out.x[v] = from_float<T>(sum[v]);
      *reinterpret_cast<Pack<T, V>*>(e.pre + offset) = out;
    }
    if (e.activation != Activation::none)
      for (int v = 0; v < V; ++v) sum[v] = conv_activate(sum[v], e.activation);
    if (e.residual) {
      const Pack<T, V> r = *reinterpret_cast<const Pack<T, V>*>(e.residual + offset);
      for (int v = 0; v < V; ++v) sum[v] += to_float(r.x[v]);
    }
    for (int v = 0; v < V; ++v) out.x[v] = from_float<T>(sum[v]);
    *reinterpret_cast<Pack<T, V>*>(e.out + offset) = out;
  }
}

}  // namespace fastdl
