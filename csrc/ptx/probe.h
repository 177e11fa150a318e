// The instructions that all kernels stand on, alone, by one warp.
#pragma once
#include "ptx/device.h"

namespace fastdl {

// out[16,8] = A[16,K] * B[8,K]^T
void mma_probe_run(const void* a, const void* b, float* out, int K, DType dtype, const Stream& stream);

// mma_16x8x16 with register r of lane l as they lie: a[32,4,2], b[32,2,2], d[32,4], to which the product is added.
void fragment_probe_run(const void* a, const void* b, float* d, DType dtype, const Stream& stream);
// load_matrices: lane l gives the address of row[l], x[32,8]; register r of lane l: out[32,4,2].
void matrix_probe_run(const void* x, void* out, bool transposed, const Stream& stream);
// warp_sums: out[l] = what lane l gets of x[32,n], x[l] its own.
void sums_probe_run(const float* x, int n, float* out, const Stream& stream);

}  // namespace fastdl
