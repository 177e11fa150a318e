// Which kernel, how much scratch, how many threads. Pure: everything follows from the problem and the machine given.
#include <algorithm>

#include "base/check.h"
#include "rnn/rnn.h"

namespace fastdl {
namespace {

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
const char* cell_name(RnnCell cell) {
  constexpr const char* kNames[] = {"lstm", "gru", "rnn"};
  return kNames[static_cast<int>(cell)];
}
i64 bytes(i64 floats) { return ceil_div(floats * 4, 4096) * 4096; }

// Below this much work a step, the barrier that ends it and the lines of h that change hands cost more than a second
// thread gains.
constexpr double kSerialNanoseconds = 2500;

// Few steps of few rows do not pay for packing W_hh, which costs as much as kPackCost rows. Forward, dot products read
// it in place, at kDotSums multiply-adds for the horizontal sums of each element; backward, tiles read its rows. Both
// need h as it lies in memory.
constexpr i64 kPackCost = 8, kDotSums = 80, kDirectTiles = 2;
const GemmKernel* direct_kernel(const RnnDesc& d, const RnnKernel& kernel, const GemmKernel& product) {
  const bool same_form = kernel.k_unit == 2 || d.dtype == DType::f32;
  if (!d.w_rows || !same_form) return nullptr;
  if (d.backward) {
    const bool few = kernel.k_unit == 1 && d.T <= kDirectTiles && d.T * ceil_div(d.B, product.mr) <= kDirectTiles;
    return few ? &product : nullptr;
  }
  if (d.T > d.P || d.B > d.P || d.T * d.B * kDotSums > kPackCost * d.P) return nullptr;
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= kernel.isa && k.dtype == d.dtype && k.kind == GemmKind::kDot) return &k;
  return nullptr;
}

double step_nanoseconds(const RnnDesc& d, const RnnKernel& kernel) {
  const double weights = static_cast<double>(kernel.gates()) * d.H * d.P + (d.projected ? d.P * d.H : 0);
  const double cells = static_cast<double>(d.B) * d.H * kernel.gates();
  return std::max(weights * d.B * 2 / 100, weights * 4 / 60) + cells * 0.4;  // 100 GFLOP/s, 60 GB/s
}

}  // namespace

RnnPlan rnn_plan(const RnnDesc& d, const Machine& machine, const RnnKernel* forced) {
  RnnPlan p = {};
  p.kernel = forced;
  p.why = "forced";
  if (!forced) {
    for (const RnnKernel& k : rnn_kernels())
      if (!p.kernel && k.isa <= machine.isa && k.dtype == d.dtype && k.cell == d.cell) p.kernel = &k;
    p.why = "the level's own for this cell and dtype";
  }
  const RnnKernel& kernel = *p.kernel;
  if (kernel.dtype != d.dtype || kernel.cell != d.cell)
    fail("fastdl.rnn: kernel '", kernel.name, "': expected ", cell_name(kernel.cell), " in ", dtype_name(kernel.dtype),
         ", got ", cell_name(d.cell), " in ", dtype_name(d.dtype));
  p.product = &gemm_pack_kernel(kernel.isa, d.dtype);

  p.direct = direct_kernel(d, kernel, *p.product);
  const bool serial = d.T == 0 || step_nanoseconds(d, kernel) < kSerialNanoseconds;
  p.threads = serial ? 1 : std::max(1, machine.threads);
  constexpr i64 kRowTiles = 4;  // sums of a block stay in L1
  p.row_block = std::min<i64>(std::max<i64>(1, d.B), kRowTiles * kernel.mr);

  const auto steps = [&](i64 k) { return ceil_div(k, kernel.k_unit); };
  const i64 blocks = ceil_div(d.H, kernel.units()), gates = kernel.gates() * d.H, slack = 16;
  if (d.backward) {
    p.w_bytes = p.direct ? 0 : bytes(gemm_pack_size(gates, d.P, *p.product) + slack);
    p.r_bytes = d.projected ? bytes(gemm_pack_size(d.P, d.H, *p.product) + slack) : 0;
    p.h_bytes = bytes(2 * d.B * rnn_padded(steps(gates)));
    p.hidden_bytes = d.projected ? bytes(d.B * (rnn_padded(steps(d.P)) + rnn_padded(d.H))) : 0;
    p.state_bytes = bytes(d.B * rnn_padded(d.P));
  } else {
    p.w_bytes = p.direct ? 0 : bytes(blocks * kernel.columns() * steps(d.P));
    p.r_bytes = d.projected ? bytes(gemm_pack_size(d.H, d.P, *p.product) + slack) : 0;
    p.h_bytes = bytes(2 * d.B * rnn_padded(steps(d.P)));
    p.hidden_bytes = d.projected ? bytes(d.B * rnn_padded(steps(d.H))) : 0;
    p.state_bytes = d.projected ? bytes(d.B * rnn_padded(d.P)) : 0;
    p.bias_bytes = bytes(blocks * kernel.columns());
    p.sum_bytes = bytes(p.row_block * kernel.columns());
  }
  p.c_bytes = d.cell == RnnCell::lstm ? bytes(d.B * rnn_padded(d.H)) : 0;
  return p;
}

std::vector<std::string> rnn_candidates(const RnnDesc& d, const Machine& machine, const RnnPlan& chosen) {
  std::vector<std::string> lost;
  for (const RnnKernel& k : rnn_kernels()) {
    if (&k == chosen.kernel || k.dtype != d.dtype || k.cell != d.cell) continue;
    lost.push_back(
        concat(k.name, ": ", k.isa > machine.isa ? concat("needs ", isa_name(k.isa)) : std::string("a lower level")));
  }
  return lost;
}

std::string describe(const RnnDesc& d, const RnnPlan& p) {
  return concat(cell_name(d.cell), d.backward ? " backward " : " ", dtype_name(d.dtype), " T=", d.T, " B=", d.B,
                " H=", d.H, d.projected ? concat(" P=", d.P) : std::string(), " -> ", p.kernel->name,
                " product=", p.product->name, " W=", p.direct ? p.direct->name : "packed", " rows=", p.row_block,
                " threads=", p.threads, " workspace=", p.workspace_bytes(), "B: ", p.why);
}

}  // namespace fastdl
