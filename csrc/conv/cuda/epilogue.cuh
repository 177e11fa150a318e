// From a float32 sum to what is written: z = sum + bias, pre = z, out = activation(z) + residual.
#pragma once
#include "conv/desc.h"
#include "gemm/cuda/kernel_epilogue.cuh"

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

// `offset`: of the element in out, from its first on.
template <class T>
FASTDL_DEVICE void conv_finish(const ConvEpilogue<T>& e, float sum, i64 column, i64 offset) {
  if (e.bias) sum += to_float(e.bias[column * e.bias_step]);
  if (e.pre) e.pre[offset] = from_float<T>(sum);
  if (e.activation != Activation::none) sum = activate(e.activation, sum);
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
      for (int v = 0; v < V; ++v) sum[v] = activate(e.activation, sum[v]);
    if (e.residual) {
      const Pack<T, V> r = *reinterpret_cast<const Pack<T, V>*>(e.residual + offset);
      for (int v = 0; v < V; ++v) sum[v] += to_float(r.x[v]);
    }
    for (int v = 0; v < V; ++v) out.x[v] = from_float<T>(sum[v]);
    *reinterpret_cast<Pack<T, V>*>(e.out + offset) = out;
  }
}

}  // namespace fastdl
