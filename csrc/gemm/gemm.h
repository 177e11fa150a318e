// C(i,j) = [C(i,j) +] sum_k A(i,k) * B(k,j) [+ bias(j)]      A [M,K], B [K,N], C [M,N], over a batch
//
// A and B have any strides, C has unit stride along N. plan() decides and is pure; run() does it. Each element of C
// is summed in an order that depends on K and the kernel alone, so results do not change with the thread count.
#pragma once
#include <string>
#include <vector>

#include "base/cpu_info.h"
#include "base/types.h"
#include "gemm/cpu/kernel_args.h"

namespace fastdl {

struct GemmDesc {
  i64 M, N, K;
  i64 batch = 1;
  i64 a_row, a_col;     // A(i,k) = a[i*a_row + k*a_col]
  i64 b_row, b_col;     // B(k,j) = b[k*b_row + j*b_col]
  bool packed = false;  // b is a frozen pack (pack_b): [ceil(N/nr)][K][nr]
  DType dtype = DType::kFloat32;
};

struct GemmPlan {
  const GemmKernel* kernel;
  int tile_m;      // rows of a register tile as used: M cut evenly, so that no tile is much shorter than the rest
  i64 mc, nc, kc;  // cache blocks
  bool pack_a, pack_b;
  int grid_m, grid_n;  // C of each matrix is cut into grid_m x grid_n parts; threads take the parts of all in order
  int threads;
  i64 a_bytes, b_bytes;  // packed blocks, a thread
  const char* why;

  i64 workspace_bytes() const { return threads * (a_bytes + b_bytes); }
};

constexpr int kMaxBatchDims = 8;

// Batch dimensions, outermost first; strides in elements, 0 where an operand is broadcast.
struct GemmBatch {
  int dims = 0;
  i64 size[kMaxBatchDims], a[kMaxBatchDims], b[kMaxBatchDims], c[kMaxBatchDims];
};

struct GemmArgs {
  const float* a;     // [batch, M, K]
  const float* b;     // [batch, K, N], or one frozen pack
  float* c;           // [batch, M, N], rows c_row apart
  const float* bias;  // bias(j) = bias[j*bias_step], or null
  i64 c_row;
  i64 bias_step = 1;
  bool accumulate = false;
  GemmBatch batch;
};

const std::vector<GemmKernel>& gemm_kernels();
const GemmKernel& gemm_kernel(const std::string& name, const char* op);  // throws Error naming the rows
const GemmKernel& gemm_pack_kernel(Isa isa);                             // the row that frozen packs are laid out for

// forced: a row to use, or null. The machine's isa must be compiled in, not necessarily runnable here.
GemmPlan gemm_plan(const GemmDesc& desc, const Machine& machine, const GemmKernel* forced = nullptr);
std::vector<std::string> gemm_candidates(const GemmDesc& desc, const Machine& machine, const GemmPlan& chosen);
std::string describe(const GemmDesc& desc, const GemmPlan& plan);

void gemm_run(const GemmDesc& desc, const GemmPlan& plan, const GemmArgs& args);

// Frozen packs: out[gemm_pack_size] = B[K,N] in panels [ceil(N/nr)][K][nr], the last one padded with zeros.
i64 gemm_pack_size(i64 K, i64 N, const GemmKernel& kernel);
void gemm_pack_b(const float* b, i64 b_row, i64 b_col, i64 K, i64 N, const GemmKernel& kernel, float* out);

// out[j] = sum_i x(i,j): the bias gradient. The last of the row dimensions is the innermost.
struct RowsDesc {
  int dims = 0;
  i64 size[kMaxBatchDims], stride[kMaxBatchDims];
  i64 cols, col;  // number of columns and the stride between them
};
void gemm_sum_rows(const float* x, const RowsDesc& desc, float* out, Isa isa, int threads);

// Calls of gemm() that ran this row since the last reset.
i64 gemm_calls(const GemmKernel& kernel);
void gemm_reset_calls();

// Plan for this machine, log, count, run. N = 1 becomes M = 1 by transposing the problem.
GemmPlan gemm(GemmDesc desc, GemmArgs args, const GemmKernel* forced, int threads);
// Rewrites desc (and args) into the one form that gets a kernel; gemm() applies it, plans are shown after it.
void gemm_canonicalise(GemmDesc* desc, GemmArgs* args);

}  // namespace fastdl
