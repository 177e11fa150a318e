#include "attention/attention.h"

#include <atomic>

#include "attention/cpu/kernel_dropout.h"
#include "base/arena.h"
#include "base/check.h"
#include "base/log.h"
#include "base/parallel.h"

namespace fastdl {

#define ATTENTION_KERNEL(name, level, isa, dtype, precision, functions, kind, k_unit, k_step, planes, mr, nr, \
                         key_block, tile, tile_p)                                                             \
  namespace level {                                                                                           \
  void tile(const TileArgs&);                                                                                 \
  void tile_p(const TileArgs&);                                                                               \
  extern const GemmHelpers helpers_##functions;                                                               \
  extern const AttentionOps attention_##functions;                                                            \
  extern const AttentionGradOps attention_grad_##functions;                                                   \
  }
#include "attention/cpu/kernels.inc"
#undef ATTENTION_KERNEL

const std::vector<AttentionKernel>& attention_kernels() {
#define ATTENTION_KERNEL(name, level, isa, dtype, precision, functions, kind, k_unit, k_step, planes, mr, nr, \
                         key_block, tile, tile_p)                                                             \
  {#name,                                                                                                     \
   Isa::isa,                                                                                                  \
   DType::dtype,                                                                                              \
   Precision::precision,                                                                                      \
   AttentionKind::kind,                                                                                       \
   k_unit,                                                                                                    \
   k_step,                                                                                                    \
   planes,                                                                                                    \
   mr,                                                                                                        \
   nr,                                                                                                        \
   key_block,                                                                                                 \
   level::tile,                                                                                               \
   level::tile_p,                                                                                             \
   &level::helpers_##functions,                                                                               \
   &level::attention_##functions,                                                                             \
   &level::attention_grad_##functions},
  static const std::vector<AttentionKernel> table = {
#include "attention/cpu/kernels.inc"
  };
#undef ATTENTION_KERNEL
  return table;
}

const char* kind_name(AttentionKind kind) { return kind == AttentionKind::kTile ? "tile" : "decode"; }

namespace {
std::atomic<i64> g_recomputed{0};
}

CallCounts<AttentionKernel>& attention_calls() {
  static CallCounts<AttentionKernel> counts(attention_kernels());
  return counts;
}

i64 attention_recomputed() { return g_recomputed.load(std::memory_order_relaxed); }
void attention_count_recomputed(i64 scores) { g_recomputed.fetch_add(scores, std::memory_order_relaxed); }

AttentionSpan attention_span(const AttentionDesc& d, const AttentionArgs& args, i64 sequence) {
  AttentionSpan s = {0, 0, d.Lq, d.Lk, 0};
  if (d.sequences) {
    s.q_begin = args.seq_q[sequence], s.k_begin = args.seq_k[sequence];
    s.Lq = args.seq_q[sequence + 1] - s.q_begin, s.Lk = args.seq_k[sequence + 1] - s.k_begin;
  }
  if (d.align_end) s.offset = s.Lk - s.Lq;
  return s;
}

void advise_result(void* data, const AttentionStrides& step, i64 batch, i64 heads, i64 rows, i64 depth, DType dtype) {
  if (!data || batch == 0 || heads == 0 || rows == 0 || step.batch < 0 || step.head < 0 || step.row < 0) return;
  const i64 elements = (batch - 1) * step.batch + (heads - 1) * step.head + (rows - 1) * step.row + depth;
  advise_huge_pages(data, elements * item_size(dtype));
}

AttentionPlan attention(const AttentionDesc& d, const AttentionArgs& args, const AttentionKernel* forced, int threads) {
  const Machine machine = this_machine(threads);
  const AttentionPlan plan = attention_plan(d, machine, forced);
  if (log_enabled()) log_once(describe(d, plan), attention_candidates(d, machine, plan));
  attention_calls().add(*plan.kernel);
  advise_result(args.out, d.out, d.B, d.H, d.sequences ? d.total_q : d.Lq, d.Dv, d.dtype);
  attention_run(d, plan, args);
  return plan;
}

void attention_keep(bool* keep, i64 B, i64 H, i64 Lq, i64 Lk, double dropout_p, std::uint64_t seed) {
  const std::uint64_t threshold = dropout_threshold(dropout_p);
  for (i64 b = 0; b < B; ++b)
    for (i64 h = 0; h < H; ++h)
      for (i64 i = 0; i < Lq; ++i) {
        const std::uint64_t key = dropout_row_key(seed, b, h, i);
        for (i64 j = 0; j < Lk; ++j) *keep++ = dropout_bits<1>(key, static_cast<unsigned>(j)) >= threshold;
      }
}

}  // namespace fastdl
