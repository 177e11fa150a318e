#include "gemm/gemm.h"

#include <atomic>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/parallel.h"

namespace fastdl {

#define GEMM_KERNEL(name, level, isa, dtype, precision, function, helpers, kind, k_unit, k_step, planes, mr, nr, kc) \
  namespace level {                                                                                                  \
  void function(const TileArgs&);                                                                                    \
  extern const GemmHelpers helpers_##helpers;                                                                        \
  }
#include "gemm/cpu/kernels.inc"
#undef GEMM_KERNEL

const std::vector<GemmKernel>& gemm_kernels() {
#define GEMM_KERNEL(name, level, isa, dtype, precision, function, helpers, kind, k_unit, k_step, planes, mr, nr, kc) \
  {#name, Isa::isa, DType::dtype, Precision::precision, GemmKind::kind,           k_unit, k_step, planes,            \
   mr,    nr,       kc,           level::function,      &level::helpers_##helpers},
  static const std::vector<GemmKernel> table = {
#include "gemm/cpu/kernels.inc"
  };
#undef GEMM_KERNEL
  return table;
}

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"f32", "bf16", "f16"};
  return kNames[static_cast<int>(dtype)];
}

const char* precision_name(Precision precision) {
  constexpr const char* kNames[] = {"fma", "ieee", "tf32", "bf16"};
  return kNames[static_cast<int>(precision)];
}

const GemmKernel& gemm_kernel(const std::string& name, const char* op) {
  std::string names;
  for (const GemmKernel& k : gemm_kernels()) {
    if (name == k.name) return k;
    names += names.empty() ? k.name : std::string(", ") + k.name;
  }
  fail(op, ": argument 'kernel': expected one of ", names, "; got '", name, "'");
}

const GemmKernel& gemm_pack_kernel(Isa isa, DType dtype, Precision precision) {
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= isa && k.dtype == dtype && k.precision <= precision && k.kind == GemmKind::kTile) return k;
  fail("fastdl.gemm: no tile kernel");
}

namespace {

// Leading dimensions that A and C step through as they do through their rows, and that B does not have, are rows.
void fold_batch(GemmDesc* d, GemmArgs* args) {
  GemmBatch& x = args->batch;
  const auto drop = [&](int i) {
    for (--x.dims; i < x.dims; ++i)
      x.size[i] = x.size[i + 1], x.a[i] = x.a[i + 1], x.b[i] = x.b[i + 1], x.c[i] = x.c[i + 1];
  };
  for (int i = x.dims - 1; i >= 0; --i)
    if (x.size[i] == 1) drop(i);
  for (int i = x.dims - 2; i >= 0; --i) {
    const int o = i + 1;
    if (x.a[i] != x.a[o] * x.size[o] || x.b[i] != x.b[o] * x.size[o] || x.c[i] != x.c[o] * x.size[o]) continue;
    x.size[o] *= x.size[i];
    drop(i);
  }
  for (int i = x.dims - 1; i >= 0 && x.b[i] == 0 && d->pairs == 1; --i) {
    if (d->M != 1 && (x.a[i] != d->M * d->a_row || x.c[i] != d->M * args->c_row)) break;
    if (d->M == 1) d->a_row = x.a[i], args->c_row = x.c[i];
    d->M *= x.size[i];
    --x.dims;
  }
  d->batch = 1;
  for (int i = 0; i < x.dims; ++i) d->batch *= x.size[i];
}

}  // namespace

void gemm_canonicalise(GemmDesc* d, GemmArgs* args) {
  fold_batch(d, args);
  // C[M,1] = A b is C^T[1,M] = b^T A^T: one row is what the kernels are good at.
  if (d->N == 1 && d->M > 1 && !d->packed && args->c_row == 1) {
    std::swap(args->a, args->b);
    std::swap(d->M, d->N);
    std::swap(d->a_row, d->b_col);
    std::swap(d->a_col, d->b_row);
    for (int i = 0; i < args->batch.dims; ++i) std::swap(args->batch.a[i], args->batch.b[i]);
    for (int i = 0; i < args->pairs.dims; ++i) std::swap(args->pairs.a[i], args->pairs.b[i]);
    args->bias_step = 0;
    args->c_row = d->N;
    args->pack = nullptr;
  }
  // Strides of dimensions that nobody steps through say nothing: call them contiguous.
  if (d->M == 1) d->a_row = 1;
  if (d->K <= 1) d->a_col = 1;
  if (d->packed) return;
  if (d->K <= 1) d->b_row = 1;
  if (d->N == 1) d->b_col = 1;
}

namespace {
constexpr int kMaxKernels = 64;
std::atomic<i64> g_calls[kMaxKernels];
std::atomic<i64>& calls(const GemmKernel& k) { return g_calls[&k - gemm_kernels().data()]; }
}  // namespace

i64 gemm_calls(const GemmKernel& kernel) { return calls(kernel).load(std::memory_order_relaxed); }
void gemm_reset_calls() {
  for (auto& n : g_calls) n.store(0, std::memory_order_relaxed);
}

void gemm_use_pack(GemmDesc* d, GemmArgs* args, const GemmKernel& kernel) {
  d->packed = true;
  d->b_row = kernel.nr, d->b_col = 1;
  args->b = args->pack;
}

GemmPlan gemm(GemmDesc d, GemmArgs args, const GemmKernel* forced, int threads) {
  gemm_canonicalise(&d, &args);
  const CpuInfo& cpu = cpu_info();
  const double operations = 2.0 * static_cast<double>(d.batch * d.pairs) * static_cast<double>(d.M) *
                            static_cast<double>(d.N) * static_cast<double>(d.K);
  const Machine machine = {cpu.isa, current_team(threads, operations).threads, cpu.l1d, cpu.l2, cpu.l3};
  if (args.pack && gemm_pack_pays(d, machine))
    gemm_use_pack(&d, &args, gemm_pack_kernel(cpu.isa, d.dtype, d.precision));
  const GemmPlan plan = gemm_plan(d, machine, forced);
  if (log_enabled()) {
    std::string line = describe(d, plan);
    for (const std::string& c : gemm_candidates(d, machine, plan)) line += "\n    not " + c;
    log_once(line);
  }
  calls(*plan.kernel).fetch_add(1, std::memory_order_relaxed);
  gemm_run(d, plan, args);
  return plan;
}

}  // namespace fastdl
