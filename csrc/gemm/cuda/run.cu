// Launches a plan, and adds up the runs of a split K.
#include "base/check.h"
#include "gemm/cuda/kernel_epilogue.cuh"
#include "gemm/cuda/plan.h"
#include "ptx/launch.h"

namespace fastdl {
namespace {

constexpr int kThreads = 128;

// The sums of a split K, in the order of its runs, and what becomes of them. A thread: kFinish neighbours of a row.
template <class T>
FASTDL_GLOBAL(kThreads, 4)
sum_splits_kernel(FASTDL_PARAM CudaGemmArgs p) {
  const i64 chunks = p.partial_row / kFinish;
  const i64 id = static_cast<i64>(block_x()) * kThreads + thread_x();
  if (id >= p.batches * p.M * chunks) return;
  const i64 row = id / chunks, j = id % chunks * kFinish;  // of all rows of the batch
  const i64 batch = row / p.M, i = row % p.M;
  const i64 step = p.batches * p.M * p.partial_row;
  const int count = p.N - j < kFinish ? static_cast<int>(p.N - j) : kFinish;
  float x[kFinish] = {};
#pragma unroll 1
  for (i64 s = 0; s < p.splits; ++s) {
    float part[kFinish];
    load_floats(part, p.partial + s * step + row * p.partial_row + j, count == kFinish, count);
#pragma unroll
    for (int e = 0; e < kFinish; ++e) x[e] += part[e];
  }
  const BatchPlace at = batch_place(p.batch, batch);
  if constexpr (sizeof(T) == 4) {
    if (p.peaks) {
      const i64 lines = p.M + p.N;
      const float* peaks = p.peaks + batch * lines;
#pragma unroll 1
      for (int e = 0; e < kFinish; ++e) {
        float sum = x[0];
        if (e < count) {
          float a_peak = 0, b_peak = 0;
          for (i64 s = 0; s < p.splits; ++s) {
            a_peak = larger(a_peak, peaks[s * p.batches * lines + i]);
            b_peak = larger(b_peak, peaks[s * p.batches * lines + p.M + j + e]);
          }
          if (is_suspect(sum, a_peak, b_peak))
            sum = exact_sum(static_cast<const float*>(p.a.data) + at.a + i * p.a.line_step, p.a.k_step,
                            static_cast<const float*>(p.b.data) + at.b + (j + e) * p.b.line_step, p.b.k_step, p.K);
        }
        x[0] = x[1], x[1] = x[2], x[2] = x[3], x[3] = sum;
      }
    }
  }
  finish<T>(p, x, at.c + i * p.c_row + j, j, count);
}

bool aligned(const void* p, i64 bytes) { return reinterpret_cast<std::uintptr_t>(p) % static_cast<u64>(bytes) == 0; }

// How an operand goes to shared memory: along the contiguous one of its dimensions, if there is one.
CudaOperand operand(const void* data, i64 lines, i64 line_step, i64 k_step, DType dtype, const GemmBatch& batch,
                    const i64 (&steps)[kMaxBatchDims]) {
  CudaOperand o = {data, line_step, k_step, line_step == 1 && k_step != 1, false};
  const i64 chunk = 16 / item_size(dtype);
  if (o.transposed)
    o.vector = k_step % chunk == 0;
  else
    o.vector = k_step == 1 && (lines == 1 || line_step % chunk == 0);
  o.vector = o.vector && aligned(data, 16);
  for (int i = 0; i < batch.dims; ++i) o.vector = o.vector && steps[i] % chunk == 0;
  return o;
}

}  // namespace

void cuda_gemm_run(const GemmDesc& d, const CudaGemmPlan& plan, const GemmArgs& args, void* workspace,
                   const Stream& stream) {
  if (d.M == 0 || d.N == 0 || d.batch == 0) return;
  CudaGemmArgs p = {};
  p.M = d.M, p.N = d.N, p.K = d.K;
  p.batch = args.batch, p.batches = d.batch;
  p.a = operand(args.a, d.M, d.a_row, d.a_col, d.dtype, args.batch, args.batch.a);
  p.b = operand(args.b, d.N, d.b_col, d.b_row, d.dtype, args.batch, args.batch.b);
  p.turned = plan.turned;
  p.tiles_m = plan.tiles_m, p.tiles_n = plan.tiles_n;
  p.splits = plan.splits, p.split_depth = plan.split_depth;
  if (plan.splits > 1) {
    p.partial = static_cast<float*>(workspace);
    p.partial_row = plan.partial_row;
    if (plan.workspace_bytes > plan.partial_bytes)
      p.peaks = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.partial_bytes);
  }
  p.c = args.c, p.c_row = args.c_row;
  p.bias = args.bias, p.bias_step = args.bias_step;
  p.residual = args.residual, p.pre = args.pre;
  p.activation = args.activation, p.accumulate = args.accumulate;
  const i64 quad = kFinish * item_size(d.dtype);
  p.c_vector =
      args.c_row % kFinish == 0 && aligned(args.c, quad) && aligned(args.residual, quad) && aligned(args.pre, quad);
  for (int i = 0; i < args.batch.dims; ++i) p.c_vector = p.c_vector && args.batch.c[i] % kFinish == 0;
  plan.kernel->launch(p, plan.blocks(d.batch), stream);
  if (plan.splits == 1) return;
  const i64 blocks = ceil_div(d.batch * d.M * (plan.partial_row / kFinish), kThreads);
  if (blocks > 0x7fffffff) fail("fastdl.gemm: expected at most 2^31 - 1 blocks, got ", blocks);
  LaunchShape shape;
  shape.grid[0] = static_cast<int>(blocks);
  shape.threads = kThreads;
  if (d.dtype == DType::f32) return launch(sum_splits_kernel<float>, shape, stream, p);
  if (d.dtype == DType::bf16) return launch(sum_splits_kernel<bf16>, shape, stream, p);
  launch(sum_splits_kernel<f16>, shape, stream, p);
}

}  // namespace fastdl
