// C(i,j) = [C(i,j) +] sum_r sum_k A_r(i,k) * B_r(k,j) [+ bias(j)]      A_r [M,K], B_r [K,N], C [M,N], over a batch
//
// A and B have any strides, C has unit stride along N; all are of one dtype, sums are float32 and rounded once. plan()
// decides and is pure; run() does it. Each element of C is summed in an order that depends on K, the pairs r and the
// kernel alone, so results do not change with the thread count.
#pragma once
#include <string>
#include <vector>

#include "base/cpu_info.h"
#include "base/names.h"
#include "base/sizes.h"
#include "base/table.h"
#include "gemm/cpu/kernel_args.h"

namespace fastdl {

struct GemmDesc {
  i64 M, N, K;
  i64 batch = 1;
  i64 pairs = 1;        // (A_r, B_r) to sum over
  i64 a_row, a_col;     // A(i,k) = a[i*a_row + k*a_col]
  i64 b_row, b_col;     // B(k,j) = b[k*b_row + j*b_col]
  bool packed = false;  // b is a frozen pack (pack_b): [ceil(N/nr)][K][nr]
  DType dtype = DType::f32;
  Precision precision = Precision::ieee;  // asked of float32 operands
};

struct GemmPlan {
  const GemmKernel* kernel;
  int tile_m;      // rows of a register tile as used: M cut evenly, so that no tile is much shorter than the rest
  i64 mc, nc, kc;  // cache blocks
  i64 span;        // blocks along K whose sums are taken together; those of the next are added when they are complete
  bool pack_a, pack_b;
  bool by_panel;       // a panel of B is packed just before its first use ..
  bool one_panel;      // .. which is its only one: there is room for one
  int grid_m, grid_n;  // C of each matrix is cut into grid_m x grid_n parts; threads take the parts of all in order
  int threads;
  i64 a_bytes, b_bytes;      // packed blocks, a thread
  i64 sum_bytes;             // float32 sums of a part, a thread; 0 where C itself holds them
  bool tile_sums;            // those of one tile alone: no product is cut along K
  i64 sum_row;               // floats from a row of them to the next
  i64 finish_cols;           // columns of C that the dot kernel finishes at a time
  bool strips;               // strips of 32 rows of A against a block of B in L2: see strips.cc
  bool turned;               // C' = B' A': rows of B are read as they lie, A is packed; few rows
  bool streamed;             // B is read in place, a few of its rows at a time; sums of a K block wait in scratch
  const GemmKernel* repair;  // computes again, by FMA, what the kernel may have got wrong; null where it never does
  i64 repair_bytes;          // its operands, and the largest magnitudes of the part's, a thread
  const char* why;

  i64 workspace_bytes() const { return threads * per_thread_bytes(); }
  i64 per_thread_bytes() const { return a_bytes + b_bytes + sum_bytes + repair_bytes; }
};

constexpr int kMaxBatchDims = 8;

// Batch dimensions, outermost first; strides in elements, 0 where an operand is broadcast.
struct GemmBatch {
  int dims = 0;
  i64 size[kMaxBatchDims], a[kMaxBatchDims], b[kMaxBatchDims], c[kMaxBatchDims];
};

// The pairs r, in the order they are summed; sizes multiply to GemmDesc::pairs.
struct GemmPairs {
  int dims = 0;
  i64 size[kMaxBatchDims], a[kMaxBatchDims], b[kMaxBatchDims];
};

struct GemmArgs {
  const void* a;     // [batch, pairs, M, K]
  const void* b;     // [batch, pairs, K, N], or one frozen pack
  void* c;           // [batch, M, N], rows c_row apart
  const void* bias;  // bias(j) = bias[j*bias_step], or null
  i64 c_row;
  i64 bias_step = 1;
  const void* residual = nullptr;  // added after the activation; lies as c does
  void* pre = nullptr;             // gets what the activation is applied to; lies as c does
  Activation activation = Activation::none;
  bool accumulate = false;
  const void* pack = nullptr;  // the frozen pack of b for the level's own row, to read in place of b where that pays
  GemmBatch batch;
  GemmPairs pairs;
};

const std::vector<GemmKernel>& gemm_kernels();
// The row that frozen packs are laid out for.
const GemmKernel& gemm_pack_kernel(Isa isa, DType dtype, Precision precision = Precision::ieee);

// forced: a row to use, or null. The machine's isa must be compiled in, not necessarily runnable here. twice: C may be
// computed again where a faster plan shows afterwards that it is not to be trusted.
GemmPlan gemm_plan(const GemmDesc& desc, const Machine& machine, const GemmKernel* forced = nullptr, bool twice = true);
std::vector<std::string> gemm_candidates(const GemmDesc& desc, const Machine& machine, const GemmPlan& chosen);
// Whether the frozen pack of B beats reading B where it lies; desc: as it is without the pack.
bool gemm_pack_pays(const GemmDesc& desc, const Machine& machine);
void gemm_use_pack(GemmDesc* desc, GemmArgs* args, const GemmKernel& kernel);
std::string describe(const GemmDesc& desc);
std::string describe(const GemmDesc& desc, const GemmPlan& plan);

// False: C is to be computed again, by a plan that does not rely on that.
bool gemm_run(const GemmDesc& desc, const GemmPlan& plan, const GemmArgs& args);

// Frozen packs: out[gemm_pack_size] = B[K,N] in panels [ceil(N/nr)][K][nr], the last one padded with zeros; behind
// them, for float32 split into parts, the largest |B| of each column. Columns of tiny values are scaled (kTinyScale).
i64 gemm_pack_size(i64 K, i64 N, const GemmKernel& kernel);
void gemm_pack_b(const void* b, i64 b_row, i64 b_col, i64 K, i64 N, const GemmKernel& kernel, float* out);

// The panels alone, as they are; peak[N], zeros before, gets the largest |B| of each column, or null.
void gemm_pack_panels(const void* b, i64 b_row, i64 b_col, i64 K, i64 N, const GemmKernel& kernel, float* out,
                      float* peak);

// dz[i] = dy[i] * d activation(z[i]) / dz over contiguous elements. A pass of its own, since both gradients read dz: in
// the packing of dy the slope would be computed twice. (Zen 4, of the backward pass of M x 3072 x 768 for M = 128, 512,
// 1576: the whole pass of GELU 4 to 6%, of ReLU, which is all traffic, 0.8 to 1.6%; summing rows for the bias 1
// to 1.6%.)
void gemm_activation_grad(const void* dy, const void* z, i64 count, Activation activation, void* dz, DType dtype,
                          Isa isa, int threads);

// out[j] = sum_i x(i,j): the bias gradient. The last of the row dimensions is the innermost.
struct RowsDesc {
  int dims = 0;
  i64 size[kMaxBatchDims], stride[kMaxBatchDims];
  i64 cols, col;  // number of columns and the stride between them
  DType dtype = DType::f32;
};
void gemm_sum_rows(const void* x, const RowsDesc& desc, void* out, Isa isa, int threads);

// C is cut into parts between rows that are multiples of this.
inline i64 gemm_row_unit(const GemmKernel& kernel) { return is_tiled(kernel) ? 32 : 1; }
// Floats of a packed panel, a row or column of it, that hold this many elements along K.
i64 gemm_packed_steps(i64 depth, const GemmKernel& kernel);
// Floats of all panels of B[K,N].
i64 gemm_packed_panels(i64 K, i64 N, const GemmKernel& kernel);
i64 gemm_repair_bytes(const GemmPlan& plan, i64 rows, i64 cols);  // for a part of so many
// Elements of C that were computed a second time since the process began: see GemmPlan::repair.
i64 gemm_repaired();
void gemm_add_repaired(i64 elements);

CallCounts<GemmKernel>& gemm_calls();

// Plan for this machine, log, count, run. N = 1 becomes M = 1 by transposing the problem.
GemmPlan gemm(GemmDesc desc, GemmArgs args, const GemmKernel* forced, int threads);
// Rewrites desc (and args) into the one form that gets a kernel; gemm() applies it, plans are shown after it.
void gemm_canonicalise(GemmDesc* desc, GemmArgs* args);

}  // namespace fastdl
