// C(i,j) = [C(i,j) +] sum_k A(i,k) * B(k,j) [+ bias(j)] on a GPU: see gemm/gemm.h, whose GemmDesc and GemmArgs these
// take.
//
// plan() is pure; run() launches on the stream and waits for nothing. A sum's order follows from K, the kernel and the
// number of splits.
#pragma once
#include <string>
#include <vector>

#include "gemm/gemm.h"
#include "ptx/device.h"

namespace fastdl {

struct CudaGemmArgs;

struct CudaGemmKernel {
  const char* name;
  DType dtype;
  Precision precision;
  bool dot;   // of few rows, or few columns, by operands that are contiguous along K: reads the other one once
  int parts;  // bfloat16 parts of float operands; 0: multiply-adds of float32
  int tile_m, tile_n, depth, threads, shared_bytes;  // dot: m of the few, n of the many
  int blocks;                                        // that fit a multiprocessor
  void (*launch)(const CudaGemmArgs& args, i64 blocks, const Stream& stream);
};

struct CudaGemmPlan {
  const CudaGemmKernel* kernel;
  bool turned;  // dot: columns are the few
  i64 tiles_m, tiles_n;
  int splits;       // K is cut into as many runs, each a block of its own; their sums meet in the workspace
  i64 split_depth;  // of K in a run
  i64 partial_row;  // floats from a row of partial sums to the next
  i64 partial_bytes, workspace_bytes;
  double microseconds;  // what it is expected to take
  const char* why;

  i64 blocks(i64 batch) const { return tiles_m * tiles_n * splits * batch; }
};

const std::vector<CudaGemmKernel>& cuda_gemm_kernels();

// desc after gemm_canonicalise, with batch as it leaves it. forced: a row to use, or null; splits 0: as many as pay.
CudaGemmPlan cuda_gemm_plan(const GemmDesc& desc, const Gpu& gpu, const CudaGemmKernel* forced = nullptr,
                            int splits = 0);
std::string describe(const GemmDesc& desc, const CudaGemmPlan& plan);

// workspace: of plan.workspace_bytes, 16-byte aligned, on the stream's GPU; its contents do not matter.
void cuda_gemm_run(const GemmDesc& desc, const CudaGemmPlan& plan, const GemmArgs& args, void* workspace,
                   const Stream& stream);

// dz[i] = dy[i] * d activation(z[i]) / dz over contiguous elements.
void cuda_activation_grad(const void* dy, const void* z, void* dz, i64 count, Activation activation, DType dtype,
                          const Stream& stream);
// out[j] = sum_i x(i,j): the bias gradient, in an order fixed by the shape.
void cuda_sum_rows(const void* x, const RowsDesc& desc, void* out, const Stream& stream);

}  // namespace fastdl
