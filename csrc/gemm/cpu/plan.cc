// Which kernel, which blocks, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "gemm/gemm.h"

namespace fastdl {
namespace {

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }
// The smallest block of a multiple of `unit` that cuts `size` into as many blocks as `limit` would: no short last one.
i64 even_block(i64 size, i64 limit, i64 unit) {
  if (size <= limit) return round_up(size, unit);
  return round_up(ceil_div(size, ceil_div(size, limit)), unit);
}

// Packing an element costs about as much as this many multiply-adds: it is read, shuffled and written once.
constexpr double kPackCost = 8;
// A region costs its team a few microseconds of waking and waiting: below this much work, one thread is faster.
constexpr double kSerialNanoseconds = 6000;

double serial_nanoseconds(const GemmDesc& d) {
  const double m = d.M, n = d.N, k = d.K;
  return d.batch * (m * n * k * 2 / 100 + (m * k + k * n + m * n) * 4 / 30);  // 100 GFLOP/s, 30 GB/s
}

const GemmKernel* find(Isa isa, GemmKind kind) {
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= isa && k.kind == kind) return &k;
  return nullptr;
}

bool dot_applies(const GemmDesc& d) { return !d.packed && d.a_col == 1 && d.b_row == 1; }

// With few rows (or columns) transposing B costs more than the horizontal sums of the dot kernel.
constexpr i64 kDotRows = 32, kDotCols = 8;
bool dot_pays(const GemmDesc& d) { return d.M <= kDotRows || d.N <= kDotCols; }

const GemmKernel* choose(const GemmDesc& d, const Machine& machine, const char** why) {
  const GemmKernel* dot = find(machine.isa, GemmKind::kDot);
  if (dot && dot_applies(d) && dot_pays(d)) {
    *why = "few rows or columns, both operands contiguous along K: nothing to pack";
    return dot;
  }
  *why = d.packed ? "frozen pack" : "highest level with a tile kernel";
  return find(machine.isa, GemmKind::kTile);
}

// Cuts C into `parts` = grid_m x grid_n pieces so that the largest takes least, packing of its A and B included.
void choose_grid(const GemmDesc& d, const GemmKernel& kernel, int parts, GemmPlan* plan) {
  const i64 panels = ceil_div(d.N, kernel.nr);
  double best = -1;
  for (int gm = 1; gm <= parts; ++gm) {
    if (parts % gm) continue;
    const int gn = parts / gm;
    const double rows = static_cast<double>(ceil_div(d.M, gm));
    const double cols = static_cast<double>(ceil_div(panels, gn)) * kernel.nr;
    const double cost = rows * cols + kPackCost * (rows + (d.packed ? 0 : cols));
    if (best < 0 || cost < best) {
      best = cost;
      plan->grid_m = gm;
      plan->grid_n = gn;
    }
  }
}

}  // namespace

GemmPlan gemm_plan(const GemmDesc& d, const Machine& machine, const GemmKernel* forced) {
  GemmPlan p = {};
  p.kernel = forced ? forced : choose(d, machine, &p.why);
  if (forced) p.why = "forced";
  const GemmKernel& kernel = *p.kernel;
  const bool dot = kernel.kind == GemmKind::kDot;
  if (dot && !dot_applies(d))
    fail("fastdl.gemm: kernel '", kernel.name, "': expected operands contiguous along K and no pack, got A strides (",
         d.a_row, ", ", d.a_col, "), B strides (", d.b_row, ", ", d.b_col, ")", d.packed ? ", packed" : "");

  p.threads = serial_nanoseconds(d) < kSerialNanoseconds ? 1 : std::max(1, machine.threads);
  const i64 batch = std::max<i64>(1, d.batch);
  choose_grid(d, kernel, static_cast<int>(p.threads / std::gcd<i64>(batch, p.threads)), &p);

  const i64 rows = std::max<i64>(1, ceil_div(d.M, p.grid_m));  // of a part
  const i64 cols = std::max<i64>(1, std::min(d.N, ceil_div(ceil_div(d.N, kernel.nr), p.grid_n) * kernel.nr));
  p.tile_m = static_cast<int>(ceil_div(rows, ceil_div(rows, kernel.mr)));
  p.kc = std::max<i64>(1, even_block(d.K, kernel.kc, 8));

  // A block: half of L2, the other half is for the panel of B and C passing through.
  const i64 mc_limit = std::max<i64>(1, machine.l2 / 2 / (p.kc * 4) / p.tile_m) * p.tile_m;
  p.mc = even_block(rows, mc_limit, p.tile_m);
  const i64 tiles = ceil_div(rows, p.tile_m);

  // Column-major operands are packed for their locality, row-major A once enough columns share the cost.
  p.pack_a = !dot && cols > 4 * kernel.nr;
  p.pack_b = !dot && !d.packed && (d.b_col != 1 || tiles > 2);

  if (!p.pack_b) {
    p.nc = round_up(cols, kernel.nr);
  } else if (p.mc >= rows && d.b_col != 1) {
    p.nc = kernel.nr;  // each panel is used up while it is hot: pack it just before
  } else {
    // B block: a share of L3, at most 4 MiB.
    const i64 bytes = std::min<i64>(machine.l3 / (2 * p.threads), i64{4} << 20);
    p.nc = even_block(cols, std::max<i64>(kernel.nr, bytes / (p.kc * 4) / kernel.nr * kernel.nr), kernel.nr);
  }
  constexpr i64 kSlack = 64;  // one vector: see GemmKernel::pack
  p.a_bytes = p.pack_a ? round_up(p.mc * p.kc * 4 + kSlack, 4096) : 0;
  p.b_bytes = p.pack_b ? round_up(p.nc * p.kc * 4 + kSlack, 4096) : 0;
  return p;
}

std::vector<std::string> gemm_candidates(const GemmDesc& d, const Machine& machine, const GemmPlan& chosen) {
  std::vector<std::string> lost;
  for (const GemmKernel& k : gemm_kernels()) {
    if (&k == chosen.kernel) continue;
    std::string reason;
    if (k.isa > machine.isa) {
      reason = concat("needs ", isa_name(k.isa));
    } else if (k.kind == GemmKind::kDot && !dot_applies(d)) {
      reason = "operands not contiguous along K";
    } else if (k.kind == GemmKind::kDot && !dot_pays(d)) {
      reason = concat("more than ", kDotRows, " rows and ", kDotCols, " columns: packing B pays");
    } else {
      reason = chosen.why;
    }
    lost.push_back(concat(k.name, ": ", reason));
  }
  return lost;
}

std::string describe(const GemmDesc& d, const GemmPlan& p) {
  return concat("gemm f32 batch=", d.batch, " M=", d.M, " N=", d.N, " K=", d.K, " A(", d.a_row, ",", d.a_col, ") B(",
                d.b_row, ",", d.b_col, ")", d.packed ? " packed" : "", " -> ", p.kernel->name, " mc=", p.mc,
                " nc=", p.nc, " kc=", p.kc, " pack=", p.pack_a ? "A" : "", p.pack_b ? "B" : "",
                p.pack_a || p.pack_b ? "" : "none", " grid=", p.grid_m, "x", p.grid_n, " threads=", p.threads,
                " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
