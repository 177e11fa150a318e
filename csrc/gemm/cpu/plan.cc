// Which kernel, which blocks, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "gemm/cpu/cost.h"
#include "gemm/gemm.h"

namespace fastdl {
namespace {

// Reading an element of a frozen pack costs as much as this many multiply-adds, from memory. (Zen 4, 2 x 4096 x 4096 on
// two threads: 5.3 ms where each reads the whole pack, 1.4 where each reads a half.)
constexpr double kReadCost = 4;
// Sums of a part that are kept in float32 beside C: 4 MiB, so that packing costs each of its operands below 1%.
// Not for float32, whose sums are C itself: parts of 4, 16 or 32 MB make no difference. (Zen 4, 4096^3 87 / 89 / 89% of
// the FMA peak, 2048^3 90 / 89 / 89, 512 x 14336 x 4096 87 / 87 / 87.)
constexpr i64 kSumElements = i64{1} << 20;
// Columns that the dot kernel, whose tiles are four wide, finishes at a time. (bfloat16, 32 x 512 x 512, Zen 4: 0.080
// -> 0.069 ms.)
constexpr i64 kDotFinish = 64;
// Sums of float32 over more than this along K are taken apart and added in the end: each block is rounded once at the
// magnitude of the sum so far. (Errors against MKL's on Intel, all positive, K = 16384 by FMA: 1.6 times, apart 0.9;
// fewer and longer blocks 1.45.)
constexpr i64 kSpan = 8192;
double serial_nanoseconds(const GemmDesc& d) {
  const double m = d.M, n = d.N, k = d.K;
  return d.batch * d.pairs * (m * n * k * 2 / 100 + (m * k + k * n + m * n) * 4 / 30);  // 100 GFLOP/s, 30 GB/s
}

const GemmKernel* find(Isa isa, DType dtype, Precision precision, GemmKind kind) {
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= isa && k.dtype == dtype && k.precision <= precision && k.kind == kind) return &k;
  return nullptr;
}

// --- time, in multiply-adds of the float32 FMA kernel --------------------------------------------------------------

// Tiles are k_step deep: what a short K fills them up to costs the same.
double filled(const GemmDesc& d, const GemmKernel& k) {
  return is_tiled(k) ? static_cast<double>(round_up(d.K, k.k_step)) / static_cast<double>(std::max<i64>(1, d.K)) : 1;
}
double products(const GemmDesc& d, const GemmKernel& k) {  // with an element of B
  return static_cast<double>(is_tiled(k) ? round_up(d.M, 16) : d.M) * filled(d, k) / rate(k);
}

// An element of B costs its products, packing, on tiles its share of packing A and of each sum, which waits in C, and
// its bytes, as read from L3: whichever of the two, work or bytes, takes longer. Beside strips in parts FMA keeps more
// of its rate. (Granite Rapids, float32, two threads, split / FMA, us: 128 x 128 x 64 12.7 / 10.7, 256 x 512 x 64 47 /
// 64, 512 x 512 x 13 50 / 34, 512 x 64 x 512 102 / 112, 32 x 512 x 512 87 / 72, 48 x 2048 x 512 436 / 379, 64 x 512 x
// 512 120 / 136, 96 x 1024 x 1024 610 / 710.)
constexpr double kTileSumCost = 10, kPartsShare = 1.15, kPartsPack = 33.0 / 24;
double tile_cost(const GemmDesc& d, const GemmKernel& k) {
  const bool parts = is_tiled(k) && k.helpers->suspects;
  const double pack = pack_cost(k) * filled(d, k) * (parts ? kPartsPack : 1);
  double work = products(d, k) * (parts ? kPartsShare : 1) + (d.packed ? 0 : pack);
  if (parts) {
    const double m = static_cast<double>(d.M), n = static_cast<double>(std::max<i64>(1, d.N));
    work += pack * m / n + kTileSumCost * m / static_cast<double>(std::max<i64>(1, d.K));
  }
  const double bytes = d.packed ? 4.0 * k.planes / k.k_unit : item_size(d.dtype);
  return std::max(work, bytes * kL3Byte);
}

// float32 has two kinds of tile kernel from amx on: split into bfloat16 parts, and FMA, for few rows.
const GemmKernel* find_tile(const GemmDesc& d, Isa isa) {
  const GemmKernel* split = find(isa, d.dtype, d.precision, GemmKind::kTile);
  const GemmKernel* fma = find(isa, d.dtype, Precision::fma, GemmKind::kTile);
  return split == fma || tile_cost(d, *split) < tile_cost(d, *fma) ? split : fma;
}

constexpr i64 kSlack = 64;  // one vector behind packed panels: see GemmHelpers::pack
bool dot_applies(const GemmDesc& d) { return !d.packed && d.a_col == 1 && d.b_row == 1; }

// Multiply-adds an element of B: the dot kernel M, and for each sum of K products 80 to add up its lanes, twice that
// where it is then rounded to 16 bits; the tile kernel M and the transpose, at k_unit times the rate. Past 64 rows the
// tile kernel's smaller traffic decides. (Zen 4, M x 4096 x 4096: 48 rows 80.6 against 76.9 GFLOP/s, 2 rows 15.4
// against 10.3; 64^3: 49 against 88.) Few columns leave most lanes of a tile empty.
constexpr i64 kDotRows = 64, kDotCols = 8, kDotDepth = 128, kDotSums = 80;
bool dot_pays(const GemmDesc& d, const GemmKernel& tile, const GemmKernel& dot, bool turned) {
  if (d.M == 1 || (d.N <= kDotCols && d.K >= kDotDepth)) return true;
  const double sums = dot.dtype == DType::f32 ? kDotSums : 2 * kDotSums;
  const double dot_cost = static_cast<double>(d.M) * (static_cast<double>(d.K) / dot.k_unit + sums);
  return d.M <= kDotRows && dot_cost <= (products(d, tile) + (turned ? 0 : pack_cost(tile))) * d.K;
}

// Rows up to which the dot kernel on a weight beats the tile kernel on its frozen pack, for each byte that the pack
// takes where the weight takes one; and where the weight comes from memory. (Zen 4, weight / pack in ms: M x 4096 x
// 4096 float32 M = 16 3.4 / 5.0, 48 8.4 / 8.9; bfloat16 16 1.5 / 1.9, 32 3.0 / 3.1; float16, packed as float32, 32 5.9
// / 6.3; M x 512 x 512 float32 8 0.024 / 0.023, 16 0.048 / 0.042; bfloat16 8 0.025 / 0.015.)
constexpr i64 kFrozenDotRows = 12, kFrozenMemoryRows = 40;

// With so few rows the work is reading B. In place and contiguous along N, it is read a few whole rows at a time, the
// sums of a K block waiting in scratch: the reads run along memory instead of across it. (Zen 4, 4096 x 4096, K block
// 256 / 8: M = 1 3.8 / 12.7, M = 4 11.7 / 41 GFLOP/s; a block of 16 loses a fifth of that, of 4 a third.)
constexpr i64 kStreamRows = 6, kStreamSums = 1 << 14;
bool streams_b(const GemmDesc& d, const GemmKernel& kernel) {
  return kernel.kind == GemmKind::kTile && kernel.dtype == DType::f32 && !is_tiled(kernel) && !d.packed &&
         d.b_col == 1 && d.K > 0 && d.M > 0 && d.M <= kStreamRows && d.M <= kernel.mr;
}

// Left in place: A whose rows or columns do not collide (a register tile reads strided rows at full speed, and
// packing costs 6/N of the products), B that is contiguous along N and used a few times. (Zen 4: 256^3 111.6
// unpacked, 108.8 packed; 1024^3 84.9 unpacked, 104.3 packed; B 128x768x768 111.4 in place, 106.1 packed.)
constexpr i64 kPackColumns = 512, kPackTiles = 2, kPackTilesApart = 40;
bool pack_a_pays(const GemmDesc& d, const GemmKernel& kernel, i64 cols) {
  if (is_tiled(kernel) || d.dtype != DType::f32) return true;  // kernels read float32, or tiles
  if (d.a_row == 1) return cols >= kPackColumns;
  return rows_collide(d.a_row) ? cols > 2 * kernel.nr : cols >= 4 * kPackColumns;
}
bool pack_b_pays(const GemmDesc& d, const GemmKernel& kernel, i64 tiles) {
  if (is_tiled(kernel) || d.dtype != DType::f32) return true;
  return d.b_col != 1 || tiles > (rows_collide(d.b_row) ? kPackTiles : kPackTilesApart);
}

// C' = B' A', on tiles: the rows of B' (of the weight) are tile rows as they lie and cost no packing; A is packed
// instead, and each block of C is turned as it is finished. That costs M, packing costs K. (Granite Rapids, two
// threads, bfloat16, packed / turned, GFLOP/s: 16 x 4096 x 4096 380 / 850, 30 x 28672 x 4096 410 / 675, 128 x 768 x 768
// 1700 / 2200, 128 x 768 x 3072 1670 / 2050, 384 x 1024 x 1024 2050 / 2330, 512 x 3072 x 768 2400 / 2200. Strips of 32
// rows: 10% less.)
bool turns(const GemmDesc& d, const GemmKernel& kernel, const Machine& machine) {
  if (!kernel.helpers->turn || d.packed || d.pairs != 1 || 2 * d.M > d.K) return false;
  const bool rows_of_tiles = d.b_row == 1 && d.b_col % 2 == 0 && d.K % kernel.k_step == 0 && d.N % 16 == 0;
  return rows_of_tiles && round_up(d.M, kernel.nr) * d.K * item_size(d.dtype) <= machine.l2 / 2;
}

// Rows up to which a weight that does not stay in L2 is read faster as it lies than from its frozen pack, one long
// stream; one that does, up to 32. (Granite Rapids, two threads, as it lies / frozen, GFLOP/s: 30 x 4096 x 4096 1080 /
// 750, 96 x 4096 x 4096 1850 / 1590, 128 x 4096 x 4096 1940 / 1800; 30 x 768 x 768 1650 / 1470, 64 x 3072 x 768 1530 /
// 1700, 64 x 768 x 768 1910 / 1950.)
constexpr i64 kTurnedRows = 128, kTurnedNearRows = 32;

const GemmKernel* choose(const GemmDesc& d, const Machine& machine, const char** why) {
  const GemmKernel* tile = d.packed ? &gemm_pack_kernel(machine.isa, d.dtype, d.precision) : find_tile(d, machine.isa);
  const GemmKernel* dot = find(machine.isa, d.dtype, d.precision, GemmKind::kDot);
  if (dot && dot_applies(d) && dot_pays(d, *tile, *dot, turns(d, *tile, machine))) {
    *why = "few rows or columns, both operands contiguous along K: nothing to pack";
    return dot;
  }
  const GemmKernel* most = find(machine.isa, d.dtype, d.precision, GemmKind::kTile);
  *why = d.packed       ? "frozen pack"
         : tile == most ? "highest level with a tile kernel"
                        : "too few rows to pay for splitting";
  return tile;
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
    const double cost = rows * cols + kPackCost * rows + (d.packed ? kReadCost : kPackCost) * cols;
    if (best < 0 || cost < best) {
      best = cost;
      plan->grid_m = gm;
      plan->grid_n = gn;
    }
  }
}

// See strips.cc. Sums in C wait after each kStripDepth: longer blocks have fewer columns in L2, and A comes from L3 for
// each of those blocks. (Granite Rapids, a core, float32, 512 x 3072 x 768, frozen / packing, by depth, GFLOP/s: 1024
// 300 / 290, 512 330 / 315, 384 340 / 305, 256 350 / 320.) At most kStripSums times: each is rounded at the magnitude
// of all of them. (All positive, K = 16384, 64 of them: 1.4 times MKL's error.)
constexpr i64 kStripDepth = 256, kStripSums = 32;
// Sums of 16 bits do not wait: up to kWhole along K they are taken at once. (bfloat16, 512 x 768 x 3072, frozen, two
// threads: sums in scratch in L2 beside B 2350 GFLOP/s, panels 2550.) A that has to be packed is packed once for all
// columns, 4 MiB at a time.
constexpr i64 kWhole = 1024, kStripPack = i64{4} << 20;
bool strips_pay(const GemmDesc& d, const GemmKernel& kernel, bool twice) {
  if (!kernel.helpers->strip || d.pairs != 1 || (kernel.helpers->suspects && !twice)) return false;
  return d.K <= (d.dtype == DType::f32 ? kWhole * kStripSums : kWhole);
}

void plan_strips(const GemmDesc& d, const Machine& machine, GemmPlan* p) {
  const GemmKernel& kernel = *p->kernel;
  const bool in_c = d.dtype == DType::f32, limited = kernel.helpers->suspects;
  p->kc = even_block(d.K, in_c ? std::max(kStripDepth, ceil_div(d.K, kStripSums)) : kWhole, kernel.k_step);
  p->span = d.K;
  const i64 nr = kernel.nr, depth_bytes = gemm_packed_steps(p->kc, kernel) * 4;
  const i64 rows = std::min(d.M, ceil_div(ceil_div(d.M, kGemmStripRows), p->grid_m) * kGemmStripRows);
  const i64 cols = ceil_div(ceil_div(d.N, nr), p->grid_n) * nr;
  p->strips = true;
  p->tile_m = kGemmStripRows;
  p->nc = even_block(std::max<i64>(1, cols), strip_columns(machine.l2, depth_bytes, nr), nr);
  p->finish_cols = nr;
  p->pack_a = d.a_col != 1 || limited;
  p->pack_b = !d.packed, p->by_panel = p->pack_b && d.b_col != 1;
  p->tile_sums = true, p->sum_row = nr;
  const bool kept = p->pack_a && p->nc < cols;
  p->mc = even_block(rows, kept ? std::max(kGemmStripRows, kStripPack / depth_bytes) : rows, kGemmStripRows);
  p->a_bytes = pages((kept ? p->mc : kGemmStripRows) * depth_bytes + kSlack);
  p->b_bytes = p->pack_b ? pages(p->nc * depth_bytes + kSlack) : 0;
  p->sum_bytes = pages(kGemmStripFloats * 4);
  if (limited && in_c) p->repair_bytes = pages((rows + cols) * 4);
}

}  // namespace

GemmPlan gemm_plan(const GemmDesc& d, const Machine& machine, const GemmKernel* forced, bool twice) {
  GemmPlan p = {};
  p.kernel = forced ? forced : choose(d, machine, &p.why);
  if (forced) p.why = "forced";
  const GemmKernel& kernel = *p.kernel;
  const bool dot = kernel.kind == GemmKind::kDot;
  if (kernel.dtype != d.dtype)
    fail("fastdl.gemm: kernel '", kernel.name, "': expected ", dtype_name(kernel.dtype), " operands, got ",
         dtype_name(d.dtype));
  if (dot && !dot_applies(d))
    fail("fastdl.gemm: kernel '", kernel.name, "': expected operands contiguous along K and no pack, got A strides (",
         d.a_row, ", ", d.a_col, "), B strides (", d.b_row, ", ", d.b_col, ")", d.packed ? ", packed" : "");

  p.threads = team_for(serial_nanoseconds(d), machine);
  const i64 batch = std::max<i64>(1, d.batch);
  choose_grid(d, kernel, static_cast<int>(p.threads / std::gcd<i64>(batch, p.threads)), &p);
  p.turned = turns(d, kernel, machine);
  if (p.turned) p.grid_n *= p.grid_m, p.grid_m = 1;
  p.streamed = streams_b(d, kernel);
  const i64 unit = gemm_row_unit(kernel);
  const auto part_rows = [&] {
    return std::max<i64>(1, std::min(d.M, ceil_div(ceil_div(d.M, unit), p.grid_m) * unit));
  };
  const auto part_cols = [&] {
    return std::max<i64>(1, std::min(d.N, ceil_div(ceil_div(d.N, kernel.nr), p.grid_n) * kernel.nr));
  };
  p.kc = even_block(d.K, p.turned ? d.K : kernel.kc, std::max(8, kernel.k_step));
  p.span = d.dtype == DType::f32 && !dot && !p.streamed && d.K > kSpan ? kSpan / p.kc * p.kc : d.K;
  const bool narrow = p.span < d.K || d.dtype != DType::f32 || kernel.precision != Precision::fma;
  if (!p.turned && strips_pay(d, kernel, twice)) {
    plan_strips(d, machine, &p);
    return p;
  }
  if (narrow) {  // sums wait in scratch
    p.tile_sums = !dot && p.kc >= d.K && d.pairs == 1;
    // Cut until a part's fit, and with them the largest magnitudes of its rows and columns. On tiles they lie by
    // panels.
    const auto sum_cols = [&] { return is_tiled(kernel) ? round_up(part_cols(), kernel.nr) : part_cols(); };
    while ((!p.tile_sums || kernel.helpers->suspects) && part_rows() > kSumElements / sum_cols())
      (part_rows() > part_cols() ? p.grid_m : p.grid_n) *= 2;
  }
  const i64 rows = part_rows(), cols = part_cols();
  p.tile_m = is_tiled(kernel) ? static_cast<int>(std::min<i64>(kernel.mr, round_up(rows, rows > 16 ? 32 : 16)))
                              : static_cast<int>(ceil_div(rows, ceil_div(rows, kernel.mr)));
  const i64 depth_bytes = gemm_packed_steps(p.kc, kernel) * 4;  // of a row of A or a column of B, packed

  p.finish_cols = dot ? kDotFinish : kernel.nr;
  // A block: half of L2, the other half is for the panel of B, sums, and C passing through.
  const i64 mc_rows = machine.l2 / 2 / depth_bytes;
  const i64 mc_limit = std::max<i64>(1, mc_rows / p.tile_m) * p.tile_m;
  p.mc = even_block(rows, mc_limit, p.tile_m);
  const i64 tiles = ceil_div(rows, p.tile_m);

  p.pack_a = !dot && !p.streamed && !p.turned && pack_a_pays(d, kernel, cols);
  p.pack_b = !dot && !p.streamed && !d.packed && (p.turned || pack_b_pays(d, kernel, tiles));
  p.by_panel = p.pack_b && !p.turned && d.b_col != 1;
  p.one_panel = p.by_panel && p.mc >= rows;

  if (p.turned) {
    p.nc = round_up(d.M, kernel.nr);  // the panels are those of A
  } else if (p.streamed) {
    p.nc = even_block(cols, kStreamSums / rows, kernel.nr);
    p.sum_bytes = pages(rows * p.nc * 4);
  } else if (!p.pack_b || p.one_panel) {
    p.nc = round_up(cols, kernel.nr);
  } else {
    // B block: a share of L3, at most 4 MiB, on tiles 8: every block has A packed again.
    const i64 bytes = std::min<i64>(machine.l3 / (2 * p.threads), i64{is_tiled(kernel) ? 8 : 4} << 20);
    p.nc = even_block(cols, std::max<i64>(kernel.nr, bytes / depth_bytes / kernel.nr * kernel.nr), kernel.nr);
  }
  p.a_bytes = p.pack_a ? pages(p.mc * depth_bytes + kSlack) : 0;
  p.b_bytes = p.pack_b ? pages((p.one_panel ? kernel.nr : p.nc) * depth_bytes + kSlack) : 0;
  if (narrow && !p.streamed) {
    const bool tiled = is_tiled(kernel);
    p.sum_row = p.tile_sums || tiled ? kernel.nr : cols;  // of tiles: by panels
    const i64 kept_rows = p.tile_sums ? kernel.mr : rows;
    const i64 kept_cols = !p.tile_sums && tiled ? round_up(cols, kernel.nr) : p.sum_row;
    p.sum_bytes = pages(kept_rows * kept_cols * (p.turned || p.span < d.K ? 2 : 1) * 4);
  }
  if (kernel.helpers->suspects) {
    p.repair = find(Isa::kAvx512, d.dtype, Precision::fma, GemmKind::kTile);
    p.repair_bytes = pages(gemm_repair_bytes(p, rows, cols));
  }
  return p;
}

bool gemm_pack_pays(const GemmDesc& d, const Machine& machine) {
  const GemmKernel* dot = find(machine.isa, d.dtype, d.precision, GemmKind::kDot);
  if (!dot || !dot_applies(d)) return true;
  const GemmKernel& row = gemm_pack_kernel(machine.isa, d.dtype, d.precision);
  const double item = item_size(d.dtype), rows = static_cast<double>(d.M) / dot->k_unit;
  if (is_tiled(row)) {  // three parts are 6 bytes an element against 4
    const bool near = item * static_cast<double>(d.N * d.K) <= static_cast<double>(machine.threads * machine.l2);
    if (turns(d, row, machine) && d.M <= (near ? kTurnedNearRows : kTurnedRows)) return false;
    GemmDesc packed = d;
    packed.packed = true;
    return tile_cost(packed, row) < std::min(std::max(rows, item * kL3Byte), tile_cost(d, *find_tile(d, machine.isa)));
  }
  const bool from_memory = item * static_cast<double>(d.N * d.K) > static_cast<double>(machine.l3) / 2;
  const double limit = from_memory ? kFrozenMemoryRows : kFrozenDotRows * 4.0 / row.k_unit / item;
  return static_cast<double>(d.M) * (d.K + kDotSums) > limit * d.K;
}

std::vector<std::string> gemm_candidates(const GemmDesc& d, const Machine& machine, const GemmPlan& chosen) {
  std::vector<std::string> lost;
  for (const GemmKernel& k : gemm_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype) continue;
    std::string reason;
    if (k.isa > machine.isa) {
      reason = concat("needs ", isa_name(k.isa));
    } else if (k.kind == GemmKind::kDot && !dot_applies(d)) {
      reason = "operands not contiguous along K";
    } else if (k.precision > d.precision) {
      reason = "less exact than asked";
    } else if (k.kind == GemmKind::kDot && chosen.kernel->kind == GemmKind::kTile) {
      reason = "enough rows and columns for packing B to pay";
    } else if (!d.packed && k.kind == chosen.kernel->kind &&
               (is_tiled(k) ||
                (is_tiled(*chosen.kernel) && &k == find(machine.isa, d.dtype, Precision::fma, k.kind)))) {
      reason = concat("estimated at ", std::round(tile_cost(d, k) / tile_cost(d, *chosen.kernel) * 100) / 100,
                      " times the time");
    } else {
      reason = chosen.why;
    }
    lost.push_back(concat(k.name, ": ", reason));
  }
  return lost;
}

std::string describe(const GemmDesc& d, const GemmPlan& p) {
  return concat("gemm ", describe(d), " -> ", p.kernel->name, " mc=", p.mc, " nc=", p.nc, " kc=", p.kc,
                " pack=", p.pack_a ? "A" : "", p.pack_b ? "B" : "", p.pack_a || p.pack_b ? "" : "none",
                p.strips     ? " strips"
                : p.turned   ? " turned"
                : p.streamed ? " streamed"
                             : "",
                " grid=", p.grid_m, "x", p.grid_n, " threads=", p.threads, " workspace=", p.workspace_bytes(),
                "B: ", p.why);
}

}  // namespace fastdl
