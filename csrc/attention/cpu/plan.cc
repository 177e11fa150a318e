// Which kernel, which blocks, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>
#include <cmath>
#include <new>

#include "attention/attention.h"
#include "attention/cpu/schedule.h"
#include "base/check.h"
#include "gemm/cpu/cost.h"

namespace fastdl {
namespace {

// Register tiles of rows in a query block: a block of K and V is read from L2 for each tile and from L3 for each block.
constexpr i64 kStrips = 8;
static_assert(kStrips <= kStripLimit);
double serial_nanoseconds(const AttentionDesc& d) {
  const double scores = static_cast<double>(d.B) * d.H * (d.sequences ? d.total_q : d.Lq) * d.Lk;
  return scores * (static_cast<double>(d.D + d.Dv) * 2 + 20) / 100;  // 100 GFLOP/s
}

// --- time of a score, in multiply-adds of the float32 FMA kernel ---------------------------------------------------
// Rounding an element of P or dS to a part: 5 instructions a vector of 16, two a cycle.
constexpr double kPartCost = 5;
// Scores are multiplied by this before exp: beyond it, what tiny parts lose of them would show.
constexpr float kMostScale = 0x1p20f;

bool decode_applies(const AttentionDesc& d) { return d.q.col == 1 && d.k.col == 1 && d.v.col == 1; }

// Reading K and V once for all rows of a group beats packing them, as long as the rows are few: packing an element
// costs about as much as 8 multiply-adds, the horizontal sums of a score as much as a quarter of its products.
constexpr i64 kDecodeRows = 16, kDecodeQueries = 4;
bool decode_pays(const AttentionDesc& d) {
  return d.Lq <= kDecodeQueries || d.Lq * (d.H / std::max<i64>(1, d.Hkv)) <= kDecodeRows;
}

const AttentionKernel* choose(const AttentionDesc& d, const Machine& machine, const char** why) {
  if (decode_applies(d) && decode_pays(d)) {
    *why = "few query rows, all contiguous along the head dimension: K and V are read once, in place";
    return &attention_row(machine.isa, d.dtype, d.precision, AttentionKind::kDecode);
  }
  return &attention_tile_row(d, machine.isa, false, why);
}

// Each chunk of keys is one unit of work; its rows are all queries of a key head.
void plan_decode(const AttentionDesc& d, AttentionPlan* p) {
  const i64 rows = d.Lq * (d.H / std::max<i64>(1, d.Hkv)), o_row = round_up(d.Dv, 16);
  p->strips = 0;
  p->key_block = p->kernel->key_block;
  p->blocks = std::max<i64>(1, ceil_div(d.Lk, p->key_block));
  const i64 heads = (d.sequences ? d.sequences : d.B) * d.Hkv;
  // Expanded keys take no memory: what they would take here may be beyond any, and any number.
  const double partial = static_cast<double>(heads * rows) * static_cast<double>(p->blocks * (o_row + 2) * 4);
  if (partial > 0x1p60) throw std::bad_alloc();
  p->shared_bytes = pages(heads * p->blocks * rows * (o_row + 2) * 4);
  p->q_bytes = pages(rows * d.D * 4);
  p->s_bytes = pages(rows * (p->key_block + 16) * 4);
  p->row_bytes = pages(2 * round_up(rows, 16) * 4);
}

}  // namespace

const AttentionKernel& attention_row(Isa isa, DType dtype, Precision precision, AttentionKind kind) {
  for (const AttentionKernel& k : attention_kernels())
    if (k.isa <= isa && k.dtype == dtype && k.precision <= precision && k.kind == kind) return k;
  fail("fastdl.scaled_dot_product_attention: no kernel");
}

double attention_tile_cost(const AttentionDesc& d, const AttentionKernel& k, bool backward) {
  const bool tiled = is_tiled(k);
  const double rows = static_cast<double>(std::max<i64>(1, d.Lq)), shared = rows * (d.H / std::max<i64>(1, d.Hkv));
  const auto depth = [&](i64 x, i64 unit) { return static_cast<double>(tiled ? round_up(x, unit) : x); };
  // S and dP sum over a head dimension, in steps of 32; the others have it as rows or columns of tiles.
  const double summed = depth(d.D, 32) + (backward ? depth(d.Dv, 32) : 0);
  const double across = (backward ? 2 * depth(d.D, 16) : 0) + depth(d.Dv, 16);
  const double waste = tiled ? static_cast<double>(round_up(d.Lq, 16)) / rows : 1;
  const double packed = static_cast<double>(backward ? 2 * d.D + d.Dv : d.D + d.Dv) * kPackCost;
  const double split = k.k_unit == 1 ? 0 : kPartCost * k.planes * (backward ? 3 : 1);  // P; or P, dS, dS turned
  return waste * (summed + across) / rate(k) + split + packed * k.planes / k.k_unit / shared;
}

const AttentionKernel& attention_tile_row(const AttentionDesc& d, Isa isa, bool backward, const char** why) {
  const AttentionKernel& first = attention_row(isa, d.dtype, d.precision, AttentionKind::kTile);
  *why = "highest level with a tile kernel";
  if (!is_tiled(first)) return first;
  const AttentionKernel& below = attention_row(Isa::kAvx512Bf16, d.dtype, Precision::fma, AttentionKind::kTile);
  if (first.helpers->suspects && !(std::abs(d.scale) <= kMostScale)) {
    *why = "a scale under which what bf16 parts lose would show";
    return below;
  }
  if (attention_tile_cost(d, first, backward) < attention_tile_cost(d, below, backward)) return first;
  *why = "too few rows or head dimensions too small to pay for tiles";
  return below;
}

const AttentionKernel* attention_exact_row(const AttentionKernel& k) {
  if (!k.helpers->suspects) return nullptr;
  return &attention_row(Isa::kAvx512, k.dtype, Precision::fma, AttentionKind::kTile);
}

AttentionPlan attention_plan(const AttentionDesc& d, const Machine& machine, const AttentionKernel* forced) {
  AttentionPlan p = {};
  p.kernel = forced ? forced : choose(d, machine, &p.why);
  if (forced) p.why = "forced";
  const AttentionKernel& kernel = *p.kernel;
  if (kernel.dtype != d.dtype)
    fail("fastdl.scaled_dot_product_attention: kernel '", kernel.name, "': expected operands of its dtype, ",
         dtype_name(kernel.dtype), ", got ", dtype_name(d.dtype));
  const bool decode = kernel.kind == AttentionKind::kDecode;
  if (decode && !decode_applies(d))
    fail("fastdl.scaled_dot_product_attention: kernel '", kernel.name,
         "': expected query, key and value contiguous along the last dimension");
  p.threads = team_for(serial_nanoseconds(d), machine);
  if (decode) {
    plan_decode(d, &p);
    return p;
  }
  p.strips = std::max<i64>(1, std::min(kStrips, ceil_div(d.Lq, kernel.mr)));
  p.blocks = ceil_div(d.Lk, kernel.key_block);
  p.key_block = round_up(std::max<i64>(1, ceil_div(d.Lk, std::max<i64>(1, p.blocks))), kernel.nr);
  p.pack_v = is_tiled(kernel) || d.dtype != DType::f32 || d.v.col != 1 || rows_collide(d.v.row);
  p.exact = attention_exact_row(kernel);

  constexpr i64 kSlack = 64;  // one vector: see GemmHelpers::pack
  const i64 line = steps(kernel, d.D);
  const i64 k_block = p.key_block * line * 4;
  const i64 v_block = p.pack_v ? steps(kernel, p.key_block) * round_up(d.Dv, kernel.nr) * 4 : 0;
  const i64 units = ceil_div(ceil_div(d.Lq, kernel.mr), p.strips) * (d.H / std::max<i64>(1, d.Hkv));
  p.keep_k = units > 1 && (k_block + v_block) * p.blocks <= std::max(machine.l2, machine.l3 / (2 * p.threads));
  const i64 kept = p.keep_k ? std::max<i64>(1, p.blocks) : 1;
  p.q_bytes = pages(p.strips * kernel.mr * line * 4 + kSlack);
  p.k_bytes = pages(kept * k_block + kSlack);
  p.v_bytes = p.pack_v ? pages(kept * v_block + kSlack) : 0;
  p.p_row = p.key_block + 16;
  p.s_bytes = pages(score_buffers(kernel) * kernel.mr * p.p_row * 4);
  if (kernel.planes > 1) {
    p.p_row = steps(kernel, p.key_block) + 16;  // 16: rows begin on different sets of L1
    p.p_bytes = pages(kernel.mr * p.p_row * 4);
  }
  p.o_bytes = pages(p.strips * kernel.mr * round_up(d.Dv, 16) * 4);
  p.row_bytes = pages(p.strips * 2 * row_slots(kernel) * 4 + kept);
  if (p.exact) {
    p.exact_q_floats = round_up(p.exact->mr * d.D, 16) + 16;
    p.exact_k_floats = round_up(p.key_block * d.D, 16) + 16;
    const i64 v_floats = p.key_block * round_up(d.Dv, p.exact->nr) + 16;
    p.exact_bytes = pages((p.exact_q_floats + p.exact_k_floats + v_floats) * 4);
  }
  return p;
}

std::vector<std::string> attention_candidates(const AttentionDesc& d, const Machine& machine,
                                              const AttentionPlan& chosen) {
  std::vector<std::string> lost;
  for (const AttentionKernel& k : attention_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype) continue;
    std::string reason = chosen.why;
    if (k.isa > machine.isa) {
      reason = concat("needs ", isa_name(k.isa));
    } else if (k.kind == AttentionKind::kDecode && !decode_applies(d)) {
      reason = "operands not contiguous along the head dimension";
    } else if (k.precision > d.precision) {
      reason = "less exact than asked";
    } else if (k.kind == AttentionKind::kDecode && chosen.kernel->kind == AttentionKind::kTile) {
      reason = "enough query rows for packing K to pay";
    } else if (k.kind == chosen.kernel->kind && k.kind == AttentionKind::kTile &&
               (is_tiled(k) || is_tiled(*chosen.kernel))) {
      const double times = attention_tile_cost(d, k, false) / attention_tile_cost(d, *chosen.kernel, false);
      reason = concat("estimated at ", std::round(times * 100) / 100, " times the time but for exp");
    }
    lost.push_back(concat(k.name, ": ", reason));
  }
  return lost;
}

std::string describe(const AttentionDesc& d, const AttentionPlan& p) {
  return concat("attention ", describe(d), " -> ", p.kernel->name, " strips=", p.strips, " key_block=", p.key_block,
                p.keep_k ? " keep" : "", p.pack_v ? " pack_v" : "", " threads=", p.threads,
                " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
