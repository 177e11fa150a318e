// The gradients that are no products: of an activation, and of a bias.
#include "base/check.h"
#include "gemm/cuda/kernel_epilogue.cuh"
#include "gemm/cuda/plan.h"
#include "ptx/barrier.cuh"
#include "ptx/launch.h"
#include "ptx/shuffle.cuh"

namespace fastdl {
namespace {

struct GradArgs {
  const void* dy;
  const void* z;
  void* dz;
  i64 count;
  Activation activation;
  bool vector;
};
constexpr int kGradThreads = 256;

template <class T>
FASTDL_GLOBAL(kGradThreads, 4)
activation_grad_kernel(FASTDL_PARAM GradArgs p) {
  const i64 first = (static_cast<i64>(block_x()) * kGradThreads + thread_x()) * kFinish;
  if (first >= p.count) return;
  const int count = p.count - first < kFinish ? static_cast<int>(p.count - first) : kFinish;
  const bool whole = p.vector && count == kFinish;
  float dy[kFinish], z[kFinish];
  load_floats(dy, static_cast<const T*>(p.dy) + first, whole, count);
  load_floats(z, static_cast<const T*>(p.z) + first, whole, count);
#pragma unroll 1
  for (int e = 0; e < kFinish; ++e) {
    const float slope = activation_slope(p.activation, z[0]);
    z[0] = z[1], z[1] = z[2], z[2] = z[3], z[3] = slope;
  }
#pragma unroll
  for (int e = 0; e < kFinish; ++e) dy[e] *= z[e];
  store_floats(static_cast<T*>(p.dz) + first, dy, whole, count);
}

struct SumArgs {
  const void* x;
  void* out;
  RowsDesc rows;
  i64 count;  // of rows
};
constexpr int kSumWarps = 16, kSumThreads = kSumWarps * kWarp, kSumBlock = 64;

// A block: 32 columns. Its warps take the rows in turn, each adds up sums of 64 rows; then the warps' sums are added.
template <class T>
FASTDL_GLOBAL(kSumThreads, 1)
sum_rows_kernel(FASTDL_PARAM SumArgs p) {
  const i64 col = static_cast<i64>(block_x()) * kWarp + lane();
  const bool in = col < p.rows.cols;
  const T* x = static_cast<const T*>(p.x) + (in ? col : 0) * p.rows.col;
  const int inner = p.rows.dims - 1;
  const i64 step = inner < 0 ? 0 : p.rows.stride[inner];
  float sum = 0, part = 0;
  int parts = 0;
#pragma unroll 4
  for (i64 i = warp(); i < p.count; i += kSumWarps) {
    i64 at = i * step;
    if (inner > 0) {
      i64 left = i;
      at = 0;
      for (int d = inner; d >= 0; left /= p.rows.size[d--]) at += left % p.rows.size[d] * p.rows.stride[d];
    }
    part += to_float(x[at]);
    if (++parts == kSumBlock) sum += part, part = 0, parts = 0;
  }
  float* sums = shared_memory<float>();  // [kSumWarps][32]
  sums[thread_x()] = sum + part;
  block_sync(kSumThreads);
  if (warp() > 0 || !in) return;
  sum = 0;
  for (int w = 0; w < kSumWarps; ++w) sum += sums[w * kWarp + lane()];
  static_cast<T*>(p.out)[col] = from_float<T>(sum);
}

template <class Args>
void launch_as(void (*const (&kernels)[3])(const Args), DType dtype, i64 blocks, int threads, int shared_bytes,
               const Args& args, const Stream& stream) {
  if (blocks > 0x7fffffff) fail("fastdl: expected at most 2^31 - 1 blocks, got ", blocks);
  LaunchShape shape;
  shape.grid[0] = static_cast<int>(blocks);
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  launch(kernels[static_cast<int>(dtype)], shape, stream, args);
}

}  // namespace

void cuda_activation_grad(const void* dy, const void* z, void* dz, i64 count, Activation activation, DType dtype,
                          const Stream& stream) {
  if (count == 0) return;
  const u64 quad = static_cast<u64>(kFinish * item_size(dtype));
  bool vector = true;
  for (const void* p : {dy, z, static_cast<const void*>(dz)})
    vector = vector && reinterpret_cast<std::uintptr_t>(p) % quad == 0;
  constexpr i64 block = kGradThreads * kFinish;
  launch_as<GradArgs>({activation_grad_kernel<float>, activation_grad_kernel<bf16>, activation_grad_kernel<f16>}, dtype,
                      ceil_div(count, block), kGradThreads, 0, {dy, z, dz, count, activation, vector}, stream);
}

void cuda_sum_rows(const void* x, const RowsDesc& desc, void* out, const Stream& stream) {
  if (desc.cols == 0) return;
  SumArgs args = {x, out, desc, 1};
  for (int i = 0; i < desc.dims; ++i) args.count *= desc.size[i];
  launch_as<SumArgs>({sum_rows_kernel<float>, sum_rows_kernel<bf16>, sum_rows_kernel<f16>}, desc.dtype,
                     ceil_div(desc.cols, kWarp), kSumThreads, kSumThreads * 4, args, stream);
}

}  // namespace fastdl
