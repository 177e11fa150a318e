#include "gemm/cuda/plan.h"

#include <algorithm>
#include <tuple>

#include "base/check.h"
#include "gemm/cuda/kernel_args.h"

namespace fastdl {

#define CUDA_GEMM_KERNEL(name, ...) void name(const CudaGemmArgs&, i64, const Stream&);
#define CUDA_GEMM_DOT CUDA_GEMM_KERNEL
#include "gemm/cuda/kernels.inc"
#undef CUDA_GEMM_DOT
#undef CUDA_GEMM_KERNEL

namespace {

constexpr int shared_bytes(int element, int parts, int m, int n, int depth, int slots) {
  const int load = slots * (m + n) * depth * element;
  const int finish = (m * n + (element == 4 && parts > 0 ? m + n : 0)) * 4;
  return load > finish ? load : finish;
}

// Every tile once, whatever the numbers.
constexpr bool each_tile_once(i64 tiles_m, i64 tiles_n) {
  unsigned seen[32] = {};
  for (i64 id = 0; id < tiles_m * tiles_n; ++id) {
    const TilePlace at = tile_place(id, tiles_m, tiles_n);
    if (at.m < 0 || at.m >= tiles_m || at.n < 0 || at.n >= tiles_n || seen[at.m] >> at.n & 1) return false;
    seen[at.m] |= 1u << at.n;
  }
  return true;
}
constexpr bool each_tile_once() {
  for (i64 m = 1; m < 27; ++m)
    for (i64 n = 1; n < 6; ++n)
      if (!each_tile_once(m, n)) return false;
  return true;
}
static_assert(each_tile_once());

// --- time ----------------------------------------------------------------------------------------------------------
// Of a multiprocessor, in cycles of 1.4 GHz (data sheets): multiply-adds of 16-bit tensor products and of float32, and
// bytes from memory. What the loops of this file reach of the tensor cores is assumed, not measured.
struct Rates {
  double tensor, fma, bytes;
};
Rates rates(const Gpu& gpu) {
  if (gpu.sm >= 90) return {2048, 128, 18};
  return {1024, gpu.sm == 80 ? 64.0 : 128.0, 10};
}
constexpr double kHidden = 0.2;  // what of the lesser of products and memory does not hide behind the other
constexpr double kCyclesPerMicrosecond = 1400, kLaunch = 3, kStart = 1500;  // microseconds; cycles before a block's
                                                                            // first product and after its last

// What a block of a dot kernel receives in a cycle: 8 KiB at a time, about 1000 cycles from memory.
constexpr double kDotBytes = 8;

double products(const CudaGemmKernel& k) { return k.parts == 3 ? 6 : k.parts == 2 ? 3 : 1; }
// Part of the peak that a multiprocessor full of blocks reaches: shared memory against products (kernels.inc). Of dot
// kernels the rest converts operands.
double efficiency(const CudaGemmKernel& k) {
  if (k.parts == 0) return 0.6;
  if (k.tile_m == 128) return 0.75;
  return k.tile_m == 64 ? 0.5 : k.tile_m == 32 ? 0.4 : 0.25;
}

// Launching and adding up the runs of a split K.
double split_microseconds(const GemmDesc& d, const Gpu& gpu, int splits) {
  if (splits == 1) return 0;
  const double bytes = static_cast<double>(d.batch) * static_cast<double>(d.M) * static_cast<double>(d.N) *
                       (8.0 * splits + item_size(d.dtype));
  return kLaunch + bytes / (rates(gpu).bytes * gpu.multiprocessors) / kCyclesPerMicrosecond;
}

// Each tile of the few reads the many: from memory as far as there are enough blocks to ask for it.
double dot_microseconds(const GemmDesc& d, const Gpu& gpu, const CudaGemmKernel& k, const CudaGemmPlan& p) {
  const Rates rate = rates(gpu);
  const double few = static_cast<double>(std::min(d.M, d.N)), many = static_cast<double>(std::max(d.M, d.N));
  const double batch = static_cast<double>(d.batch), depth = static_cast<double>(d.K);
  const double blocks = static_cast<double>(p.blocks(d.batch));
  const double bytes =
      batch * item_size(d.dtype) * (depth * (static_cast<double>(p.tiles_m) * many + few) + many * few);
  const double memory = bytes / std::min(rate.bytes * gpu.multiprocessors, kDotBytes * blocks);
  const double macs = batch * few * many * depth;
  const double at_work = std::min<double>(gpu.multiprocessors, blocks);
  const double cycles = macs / (rate.fma * efficiency(k) * at_work);
  return kLaunch + (std::max(cycles, memory) + kHidden * std::min(cycles, memory) + kStart) / kCyclesPerMicrosecond;
}

double microseconds(const GemmDesc& d, const Gpu& gpu, const CudaGemmKernel& k, i64 tiles, int splits, i64 depth) {
  const Rates rate = rates(gpu);
  const double item = item_size(d.dtype), batch = static_cast<double>(d.batch);
  const i64 blocks = tiles * splits * d.batch;
  // A multiprocessor takes its blocks together as far as they fit; the fullest one is waited for. One block alone
  // leaves it waiting for memory half of the time.
  const i64 most = ceil_div(blocks, gpu.multiprocessors);
  const double alone = k.blocks > 1 && most == 1 ? 0.6 : 1;
  const double macs = static_cast<double>(k.tile_m) * k.tile_n * static_cast<double>(round_up(depth, k.depth));
  const double peak = k.parts == 0 ? rate.fma : rate.tensor / products(k);
  double cycles = static_cast<double>(most) * macs / (peak * efficiency(k) * alone);
  cycles += static_cast<double>(ceil_div(most, k.blocks)) * kStart;
  // Memory: both operands once and C once; four fifths of the multiprocessors can draw all of it.
  const double elements =
      batch * (static_cast<double>(d.M) * d.K + static_cast<double>(d.K) * d.N + static_cast<double>(d.M) * d.N);
  const double drawing = std::min<double>(gpu.multiprocessors, 1.25 * static_cast<double>(blocks));
  const double memory = elements * item / (rate.bytes * drawing);
  cycles = std::max(cycles, memory + kStart) + kHidden * std::min(cycles, memory);
  return kLaunch + cycles / kCyclesPerMicrosecond;
}

constexpr int kMostSplits = 32;

CudaGemmPlan plan_row(const GemmDesc& d, const Gpu& gpu, const CudaGemmKernel& kernel, int splits) {
  CudaGemmPlan p = {};
  p.kernel = &kernel;
  p.turned = kernel.dot && d.N < d.M;
  p.tiles_m = ceil_div(p.turned ? d.N : d.M, kernel.tile_m), p.tiles_n = ceil_div(p.turned ? d.M : d.N, kernel.tile_n);
  const i64 steps = std::max<i64>(1, ceil_div(d.K, kernel.depth));
  splits = static_cast<int>(std::min<i64>(std::max(1, splits), steps));
  p.split_depth = ceil_div(steps, splits) * kernel.depth;
  p.splits = static_cast<int>(std::max<i64>(1, ceil_div(d.K, p.split_depth)));  // none is empty
  if (p.splits > 1) {
    p.partial_row = round_up(d.N, 4);
    p.partial_bytes = round_up(p.splits * d.batch * d.M * p.partial_row * 4, 256);
    const bool repairs = d.dtype == DType::f32 && kernel.parts > 0;
    p.workspace_bytes = p.partial_bytes + (repairs ? p.splits * d.batch * (d.M + d.N) * 4 : 0);
  }
  p.microseconds = split_microseconds(d, gpu, p.splits) +
                   (kernel.dot ? dot_microseconds(d, gpu, kernel, p)
                               : microseconds(d, gpu, kernel, p.tiles_m * p.tiles_n, p.splits, p.split_depth));
  return p;
}

bool along_k(const GemmDesc& d) { return d.a_col == 1 && d.b_row == 1; }
bool takes(const CudaGemmKernel& kernel, const GemmDesc& d) { return !kernel.dot || along_k(d); }

CudaGemmPlan best_plan(const GemmDesc& d, const Gpu& gpu, const CudaGemmKernel* forced, int splits) {
  CudaGemmPlan best = {};
  bool order = true;  // no row is passed over for the storage order alone
  for (const CudaGemmKernel& k : cuda_gemm_kernels()) {
    if (forced ? &k != forced : k.dtype != d.dtype || k.precision > d.precision) continue;
    if (!forced && k.dot && std::min(d.M, d.N) > k.tile_m) continue;  // the many would be read again
    if (!takes(k, d)) {
      order = false;
      continue;
    }
    const i64 steps = std::max<i64>(1, ceil_div(d.K, k.depth));
    const int least = std::max(1, splits), most = splits ? splits : static_cast<int>(std::min<i64>(kMostSplits, steps));
    for (int s = least; s <= most; ++s) {
      const CudaGemmPlan p = plan_row(d, gpu, k, s);
      if (!best.kernel || p.microseconds < best.microseconds) best = p;
    }
  }
  best.why = forced  ? "forced"
             : order ? "the least time of all rows and splits"
                     : "few rows or columns, but not contiguous along K: the least time of all tiles and splits";
  return best;
}

// All that a plan depends on. A model asks for the same few over and over: each thread keeps what it was last told.
using PlanKey = std::tuple<i64, i64, i64, i64, DType, Precision, bool, int, int, const CudaGemmKernel*, int>;
constexpr int kKeptBits = 6;
struct Kept {
  PlanKey key;
  CudaGemmPlan plan = {};  // of no kernel: nothing is kept
};
std::size_t kept_at(const GemmDesc& d) {
  std::uint64_t hash = static_cast<std::uint64_t>(d.dtype);
  for (i64 x : {d.M, d.N, d.K}) hash = (hash + static_cast<std::uint64_t>(x)) * 0x9e3779b97f4a7c15u;
  return static_cast<std::size_t>(hash >> (64 - kKeptBits));
}

}  // namespace

const std::vector<CudaGemmKernel>& cuda_gemm_kernels() {
#define CUDA_GEMM_KERNEL(name, dtype, precision, parts, m, n, warp_m, warp_n, depth, slots, blocks) \
  {#name,                                                                                           \
   DType::dtype,                                                                                    \
   Precision::precision,                                                                            \
   false,                                                                                           \
   parts,                                                                                           \
   m,                                                                                               \
   n,                                                                                               \
   depth,                                                                                           \
   (m / warp_m) * (n / warp_n) * 32,                                                                \
   shared_bytes(item_size(DType::dtype), parts, m, n, depth, slots),                                \
   blocks,                                                                                          \
   name},
#define CUDA_GEMM_DOT(name, dtype, rows)       \
  {#name,                                      \
   DType::dtype,                               \
   Precision::fma,                             \
   true,                                       \
   0,                                          \
   rows,                                       \
   kDotColumns,                                \
   kDotThreads * 16 / item_size(DType::dtype), \
   kDotThreads,                                \
   kDotThreads / 32 * rows * kDotColumns * 4,  \
   kDotBlocks,                                 \
   name},
  static const std::vector<CudaGemmKernel> table = {
#include "gemm/cuda/kernels.inc"
  };
#undef CUDA_GEMM_DOT
#undef CUDA_GEMM_KERNEL
  return table;
}

CudaGemmPlan cuda_gemm_plan(const GemmDesc& d, const Gpu& gpu, const CudaGemmKernel* forced, int splits) {
  if (d.pairs != 1 || d.packed) fail("fastdl.gemm: CUDA kernels take one pair of operands as they lie");
  if (forced && forced->dtype != d.dtype)
    fail("fastdl.gemm: kernel '", forced->name, "': expected ", dtype_name(forced->dtype), " operands, got ",
         dtype_name(d.dtype));
  if (forced && !takes(*forced, d))
    fail("fastdl.gemm: kernel '", forced->name, "': expected operands contiguous along K, got strides ", d.a_col,
         " of A and ", d.b_row, " of B");
  thread_local Kept kept[1 << kKeptBits];
  const PlanKey key = {d.M,    d.N,   d.K, d.batch, d.dtype, d.precision, along_k(d), gpu.sm, gpu.multiprocessors,
                       forced, splits};
  Kept& slot = kept[kept_at(d)];
  if (!slot.plan.kernel || slot.key != key) slot = {key, best_plan(d, gpu, forced, splits)};
  const CudaGemmPlan& best = slot.plan;
  if (best.blocks(std::max<i64>(1, d.batch)) > 0x7fffffff)
    fail("fastdl.gemm: expected at most 2^31 - 1 tiles, got ", best.blocks(d.batch));
  return best;
}

std::string describe(const GemmDesc& d, const CudaGemmPlan& p) {
  return concat("gemm ", describe(d), " -> ", p.kernel->name, ", ", p.tiles_m, " x ", p.tiles_n, " tiles, ", p.splits,
                " splits of ", p.split_depth, ", workspace ", p.workspace_bytes, " bytes, about ", p.microseconds,
                " us: ", p.why);
}

}  // namespace fastdl
