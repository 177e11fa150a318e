// Convolution over 1 to 3 spatial dimensions (D, H, W; missing leading ones have size 1) and its gradients.
//   forward  y(n,k,o) = sum_{c,t} w(k,c,t) x(n, g*C/G + c, o*stride - pad + t*dilation) [+ bias(k)], zero outside x
//   dgrad    dx(n,c,i) = sum over (k,o,t) with o*stride - pad + t*dilation = i of w(k,c,t) dy(n,k,o): also the forward
//            of a transposed convolution, then with bias and epilogue
//   wgrad    dw(k,c,t) = sum_{n,o} dy(n,k,o) x(n,c, o*stride - pad + t*dilation);  dbias(k) = sum_{n,o} dy(n,k,o)
// x, dx [N,C,in], y, dy [N,K,out], w, dw [K,C/G,kernel]. Sums are float32 in an order that the shape and the kernel
// fix, rounded once.
#pragma once
#include <string>

#include "base/names.h"
#include "base/sizes.h"
#include "simd/activation.h"

namespace fastdl {

enum class ConvPass : std::uint8_t { forward, dgrad, wgrad };

struct ConvDesc {
  ConvPass pass;
  i64 N, C, K, groups;
  i64 in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
  bool channels_last = true;  // channels of the written tensor lie side by side
  DType dtype = DType::f32;
  bool frozen = false;                    // w is a pack (conv_pack)
  Precision precision = Precision::ieee;  // asked of float32 operands
};

// Forward and dgrad along one dimension are one gather: out(j*out_step + out_first) = sum_t in(j*in_step + first +
// t*tap_step) w(tap_first + t*tap_inc), j < count, t < taps. dgrad of stride s is s of them, each with its own taps.
struct ConvAxis {
  i64 count, in_step, first, taps, tap_step, out_step, out_first, tap_first, tap_inc;
};

// Element (n, c, z) lies at n*n_step + c*c_step + sum_i z[i]*step[i].
struct ConvTensor {
  void* data;
  i64 n_step, c_step, step[3];
};

struct ConvArgs {
  ConvTensor x;  // or dx
  ConvTensor y;  // or dy
  ConvTensor w;  // or dw: (n, c, z) is (k, c, t)
  const void* bias = nullptr;
  i64 bias_step = 1;
  Activation activation = Activation::none;
  const void* residual = nullptr;  // added after the activation; lies as what is written does
  void* pre = nullptr;             // gets what the activation is applied to; lies as what is written does
  void* dbias = nullptr;
  i64 dbias_step = 1;
  const float* pack = nullptr;  // the frozen pack, read in place of w
};

const char* conv_pass_name(ConvPass pass);
std::string describe(const ConvDesc& desc);
ConvAxis conv_axis(const ConvDesc& desc, int dim, i64 phase);

}  // namespace fastdl
