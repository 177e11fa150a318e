#include "gemm/gemm.h"

#include <atomic>

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
