// The rows of kernels.inc for the dtypes of one file, which defines ATTENTION_BF16, ATTENTION_F16 and ATTENTION_F32 as
// ATTENTION_HERE or ATTENTION_ELSEWHERE.
#pragma once
#include "attention/cuda/kernel_backward.cuh"
#include "attention/cuda/kernel_forward.cuh"

#define ATTENTION_ELSEWHERE(...)
#define ATTENTION_HERE(...) __VA_ARGS__
#define ATTENTION_OF_bf16 ATTENTION_BF16
#define ATTENTION_OF_f16 ATTENTION_F16
#define ATTENTION_OF_f32 ATTENTION_F32

namespace fastdl {

using f32 = float;

inline LaunchShape attention_shape(int blocks, int shared_bytes) {
  LaunchShape shape;
  shape.grid[0] = blocks;
  shape.threads = kAttentionThreads;
  shape.shared_bytes = shared_bytes;
  return shape;
}

}  // namespace fastdl

#define ATTENTION_FORWARD(name, dtype, depth, m, keys, split)                                                        \
  ATTENTION_OF_##dtype(void name(const CudaAttentionArgs& args, int blocks, int shared, const Stream& s); void name( \
                           const CudaAttentionArgs& args, int blocks, int shared, const Stream& s) {                 \
    launch(attention_forward_kernel<dtype, depth, m, keys, split>, attention_shape(blocks, shared), s, args);        \
  })
#define ATTENTION_GRAD(name, dtype, depth, keys)                                                                      \
  ATTENTION_OF_##dtype(void name(const CudaAttentionGradArgs& args, int blocks, int shared, const Stream& s);         \
                       void name(const CudaAttentionGradArgs& args, int blocks, int shared, const Stream& s) {        \
                         launch(attention_grad_kernel<dtype, depth, keys>, attention_shape(blocks, shared), s, args); \
                       })
// The two small kernels of a dtype.
#define ATTENTION_SMALL(dtype)                                                                    \
  void attention_combine_##dtype(const CudaAttentionArgs& args, int blocks, const Stream& s);     \
  void attention_combine_##dtype(const CudaAttentionArgs& args, int blocks, const Stream& s) {    \
    launch(attention_combine_kernel<dtype>, attention_shape(blocks, 0), s, args);                 \
  }                                                                                               \
  void attention_delta_##dtype(const CudaAttentionDeltaArgs& args, int blocks, const Stream& s);  \
  void attention_delta_##dtype(const CudaAttentionDeltaArgs& args, int blocks, const Stream& s) { \
    launch(attention_delta_kernel<dtype>, attention_shape(blocks, 0), s, args);                   \
  }
