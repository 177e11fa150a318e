// Which kernel, which blocks, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>
#include <numeric>

#include "attention/attention.h"
#include "base/check.h"

namespace fastdl {
namespace {

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

// Register tiles of rows in a query block: a block of K and V is read from L2 for each tile and from L3 for each block.
constexpr i64 kStrips = 8;
// A region costs its team a few microseconds of waking and waiting: below this much work, one thread is faster.
constexpr double kSerialNanoseconds = 6000;

double serial_nanoseconds(const AttentionDesc& d) {
  const double scores = static_cast<double>(d.B) * d.H * (d.sequences ? d.total_q : d.Lq) * d.Lk;
  return scores * (static_cast<double>(d.D + d.Dv) * 2 + 20) / 100;  // 100 GFLOP/s
}

// Rows this many bytes apart fall on one or two sets of an L1 way (4096 bytes) and evict each other.
bool rows_collide(i64 stride) { return std::gcd<i64>(stride * 4, 4096) >= 2048; }

const AttentionKernel* find(Isa isa, DType dtype, AttentionKind kind) {
  for (const AttentionKernel& k : attention_kernels())
    if (k.isa <= isa && k.dtype == dtype && k.kind == kind) return &k;
  fail("fastdl.scaled_dot_product_attention: no kernel");
}

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
    return find(machine.isa, d.dtype, AttentionKind::kDecode);
  }
  *why = "highest level with a tile kernel";
  return find(machine.isa, d.dtype, AttentionKind::kTile);
}

// Each chunk of keys is one unit of work; its rows are all queries of a key head.
void plan_decode(const AttentionDesc& d, AttentionPlan* p) {
  const i64 rows = d.Lq * (d.H / std::max<i64>(1, d.Hkv)), o_row = round_up(d.Dv, 16);
  p->strips = 0;
  p->key_block = p->kernel->key_block;
  p->blocks = std::max<i64>(1, ceil_div(d.Lk, p->key_block));
  const i64 heads = (d.sequences ? d.sequences : d.B) * d.Hkv;
  p->shared_bytes = round_up(heads * p->blocks * rows * (o_row + 2) * 4, 4096);
  p->q_bytes = round_up(rows * d.D * 4, 4096);
  p->s_bytes = round_up(rows * (p->key_block + 16) * 4, 4096);
  p->row_bytes = round_up(2 * round_up(rows, 16) * 4, 4096);
}

}  // namespace

AttentionPlan attention_plan(const AttentionDesc& d, const Machine& machine, const AttentionKernel* forced) {
  AttentionPlan p = {};
  p.kernel = forced ? forced : choose(d, machine, &p.why);
  if (forced) p.why = "forced";
  const AttentionKernel& kernel = *p.kernel;
  if (kernel.dtype != d.dtype)
    fail("fastdl.scaled_dot_product_attention: kernel '", kernel.name, "': expected operands of its dtype");
  const bool decode = kernel.kind == AttentionKind::kDecode;
  if (decode && !decode_applies(d))
    fail("fastdl.scaled_dot_product_attention: kernel '", kernel.name,
         "': expected query, key and value contiguous along the last dimension");
  p.threads = serial_nanoseconds(d) < kSerialNanoseconds ? 1 : std::max(1, machine.threads);
  if (decode) {
    plan_decode(d, &p);
    return p;
  }
  p.strips = std::max<i64>(1, std::min(kStrips, ceil_div(d.Lq, kernel.mr)));
  p.blocks = ceil_div(d.Lk, kernel.key_block);
  p.key_block = round_up(std::max<i64>(1, ceil_div(d.Lk, std::max<i64>(1, p.blocks))), kernel.nr);
  p.pack_v = d.dtype != DType::f32 || d.v.col != 1 || rows_collide(d.v.row);

  constexpr i64 kSlack = 64;  // one vector: see GemmHelpers::pack
  const i64 steps = ceil_div(d.D, kernel.k_unit);
  const i64 k_block = p.key_block * steps * 4;
  const i64 v_block = p.pack_v ? ceil_div(p.key_block, kernel.k_unit) * round_up(d.Dv, kernel.nr) * 4 : 0;
  const i64 units = ceil_div(ceil_div(d.Lq, kernel.mr), p.strips) * (d.H / std::max<i64>(1, d.Hkv));
  p.keep_k = units > 1 && (k_block + v_block) * p.blocks <= std::max(machine.l2, machine.l3 / (2 * p.threads));
  const i64 kept = p.keep_k ? std::max<i64>(1, p.blocks) : 1;
  p.q_bytes = round_up(p.strips * kernel.mr * steps * 4 + kSlack, 4096);
  p.k_bytes = round_up(kept * k_block + kSlack, 4096);
  p.v_bytes = p.pack_v ? round_up(kept * v_block + kSlack, 4096) : 0;
  p.s_bytes = round_up(kernel.mr * (p.key_block + 16) * 4, 4096);
  p.o_bytes = round_up(p.strips * kernel.mr * round_up(d.Dv, 16) * 4, 4096);
  p.row_bytes = round_up(p.strips * 2 * 16 * 4 + kept, 4096);
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
    } else if (k.kind == AttentionKind::kDecode && chosen.kernel->kind == AttentionKind::kTile) {
      reason = "enough query rows for packing K to pay";
    }
    lost.push_back(concat(k.name, ": ", reason));
  }
  return lost;
}

std::string describe(const AttentionDesc& d, const AttentionPlan& p) {
  constexpr const char* kTypes[] = {"f32", "bf16", "f16"};
  constexpr const char* kMasks[] = {"none", "bool", "f32", "same"};
  return concat("attention ", kTypes[static_cast<int>(d.dtype)], " B=", d.B, " H=", d.H, "/", d.Hkv, " Lq=", d.Lq,
                " Lk=", d.Lk, " D=", d.D, "/", d.Dv, d.sequences ? concat(" sequences=", d.sequences) : std::string(),
                d.lo == INT64_MIN && d.hi == INT64_MAX ? "" : " window", " mask=", kMasks[static_cast<int>(d.mask)],
                " -> ", p.kernel->name, " strips=", p.strips, " key_block=", p.key_block, p.keep_k ? " keep" : "",
                p.pack_v ? " pack_v" : "", " threads=", p.threads, " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
