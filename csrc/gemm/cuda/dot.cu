#include "gemm/cuda/kernel_dot.cuh"

namespace fastdl {

using f32 = float;
#define CUDA_GEMM_KERNEL(...)
#define CUDA_GEMM_DOT(name, dtype, rows)                                  \
  void name(const CudaGemmArgs& args, i64 blocks, const Stream& stream) { \
    launch_dot<dtype, rows>(args, blocks, stream);                        \
  }
#include "gemm/cuda/kernels.inc"

}  // namespace fastdl
