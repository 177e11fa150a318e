// out[16,8] = A[16,K] * B[8,K]^T by one warp: the instructions that all kernels stand on, alone.
#pragma once
#include "ptx/device.h"

namespace fastdl {

void mma_probe_run(const void* a, const void* b, float* out, int K, DType dtype, const Stream& stream);

}  // namespace fastdl
