#include "gemm/cuda/kernel_sm80.cuh"

namespace fastdl {

#define CUDA_GEMM_f32(...)
#define CUDA_GEMM_bf16(...)
#define CUDA_GEMM_f16(...)
#undef CUDA_GEMM_f16
#define CUDA_GEMM_f16(name, parts, m, n, warp_m, warp_n, depth, slots, blocks_)                            \
  void name(const CudaGemmArgs& args, i64 blocks, const Stream& stream) {                                  \
    launch_gemm<TileShape<f16, parts, m, n, warp_m, warp_n, depth, slots, blocks_>>(args, blocks, stream); \
  }
#define CUDA_GEMM_KERNEL(name, dtype, precision, ...) CUDA_GEMM_##dtype(name, __VA_ARGS__)
#include "gemm/cuda/kernels.inc"

}  // namespace fastdl
