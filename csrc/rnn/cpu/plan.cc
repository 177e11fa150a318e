// Which kernel, how much scratch, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "gemm/cpu/cost.h"
#include "rnn/rnn.h"

namespace fastdl {
namespace {

i64 bytes(i64 floats) { return pages(floats * 4); }

// Below this much work a step, the barrier that ends it and the lines of h that change hands cost more than a second
// thread gains.
constexpr double kSerialStep = 2500;

// Few steps of few rows do not pay for packing W_hh, which costs as much as kPackCost rows (each part of it that).
// Forward, dot products read it in place, at kDotSums multiply-adds for the horizontal sums of each element; backward,
// tiles read its rows. Both need h as it lies in memory.
constexpr i64 kDotSums = 80, kDirectTiles = 2;
const GemmKernel* direct_kernel(const RnnDesc& d, const RnnKernel& kernel, const GemmKernel& product) {
  const bool same_form = !is_tiled(kernel) && (kernel.k_unit == 2 || d.dtype == DType::f32);
  if (!d.w_rows || !same_form) return nullptr;
  if (d.backward) {
    const bool few = kernel.k_unit == 1 && d.T <= kDirectTiles && d.T * ceil_div(d.B, product.mr) <= kDirectTiles;
    return few ? &product : nullptr;
  }
  if (d.T > d.P || d.B > d.P || static_cast<double>(d.T * d.B * kDotSums) > kPackCost * static_cast<double>(d.P))
    return nullptr;
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= kernel.isa && k.dtype == d.dtype && k.kind == GemmKind::kDot) return &k;
  return nullptr;
}

double step_nanoseconds(const RnnDesc& d, const RnnKernel& kernel) {
  const double weights = static_cast<double>(kernel.gates()) * d.H * d.P + (d.projected ? d.P * d.H : 0);
  const double cells = static_cast<double>(d.B) * d.H * kernel.gates();
  return std::max(weights * d.B * 2 / 100, weights * 4 / 60) + cells * 0.4;  // 100 GFLOP/s, 60 GB/s
}

// --- time, in multiply-adds of the float32 FMA kernel for each element of W_hh --------------------------------------
// Threads share W_hh, but the kernel must not depend on their number, since results would: it counts as in L2 where two
// cores' hold it.
constexpr i64 kCores = 2;

double work(const RnnDesc& d, const RnnKernel& kernel) {
  if (!is_tiled(kernel)) return static_cast<double>(d.B) / kernel.k_unit;
  return static_cast<double>(round_up(d.B, 16)) * tile_products(d.dtype, kernel.planes) / kTileRate;
}

// Whichever of the two, products or reading W, takes longer, and packing.
double cost(const RnnDesc& d, const RnnKernel& kernel, const Machine& machine) {
  const double bytes = 4.0 * kernel.planes / kernel.k_unit;
  const double weights = static_cast<double>(kernel.gates()) * static_cast<double>(d.H) * static_cast<double>(d.P);
  const double byte = bytes * weights <= static_cast<double>(kCores * machine.l2) ? kL2Byte : kL3Byte;
  return static_cast<double>(d.T) * std::max(work(d, kernel), bytes * byte) + pack_cost(kernel);
}

// The first row of the highest level, tiles or not, that is as exact as asked.
const RnnKernel* find(const RnnDesc& d, Isa isa, bool tiled) {
  for (const RnnKernel& k : rnn_kernels())
    if (k.isa <= isa && k.dtype == d.dtype && k.cell == d.cell && k.precision <= d.precision && is_tiled(k) == tiled)
      return &k;
  return nullptr;
}

const RnnKernel* choose(const RnnDesc& d, const Machine& machine, const char** why) {
  const RnnKernel* const tiles = find(d, machine.isa, true);
  const RnnKernel* const rows = find(d, machine.isa, false);
  *why = "the level's own for this cell and dtype";
  if (!tiles) return rows;
  if (direct_kernel(d, *rows, gemm_pack_kernel(rows->isa, d.dtype))) {
    *why = "too few steps and rows to pay for packing";
    return rows;
  }
  const double times = cost(d, *tiles, machine) / cost(d, *rows, machine);
  if (times < 1 || (times == 1 && work(d, *tiles) < work(d, *rows))) return tiles;
  *why = "too few rows, or weights too large, to pay for tiles";
  return rows;
}

}  // namespace

RnnColumns rnn_packed_columns(const RnnDesc& d, const RnnKernel& kernel, const GemmKernel& product) {
  const i64 w = d.backward ? round_up(d.P, product.nr) : ceil_div(d.H, kernel.units()) * kernel.columns();
  return {w, d.projected ? round_up(d.backward ? d.H : d.P, product.nr) : 0};
}

RnnPlan rnn_plan(const RnnDesc& d, const Machine& machine, const RnnKernel* forced) {
  RnnPlan p = {};
  p.kernel = forced;
  p.why = "forced";
  if (!forced) p.kernel = choose(d, machine, &p.why);
  const RnnKernel& kernel = *p.kernel;
  if (kernel.dtype != d.dtype || kernel.cell != d.cell)
    fail("fastdl.rnn: kernel '", kernel.name, "': expected ", rnn_cell_name(kernel.cell), " in ",
         dtype_name(kernel.dtype), ", got ", rnn_cell_name(d.cell), " in ", dtype_name(d.dtype));
  p.product = &gemm_pack_kernel(kernel.isa, d.dtype, kernel.precision);

  p.direct = direct_kernel(d, kernel, *p.product);
  const bool serial = d.T == 0 || step_nanoseconds(d, kernel) < kSerialStep;
  p.threads = serial ? 1 : std::max(1, machine.threads);
  const i64 row_tiles = is_tiled(kernel) ? 2 : 4;  // sums of a block stay in L1
  p.row_block = std::min<i64>(std::max<i64>(1, d.B), row_tiles * kernel.mr);

  // Tiles are loaded whole, 16 rows each.
  const i64 rows = is_tiled(kernel) ? round_up(d.B, 16) : d.B;
  const auto operand = [&](i64 K) { return rows * rnn_padded(kernel.row_steps(K)); };
  const auto packed = [&](i64 K, i64 N) {
    return round_up(N, p.product->nr) * kernel.steps(K) + 16;
  };  // slack: a vector
  const i64 blocks = ceil_div(d.H, kernel.units()), gates = kernel.gates() * d.H;
  if (kernel.split()) p.repair = &gemm_pack_kernel(Isa::kAvx512, d.dtype, Precision::fma);
  if (d.backward) {
    p.w_bytes = p.direct ? 0 : bytes(packed(gates, d.P));
    p.r_bytes = d.projected ? bytes(packed(d.P, d.H)) : 0;
    p.h_bytes = bytes(2 * operand(gates));
    p.hidden_bytes = d.projected ? bytes(operand(d.P) + d.B * rnn_padded(d.H)) : 0;
    p.state_bytes = bytes(d.B * rnn_padded(d.P));
    p.sum_bytes = p.repair ? bytes(d.B * p.product->nr) : 0;
  } else {
    p.w_bytes = p.direct ? 0 : bytes(blocks * kernel.columns() * kernel.steps(d.P));
    p.r_bytes = d.projected ? bytes(packed(d.H, d.P)) : 0;
    p.h_bytes = bytes(2 * operand(d.P));
    p.hidden_bytes = d.projected ? bytes(operand(d.H)) : 0;
    p.state_bytes = d.projected ? bytes(d.B * rnn_padded(d.P)) : 0;
    p.bias_bytes = bytes(blocks * kernel.columns());
    // The sums of a projection are repaired beside C, those of a block where they are.
    p.sum_bytes = bytes(std::max(p.row_block * kernel.columns(), p.repair && d.projected ? d.B * p.product->nr : 0));
  }
  p.c_bytes = d.cell == RnnCell::lstm ? bytes(d.B * rnn_padded(d.H)) : 0;
  if (p.has_peaks()) {
    const RnnColumns columns = rnn_packed_columns(d, kernel, *p.product);
    p.peak_bytes = bytes(columns.w + columns.r + (d.projected ? 3 : 2) * p.threads * d.B);
  }
  // The sums of a tile by FMA, 16 columns at a time, a K block of those; the largest magnitudes of rows.
  if (p.repair) p.repair_bytes = bytes(kernel.mr * 16 + p.repair->kc * 16 + 16 + d.B);
  return p;
}

std::vector<std::string> rnn_candidates(const RnnDesc& d, const Machine& machine, const RnnPlan& chosen) {
  std::vector<std::string> lost;
  for (const RnnKernel& k : rnn_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype || k.cell != d.cell) continue;
    std::string reason = "a lower level";
    if (k.isa > machine.isa) {
      reason = concat("needs ", isa_name(k.isa));
    } else if (k.precision > d.precision) {
      reason = "less exact than asked";
    } else if (is_tiled(k) || (is_tiled(*chosen.kernel) && &k == find(d, machine.isa, false))) {
      const double times = cost(d, k, machine) / cost(d, *chosen.kernel, machine);
      reason = concat("estimated at ", std::round(times * 100) / 100, " times the time");
    }
    lost.push_back(concat(k.name, ": ", reason));
  }
  return lost;
}

std::string describe(const RnnDesc& d, const RnnPlan& p) {
  return concat(describe(d), " -> ", p.kernel->name, " product=", p.product->name,
                " W=", p.direct ? p.direct->name : "packed", " rows=", p.row_block, " threads=", p.threads,
                " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
