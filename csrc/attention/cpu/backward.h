// The backward pass of attention: P = exp(S - lse), dP = dO V^T, dS = P .* (dP - delta),
// delta(i) = sum_d dO(i,d) * O(i,d);
// dV = P^T dO,   dQ = scale dS K,   dK = scale dS^T Q,   dmask = dS summed over what the mask is broadcast along
//
// With dropout P' = P .* keep / (1 - p) takes P's place in dV, and dP .* keep / (1 - p) that of dP; the softcap's slope
// is in dS for dQ and dK, not for dmask. Scores are computed again: memory is linear in the lengths. Each element is
// summed in an order that depends on the shape and the kernel alone.
#pragma once
#include <string>

#include "attention/attention.h"

namespace fastdl {

struct AttentionBackwardPlan {
  const AttentionKernel* kernel;
  const AttentionKernel* exact;  // as AttentionPlan::exact
  i64 strips;                    // register tiles of query rows in a query block
  i64 key_block;                 // keys that pass over all queries together
  i64 chunk, chunks;             // keys of a part of a key head, and parts: where heads are few
  int threads;
  i64 shared_bytes;  // dQ of every chunk, where there are several
  i64 q_bytes, o_bytes, k_bytes, v_bytes, s_bytes, sum_bytes, row_bytes, exact_bytes;  // scratch of a thread
  const char* why;

  i64 workspace_bytes() const { return shared_bytes + threads * per_thread_bytes(); }
  i64 per_thread_bytes() const {
    return q_bytes + o_bytes + k_bytes + v_bytes + s_bytes + sum_bytes + row_bytes + exact_bytes;
  }
};

AttentionBackwardPlan attention_backward_plan(const AttentionDesc& desc, const Machine& machine,
                                              const AttentionKernel* forced = nullptr);
// Floats of a row of dS along the keys, of a strip's scores (tiles: and of 32 rows of sums turned back).
i64 backward_ds_row(const AttentionKernel& kernel, const AttentionBackwardPlan& plan);
i64 backward_s_floats(const AttentionDesc& desc, const AttentionBackwardPlan& plan);
std::string describe(const AttentionDesc& desc, const AttentionBackwardPlan& plan);
void attention_backward_run(const AttentionDesc& desc, const AttentionBackwardPlan& plan, const AttentionArgs& args,
                            const AttentionGrads& grads);

}  // namespace fastdl
