// Blocks, parts and scratch of the backward pass. Pure: everything follows from the problem and the machine given.
#include <algorithm>

#include "attention/cpu/backward.h"
#include "attention/cpu/schedule.h"
#include "base/check.h"
#include "base/log.h"
#include "gemm/cpu/cost.h"

namespace fastdl {
namespace {

constexpr i64 kStrips = 8;      // of a query block: scores and dP of a block, kept while dK and dV take them
constexpr i64 kKeyBlock = 224;  // 7 panels of 32 keys, 16 tiles of 14
// Of tiles: P and dS of a query block fill half of L2, so that sums are read and written rarely.
constexpr i64 kMostTileStrips = 16;
constexpr i64 kParts = 32, kMostChunks = 8;  // parts to aim at, whatever the team
constexpr i64 kLeastChunk = 512;             // keys: dQ passes through memory once more for each chunk
constexpr i64 kMostShared = i64{1} << 27;    // bytes of dQ of all chunks

}  // namespace

i64 backward_ds_row(const AttentionKernel& kernel, const AttentionBackwardPlan& p) {
  return is_tiled(kernel) ? steps(kernel, p.key_block) + 16 : (p.key_block + 16) / 2;
}
i64 backward_s_floats(const AttentionDesc& d, const AttentionBackwardPlan& p) {
  const i64 scores = p.kernel->mr * (p.key_block + 16);
  return is_tiled(*p.kernel) ? std::max(scores, p.kernel->nr * round_up(std::max(d.D, d.Dv), 16)) : scores;
}

AttentionBackwardPlan attention_backward_plan(const AttentionDesc& d, const Machine& machine,
                                              const AttentionKernel* forced) {
  AttentionBackwardPlan p = {};
  p.kernel = forced ? forced : &attention_tile_row(d, machine.isa, true, &p.why);
  if (forced) p.why = "forced";
  const AttentionKernel& kernel = *p.kernel;
  if (kernel.dtype != d.dtype)
    fail("fastdl.scaled_dot_product_attention: kernel '", kernel.name, "': expected operands of its dtype, ",
         dtype_name(kernel.dtype), ", got ", dtype_name(d.dtype));
  if (kernel.kind != AttentionKind::kTile)
    fail("fastdl.scaled_dot_product_attention: kernel '", kernel.name, "': expected a tile kernel for the gradients");

  const bool tiled = is_tiled(kernel);
  const i64 unit = kernel.k_unit, nr = kernel.nr, group = d.H / std::max<i64>(1, d.Hkv);
  const i64 most = tiled ? kernel.key_block : kKeyBlock;
  p.key_block = round_up(std::max<i64>(1, ceil_div(d.Lk, std::max<i64>(1, ceil_div(d.Lk, most)))), nr);
  const i64 s_row = p.key_block + 16, p_strip = tiled ? steps(kernel, kernel.mr) * s_row : kernel.mr * s_row;
  const i64 most_strips = tiled ? std::clamp<i64>(machine.l2 / 2 / (2 * p_strip * 4), 1, kMostTileStrips) : kStrips;
  p.strips = std::max<i64>(1, std::min(most_strips, ceil_div(d.Lq, kernel.mr)));
  p.exact = attention_exact_row(kernel);
  const i64 dp = round_up(d.D, 16), dvp = round_up(d.Dv, 16);  // rows of sums

  const i64 heads = std::max<i64>(1, (d.sequences ? d.sequences : d.B) * d.Hkv);
  const i64 partial = d.H * (d.sequences ? d.total_q : d.B * d.Lq) * dp * 4;
  p.chunks =
      std::min({ceil_div(kParts, heads), kMostChunks, d.Lk / kLeastChunk, kMostShared / std::max<i64>(1, partial)});
  p.chunks = std::max<i64>(1, p.chunks);
  p.chunk = std::max<i64>(1, ceil_div(ceil_div(d.Lk, p.chunks), p.key_block)) * p.key_block;
  p.chunks = std::max<i64>(1, ceil_div(d.Lk, p.chunk));
  p.shared_bytes = p.chunks > 1 ? pages(p.chunks * partial) : 0;

  const double scores = static_cast<double>(heads * group) * d.Lq * d.Lk;
  const double nanoseconds = scores * (static_cast<double>(3 * d.D + 2 * d.Dv) * 2 + 40) / 100;  // 100 GFLOP/s
  p.threads = team_for(nanoseconds, machine);

  constexpr i64 kSlack = 64;  // one vector: see GemmHelpers::pack
  const auto buffer = [](i64 floats) { return pages(floats * 4 + kSlack); };
  const i64 q_units = steps(kernel, d.Lq), k_units = steps(kernel, p.key_block), q_rows = lines(kernel, d.Lq);
  const i64 q_line = steps(kernel, d.D), o_line = steps(kernel, d.Dv);
  // Of a query head: rows as strips (A of S and dP) and as panels (B of dK and dV, or A of their transposes). Of a key
  // block: panels along D for S, along the keys for dQ; V along Dv.
  p.q_bytes = buffer(q_rows * q_line) + buffer(q_units * round_up(d.D, nr));
  p.o_bytes = buffer(q_rows * o_line) + buffer(q_units * round_up(d.Dv, nr));
  p.k_bytes = buffer(p.key_block * q_line) + buffer(k_units * round_up(d.D, nr));
  p.v_bytes = buffer(p.key_block * o_line);
  p.s_bytes = 2 * buffer(p.strips * p_strip);  // P and dS: float32, or as pairs (then dS as 16 bits in the second half)
  if (unit == 2) p.s_bytes += (tiled ? 4 : 2) * buffer(backward_s_floats(d, p));  // S and dP of a strip, or two in turn
  if (tiled) p.s_bytes += buffer(kernel.mr * backward_ds_row(kernel, p));         // the strip's dS as parts
  p.row_bytes = buffer(d.Lq) + (p.exact ? buffer(2 * ceil_div(d.Lq, kernel.mr)) : 0);
  const i64 keys = group != 1 ? std::min(p.chunk, round_up(d.Lk, nr)) : p.key_block;
  p.sum_bytes = buffer(p.chunks > 1 ? 0 : d.Lq * dp) + buffer(keys * dp) + buffer(keys * dvp);
  if (p.exact) {
    const i64 mr = p.exact->mr, panels = p.key_block * round_up(d.D, nr);
    p.exact_bytes = buffer(mr * d.D) + buffer(mr * d.Dv) + buffer(p.key_block * d.D) + buffer(p.key_block * d.Dv);
    p.exact_bytes += buffer(panels);
  }
  return p;
}

std::string describe(const AttentionDesc& d, const AttentionBackwardPlan& p) {
  return concat("attention backward ", describe(d), " -> ", p.kernel->name, " strips=", p.strips,
                " key_block=", p.key_block, " chunks=", p.chunks, " threads=", p.threads,
                " workspace=", p.workspace_bytes(), "B: ", p.why);
}

void attention_backward(const AttentionDesc& d, const AttentionArgs& args, const AttentionGrads& grads,
                        const AttentionKernel* forced, int threads) {
  const AttentionBackwardPlan plan = attention_backward_plan(d, this_machine(threads), forced);
  if (log_enabled()) log_once(describe(d, plan));
  attention_calls().add(*plan.kernel);
  const i64 rows = d.sequences ? d.total_q : d.Lq, keys = d.sequences ? d.total_k : d.Lk;
  advise_result(grads.dq, grads.dq_step, d.B, d.H, rows, d.D, d.dtype);
  advise_result(grads.dk, grads.dk_step, d.B, d.Hkv, keys, d.D, d.dtype);
  advise_result(grads.dv, grads.dv_step, d.B, d.Hkv, keys, d.Dv, d.dtype);
  attention_backward_run(d, plan, args, grads);
}

}  // namespace fastdl
