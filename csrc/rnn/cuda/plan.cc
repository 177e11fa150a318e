#include "rnn/cuda/plan.h"

#include <algorithm>

#include "base/check.h"
#include "rnn/cuda/layout.h"

namespace fastdl {

#define CUDA_RNN_KERNEL(name, unit, cell, schedule, dtype, precision, parts) \
  namespace cuda_##unit {                                                    \
    extern const CudaRnnFunctions cell##_##schedule;                         \
  }
#include "rnn/cuda/kernels.inc"
#undef CUDA_RNN_KERNEL

namespace {
constexpr bool resident = true, steps = false;

constexpr i64 aligned(i64 bytes) { return round_up(bytes, 256); }

// A row at least as exact as asked.
bool serves(const CudaRnnKernel& k, const RnnDesc& d) {
  return k.dtype == d.dtype && k.cell == d.cell && (d.dtype != DType::f32 || k.precision <= d.precision);
}

CudaRnnProduct product_of(i64 units, int gates, i64 K, int buffers, const CudaRnnKernel& kernel, i64 padded_rows) {
  CudaRnnProduct p = {};
  p.units = static_cast<int>(units), p.gates = gates, p.K = static_cast<int>(K), p.buffers = buffers;
  p.groups = static_cast<int>(ceil_div(units, rnn_units(gates)));
  p.blocks = static_cast<int>(ceil_div(K, kRnnBlockK));
  p.packed_bytes = aligned(i64{4} * p.groups * p.blocks * rnn_block_words(rnn_slots(gates), kernel.parts));
  p.operand_bytes =
      aligned(padded_rows * p.blocks * kRnnBlockK * (2 * kernel.parts + (kernel.dtype == DType::f32 ? 4 : 0)));
  return p;
}

// Everything but the grid, which depends on whether W is to stay on chip.
CudaRnnPlan sizes(const RnnDesc& d, const CudaRnnKernel& kernel) {
  CudaRnnPlan p = {};
  p.kernel = &kernel;
  p.padded_rows = ceil_div(d.B, 8) * 8;
  const int gates = kGates[static_cast<int>(d.cell)];
  p.products = d.projected ? 2 : 1;
  if (d.backward) {
    p.product[0] = product_of(d.P, 1, gates * d.H, 2, kernel, p.padded_rows);
    if (d.projected) p.product[1] = product_of(d.H, 1, d.P, 1, kernel, p.padded_rows);
  } else {
    p.product[0] = product_of(d.H, gates, d.P, 2, kernel, p.padded_rows);
    if (d.projected) p.product[1] = product_of(d.P, 1, d.H, 1, kernel, p.padded_rows);
  }
  p.c_bytes = d.cell == RnnCell::lstm ? aligned(4 * d.B * d.H) : 0;
  p.keep_bytes = d.backward && d.cell == RnnCell::gru ? aligned(4 * d.B * d.H) : 0;
  return p;
}

// Of a thread block whose groups of W stay in shared memory, those of a grid of so many unit blocks.
i64 resident_bytes(const CudaRnnPlan& p, int unit_blocks, int tile_rows) {
  const int slots = rnn_slots(p.product[0].gates);
  i64 bytes = i64{4} * rnn_sum_floats(tile_rows, slots);
  for (int i = 0; i < p.products; ++i)
    bytes += ceil_div(p.product[i].groups, unit_blocks) * p.product[i].blocks * 4 *
             rnn_block_words(rnn_slots(p.product[i].gates), p.kernel->parts);
  return bytes;
}

// Tiles of 32 sequences, of fewer where the GPU would otherwise be half empty: a step is short, and its end a barrier.
int rows_of_tile(const RnnDesc& d, int unit_blocks, int multiprocessors) {
  int rows = static_cast<int>(std::min<i64>(kRnnRows, std::max<i64>(8, ceil_div(d.B, 8) * 8)));
  while (rows > 8 && unit_blocks * ceil_div(d.B, rows / 2) <= multiprocessors) rows = rows / 2 / 8 * 8;
  return rows;
}

// The whole sequence in one launch: false where W does not fit.
bool make_resident(const RnnDesc& d, const Gpu& gpu, CudaRnnPlan* p) {
  const int groups = std::max(p->product[0].groups, p->product[1].groups);
  p->unit_blocks = std::min(groups, gpu.multiprocessors);
  p->tile_rows = rows_of_tile(d, p->unit_blocks, gpu.multiprocessors);
  while (p->tile_rows > 8 && resident_bytes(*p, p->unit_blocks, p->tile_rows) > gpu.shared_bytes) p->tile_rows -= 8;
  const i64 bytes = resident_bytes(*p, p->unit_blocks, p->tile_rows);
  if (bytes > gpu.shared_bytes) return false;
  p->shared_bytes = static_cast<int>(bytes);
  p->batch_blocks = static_cast<int>(
      std::max<i64>(1, std::min<i64>(ceil_div(d.B, p->tile_rows), gpu.multiprocessors / p->unit_blocks)));
  p->counter_bytes = aligned(4 * p->batch_blocks);
  return true;
}

void make_steps(const RnnDesc& d, const Gpu& gpu, CudaRnnPlan* p) {
  constexpr i64 kMostBlocks = 65535;
  p->unit_blocks = p->product[0].groups;
  p->tile_rows = rows_of_tile(d, p->unit_blocks, gpu.multiprocessors);
  p->batch_blocks = static_cast<int>(std::max<i64>(1, std::min(kMostBlocks, ceil_div(d.B, p->tile_rows))));
  p->shared_bytes = 4 * rnn_sum_floats(p->tile_rows, rnn_slots(p->product[0].gates));
  p->counter_bytes = 0;
}

}  // namespace

const std::vector<CudaRnnKernel>& cuda_rnn_kernels() {
#define CUDA_RNN_KERNEL(name, unit, cell, schedule, dtype, precision, parts) \
  {#name, DType::dtype, Precision::precision, RnnCell::cell, parts, schedule, &cuda_##unit::cell##_##schedule},
  static const std::vector<CudaRnnKernel> table = {
#include "rnn/cuda/kernels.inc"
  };
#undef CUDA_RNN_KERNEL
  return table;
}

i64 CudaRnnPlan::workspace_bytes() const {
  i64 bytes = counter_bytes + c_bytes + keep_bytes;
  for (int i = 0; i < products; ++i) bytes += product[i].packed_bytes + product[i].buffers * product[i].operand_bytes;
  return bytes;
}

CudaRnnPlan cuda_rnn_plan(const RnnDesc& d, const Gpu& gpu, const CudaRnnKernel* forced) {
  constexpr i64 kMost = i64{1} << 27;  // indices of a thread are 32 bits wide
  if (d.T > kMost || d.B > kMost || d.H > kMost / 4 || d.P > kMost / 4)
    fail("fastdl.rnn: expected T and B of at most ", kMost, " and sizes of at most ", kMost / 4, ", got T=", d.T,
         " B=", d.B, " H=", d.H, " P=", d.P);
  if (forced && (forced->dtype != d.dtype || forced->cell != d.cell))
    fail("fastdl.rnn: kernel '", forced->name, "': expected ", rnn_cell_name(forced->cell), " in ",
         dtype_name(forced->dtype), ", got ", rnn_cell_name(d.cell), " in ", dtype_name(d.dtype));
  for (const CudaRnnKernel& k : cuda_rnn_kernels()) {
    if (forced ? &k != forced : !serves(k, d)) continue;
    CudaRnnPlan p = sizes(d, k);
    if (!k.resident) {
      make_steps(d, gpu, &p);
      p.why = forced ? "forced" : "W_hh does not fit on chip: a launch a step";
      return p;
    }
    if (make_resident(d, gpu, &p)) {
      p.why = forced ? "forced" : "W_hh stays on chip: one launch";
      return p;
    }
    if (forced)
      fail("fastdl.rnn: kernel '", k.name, "': expected W_hh to fit into ", gpu.shared_bytes, " bytes on each of ",
           gpu.multiprocessors, " multiprocessors, got ", resident_bytes(p, p.unit_blocks, p.tile_rows), " bytes");
  }
  fail("fastdl.rnn: no kernel for ", rnn_cell_name(d.cell), " in ", dtype_name(d.dtype));
}

std::vector<std::string> cuda_rnn_candidates(const RnnDesc& d, const Gpu& gpu, const CudaRnnPlan& chosen) {
  std::vector<std::string> lost;
  for (const CudaRnnKernel& k : cuda_rnn_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype || k.cell != d.cell) continue;
    CudaRnnPlan p = sizes(d, k);
    const bool fits = !k.resident || make_resident(d, gpu, &p);
    const bool exact = serves(k, d);
    lost.push_back(concat(k.name, !exact                                   ? ": less exact than asked"
                                  : !fits                                  ? ": W_hh does not fit on chip"
                                  : k.precision < chosen.kernel->precision ? ": more exact than asked"
                                                                           : ": a launch a step"));
  }
  return lost;
}

std::string describe(const RnnDesc& d, const CudaRnnPlan& p) {
  return concat(describe(d), " -> ", p.kernel->name, " grid=", p.unit_blocks, "x", p.batch_blocks,
                " tile=", p.tile_rows, " shared=", p.shared_bytes, "B workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
