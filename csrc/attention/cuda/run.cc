#include <algorithm>

#include "attention/cuda/plan.h"
#include "attention/schedule.h"
#include "base/check.h"

namespace fastdl {

#define ATTENTION_DECLARE(dtype)                                                       \
  void attention_combine_##dtype(const CudaAttentionArgs&, int blocks, const Stream&); \
  void attention_delta_##dtype(const CudaAttentionDeltaArgs&, int blocks, const Stream&);
ATTENTION_DECLARE(bf16)
ATTENTION_DECLARE(f16)
ATTENTION_DECLARE(f32)
#undef ATTENTION_DECLARE

namespace {

constexpr int kWarpsOfBlock = 4;

// Whether cp.async may read 16 bytes at each multiple of 16 of every row.
bool is_vector(const void* data, const AttentionStrides& step, DType dtype) {
  const i64 unit = 16 / item_size(dtype);
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && step.col == 1 && step.batch % unit == 0 &&
         step.head % unit == 0 && step.row % unit == 0;
}

CudaAttentionProblem problem_of(const AttentionDesc& d, const AttentionArgs& args, const CudaSequences& sequences) {
  constexpr i64 kFar = i64{1} << 29;
  CudaAttentionProblem p = {};
  p.q = args.q, p.k = args.k, p.v = args.v, p.mask = args.mask;
  p.seq_q = sequences.q, p.seq_k = sequences.k, p.sequences = static_cast<int>(d.sequences);
  p.q_step = d.q, p.k_step = d.k, p.v_step = d.v, p.B = static_cast<int>(d.B), p.H = static_cast<int>(d.H),
  p.Hkv = static_cast<int>(std::max<i64>(1, d.Hkv));
  p.Lq = static_cast<int>(d.Lq), p.Lk = static_cast<int>(d.Lk), p.D = static_cast<int>(d.D);
  p.Dv = static_cast<int>(d.Dv);
  p.lo = static_cast<int>(std::clamp(d.lo, -kFar, kFar)), p.hi = static_cast<int>(std::clamp(d.hi, -kFar, kFar));
  p.align_end = d.align_end, p.plain = plain(d);
  p.mask_item = d.mask == MaskKind::none      ? 0
                : d.mask == MaskKind::boolean ? 1
                : d.mask == MaskKind::f32     ? 4
                                              : item_size(d.dtype);
  p.parts = d.precision == Precision::tf32 ? 2 : d.precision == Precision::bf16 ? 1 : 3;
  const AttentionStrides& m = d.mask_step;
  p.mask_step = {m.batch * p.mask_item, m.head * p.mask_item, m.row * p.mask_item, m.col * p.mask_item};
  p.vector_q = is_vector(p.q, d.q, d.dtype), p.vector_k = is_vector(p.k, d.k, d.dtype);
  p.vector_v = is_vector(p.v, d.v, d.dtype);
  constexpr float kLog2OfE = 1.44269504f;
  p.scale = d.scale, p.softcap = d.softcap, p.inverse_softcap = d.softcap > 0 ? 1 / d.softcap : 0;
  p.factor = p.plain ? d.scale * kLog2OfE : kLog2OfE, p.keep_factor = dropout_factor(d);
  p.seed = d.seed, p.threshold = dropout_threshold(d.dropout_p);
  return p;
}

int blocks_of_rows(const AttentionDesc& d) { return static_cast<int>(ceil_div(d.B * d.H * d.Lq, kWarpsOfBlock)); }

}  // namespace

void cuda_attention_run(const AttentionDesc& d, const CudaAttentionPlan& plan, const AttentionArgs& args,
                        const CudaSequences& sequences, void* workspace, const Stream& stream) {
  if (plan.blocks == 0) return;
  CudaAttentionArgs a = {};
  a.p = problem_of(d, args, sequences);
  a.out = args.out, a.out_step = d.out, a.lse = args.lse, a.parts = static_cast<float*>(workspace);
  a.tiles = plan.tiles, a.chunks = plan.chunks, a.slots = plan.slots, a.pack = plan.pack;
  a.columns = plan.columns;
  plan.kernel->forward(a, static_cast<int>(plan.blocks), plan.kernel->shared_bytes, stream);
  if (plan.slots == 1 || blocks_of_rows(d) == 0) return;  // packed sequences have blocks without rows, too
  const auto combine = d.dtype == DType::bf16  ? attention_combine_bf16
                       : d.dtype == DType::f16 ? attention_combine_f16
                                               : attention_combine_f32;
  combine(a, blocks_of_rows(d), stream);
}

void cuda_attention_backward_run(const AttentionDesc& d, const CudaAttentionBackwardPlan& plan,
                                 const AttentionArgs& args, const AttentionGrads& grads, const i64 (&dmask_sizes)[4],
                                 const CudaSequences& sequences, void* workspace, const Stream& stream) {
  float* const delta = static_cast<float*>(workspace);
  if (d.B * d.H * d.Lq > 0) {
    const CudaAttentionDeltaArgs a = {grads.dout,
                                      args.out,
                                      delta,
                                      grads.dout_step,
                                      d.out,
                                      static_cast<int>(d.B),
                                      static_cast<int>(d.H),
                                      static_cast<int>(d.Lq),
                                      static_cast<int>(d.Dv)};
    const auto run = d.dtype == DType::bf16  ? attention_delta_bf16
                     : d.dtype == DType::f16 ? attention_delta_f16
                                             : attention_delta_f32;
    run(a, blocks_of_rows(d), stream);
  }
  CudaAttentionGradArgs a = {};
  a.p = problem_of(d, args, sequences);
  a.p.vector_dout = is_vector(grads.dout, grads.dout_step, d.dtype);
  a.dout = grads.dout, a.dout_step = grads.dout_step, a.lse = args.lse, a.delta = delta;
  const auto pass = [&](const CudaAttentionKernel& k, int stages, i64 length, i64 heads) {
    const i64 tiles = d.sequences > 0 ? length / k.rows + d.sequences : ceil_div(length, k.rows);
    if (tiles * heads * d.B == 0) return;
    a.tiles = static_cast<int>(tiles), a.stages = stages;
    a.parts = static_cast<int>(ceil_div(std::max(d.D, d.Dv), attention_sum_columns(k.depth, item_size(d.dtype))));
    k.grad(a, static_cast<int>(tiles * heads * d.B * a.parts), k.shared_bytes + (stages - 1) * k.stage_bytes, stream);
  };
  if (grads.dq) {
    a.first = grads.dq, a.first_step = grads.dq_step;
    pass(*plan.query, plan.query_stages, d.Lq, d.H);
  }
  a.first = grads.dk, a.first_step = grads.dk_step, a.second = grads.dv, a.second_step = grads.dv_step;
  if (grads.dk || grads.dv) pass(*plan.key, plan.key_stages, d.Lk, d.Hkv);
  if (grads.dmask) {
    const CudaAttentionKernel& k = *plan.query;
    a.dmask = grads.dmask, a.dmask_step = grads.dmask_step;
    a.mask_B = static_cast<int>(dmask_sizes[0]), a.mask_H = static_cast<int>(dmask_sizes[1]);
    a.mask_Lq = static_cast<int>(dmask_sizes[2]), a.mask_Lk = static_cast<int>(dmask_sizes[3]);
    const i64 blocks =
        dmask_sizes[0] * dmask_sizes[1] * ceil_div(dmask_sizes[2], k.rows) * ceil_div(dmask_sizes[3], k.cols);
    if (blocks >= i64{1} << 31) fail("fastdl.scaled_dot_product_attention: argument 'mask': too many tiles, ", blocks);
    a.stages = plan.query_stages;
    if (blocks > 0) k.grad(a, static_cast<int>(blocks), k.shared_bytes + (a.stages - 1) * k.stage_bytes, stream);
  }
}

}  // namespace fastdl
