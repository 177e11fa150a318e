#include "attention/cuda/plan.h"

#include <algorithm>

#include "attention/schedule.h"
#include "base/check.h"
#include "gemm/gemm.h"

namespace fastdl {

#define ATTENTION_FORWARD(name, dtype, depth, m, keys, split) \
  void name(const CudaAttentionArgs&, int blocks, int shared_bytes, const Stream&);
#define ATTENTION_GRAD(name, dtype, depth, keys) \
  void name(const CudaAttentionGradArgs&, int blocks, int shared_bytes, const Stream&);
#include "attention/cuda/kernels.inc"
#undef ATTENTION_FORWARD
#undef ATTENTION_GRAD

namespace {

constexpr const char* kOp = "fastdl.scaled_dot_product_attention";
constexpr i64 kLongest = i64{1} << 29;

constexpr CudaAttentionKernel forward_row(const char* name, DType dtype, int depth, int m, int keys, int split,
                                          decltype(CudaAttentionKernel::forward) run) {
  const int rows = 64 * m / split, item = item_size(dtype);
  return {name,
          dtype,
          split > 1 ? CudaAttentionKind::kDecode : CudaAttentionKind::kTile,
          depth,
          rows,
          keys,
          split,
          attention_forward_bytes(rows, keys, depth, item),
          0,
          run,
          nullptr};
}

constexpr CudaAttentionKernel grad_row(const char* name, DType dtype, int depth, bool keys,
                                       decltype(CudaAttentionKernel::grad) run) {
  const int item = item_size(dtype), cols = attention_stream_rows(item, depth);
  const int stage = attention_stage_bytes(cols, depth, item, keys);
  return {name,
          dtype,
          keys ? CudaAttentionKind::kKeyGrad : CudaAttentionKind::kQueryGrad,
          depth,
          kGradRows,
          cols,
          1,
          attention_still_bytes(depth, item) + stage,
          stage,
          nullptr,
          run};
}

bool packed(const AttentionDesc& d) { return d.sequences > 0; }

}  // namespace

const char* kind_name(CudaAttentionKind kind) {
  switch (kind) {
    case CudaAttentionKind::kTile:
      return "tile";
    case CudaAttentionKind::kDecode:
      return "decode";
    case CudaAttentionKind::kQueryGrad:
      return "query_grad";
    default:
      return "key_grad";
  }
}

const std::vector<CudaAttentionKernel>& cuda_attention_kernels() {
#define ATTENTION_FORWARD(name, dtype, depth, m, keys, split) \
  forward_row(#name, DType::dtype, depth, m, keys, split, name),
#define ATTENTION_GRAD(name, dtype, depth, keys) grad_row(#name, DType::dtype, depth, keys, name),
  static const std::vector<CudaAttentionKernel> table = {
#include "attention/cuda/kernels.inc"
  };
#undef ATTENTION_FORWARD
#undef ATTENTION_GRAD
  return table;
}

namespace {

// Rows of one head, in tiles; of packed sequences what no lengths exceed: each may end with a tile of its own.
i64 tiles_of(const AttentionDesc& d, i64 length, i64 rows) {
  return packed(d) ? length / rows + d.sequences : ceil_div(length, rows);
}

void check_sizes(const AttentionDesc& d) {
  if (d.Lq >= kLongest || d.Lk >= kLongest || d.B >= kLongest || d.H >= kLongest)
    fail(kOp, ": argument 'query': expected sizes below 2^29, got lengths ", d.Lq, " and ", d.Lk);
}

void check_blocks(i64 blocks) {
  if (blocks >= i64{1} << 31) fail(kOp, ": argument 'query': expected fewer than 2^31 tiles, got ", blocks);
}

// The row of that kind for this dtype with the least depth that does.
const CudaAttentionKernel& row_for(DType dtype, i64 D, i64 Dv, CudaAttentionKind kind) {
  const CudaAttentionKernel* best = nullptr;
  for (const CudaAttentionKernel& k : cuda_attention_kernels())
    if (k.kind == kind && k.dtype == dtype && k.depth >= std::max(D, Dv) && (!best || k.depth < best->depth)) best = &k;
  if (!best) fail(kOp, ": no kernel for head dimensions ", D, " and ", Dv);
  return *best;
}
const CudaAttentionKernel& row_for(const AttentionDesc& d, CudaAttentionKind kind) {
  return row_for(d.dtype, d.D, d.Dv, kind);
}

std::string too_large(const CudaAttentionKernel& k, const Gpu& gpu) {
  if (k.shared_bytes <= gpu.shared_bytes) return "";
  return concat("kernel ", k.name, " needs ", k.shared_bytes, " bytes of shared memory, a block has ",
                gpu.shared_bytes);
}

// Throws Error where the kernel does not run on this GPU.
void check_fits(const CudaAttentionKernel& k, const Gpu& gpu) {
  const std::string why = too_large(k, gpu);
  if (!why.empty()) fail(kOp, ": ", why);
}

// A second stage where two blocks of a multiprocessor have room for it, or where there is no room for two anyway.
int stages_of(const CudaAttentionKernel& k, const Gpu& gpu) {
  const int two = k.shared_bytes + k.stage_bytes;
  check_fits(k, gpu);
  if (two > gpu.shared_bytes) return 1;
  const auto blocks = [&](int bytes) { return gpu.shared_bytes_sm / (bytes + 1024); };
  return blocks(two) >= 2 || blocks(k.shared_bytes) < 2 ? 2 : 1;
}

}  // namespace

CudaAttentionPlan cuda_attention_plan(const AttentionDesc& d, const Gpu& gpu, const CudaAttentionKernel* forced) {
  constexpr i64 kFewRows = 64;      // of all heads that share K and V: above, a tile of 64 rows loses little
  constexpr i64 kTilesOfChunk = 4;  // at least: a piece costs about a tile to write and to combine
  constexpr i64 kMaxChunks = 64;
  check_sizes(d);
  const i64 group = d.Hkv ? d.H / d.Hkv : 1;
  // Of packed sequences the GPU alone knows the lengths: one query each, on average, is taken for decoding.
  const i64 queries = packed(d) && d.Lq <= d.sequences ? 1 : d.Lq, keys = packed(d) ? d.Lk / d.sequences : d.Lk;
  const bool few = queries * group <= kFewRows && (!packed(d) || queries <= 1);
  CudaAttentionPlan plan = {};
  plan.kernel = forced ? forced : &row_for(d, few ? CudaAttentionKind::kDecode : CudaAttentionKind::kTile);
  const CudaAttentionKernel& k = *plan.kernel;
  plan.why = forced ? "forced" : few ? "few query rows: keys over warps and blocks" : "tiles of query rows";
  if (!k.forward || k.dtype != d.dtype || k.depth < std::max(d.D, d.Dv))
    fail(kOp, ": argument 'kernel': ", k.name, " does not take this call");
  check_fits(k, gpu);
  plan.pack =
      k.kind == CudaAttentionKind::kDecode && d.Lq * group < kLongest ? static_cast<int>(std::max<i64>(1, group)) : 1;
  const i64 tiles = packed(d) ? d.Lq * plan.pack / k.rows + d.sequences : ceil_div(d.Lq * plan.pack, k.rows);
  plan.tiles = static_cast<int>(tiles);
  const i64 blocks = tiles * (d.H / plan.pack) * d.B;
  const i64 per_sm = std::min<i64>(gpu.shared_bytes_sm / (k.shared_bytes + 1024), 2);
  i64 chunks = 1;
  if (blocks > 0 && blocks < gpu.multiprocessors)  // else the GPU is full without
    chunks = std::clamp<i64>(gpu.multiprocessors * per_sm / blocks, 1,
                             std::clamp<i64>(keys / (kTilesOfChunk * k.cols), 1, kMaxChunks));
  plan.chunks = static_cast<int>(chunks);
  plan.slots = plan.chunks * k.split;
  plan.columns = static_cast<int>(ceil_div(d.Dv, attention_out_columns(k.depth, item_size(d.dtype))));
  plan.blocks = blocks * chunks * plan.columns;
  check_blocks(plan.blocks);
  if (plan.slots > 1) plan.workspace_bytes = plan.slots * d.B * d.H * d.Lq * (d.Dv + 2) * 4;
  return plan;
}

CudaAttentionBackwardPlan cuda_attention_backward_plan(const AttentionDesc& d, const Gpu& gpu) {
  check_sizes(d);
  CudaAttentionBackwardPlan plan = {};
  plan.query = &row_for(d, CudaAttentionKind::kQueryGrad);
  plan.query_stages = stages_of(*plan.query, gpu);
  plan.key = &row_for(d, CudaAttentionKind::kKeyGrad);
  plan.key_stages = stages_of(*plan.key, gpu);
  for (const auto& [length, heads] : {std::pair{d.Lq, d.H}, std::pair{d.Lk, d.Hkv}})
    check_blocks(tiles_of(d, length, kGradRows) * heads * d.B * 4);
  check_blocks(ceil_div(d.B * d.H * d.Lq, 4));  // of delta
  plan.workspace_bytes = d.B * d.H * d.Lq * 4;
  return plan;
}

std::string cuda_attention_refusal(DType dtype, i64 D, i64 Dv, const Gpu& gpu) {
  for (CudaAttentionKind kind : {CudaAttentionKind::kTile, CudaAttentionKind::kDecode, CudaAttentionKind::kQueryGrad,
                                 CudaAttentionKind::kKeyGrad}) {
    const std::string why = too_large(row_for(dtype, D, Dv, kind), gpu);
    if (!why.empty()) return why;
  }
  return "";
}

std::string describe(const AttentionDesc& d, const CudaAttentionPlan& p) {
  return concat("attention ", describe(d), " -> ", p.kernel->name, ", ", p.tiles, " tiles, ", p.chunks,
                " chunks of keys, ", p.blocks, " blocks, workspace ", p.workspace_bytes, " bytes: ", p.why);
}

std::string describe(const AttentionDesc& d, const CudaAttentionBackwardPlan& p) {
  return concat("attention backward ", describe(d), " -> ", p.query->name, ", ", p.key->name, ", workspace ",
                p.workspace_bytes, " bytes");
}

}  // namespace fastdl
