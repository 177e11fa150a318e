#include "gemm/gemm.h"

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

const GemmKernel& gemm_pack_kernel(Isa isa, DType dtype, Precision precision) {
  for (const GemmKernel& k : gemm_kernels())
    if (k.isa <= isa && k.dtype == dtype && k.precision <= precision && k.kind == GemmKind::kTile) return k;
  fail("fastdl.gemm: no tile kernel");
}

CallCounts<GemmKernel>& gemm_calls() {
  static CallCounts<GemmKernel> counts(gemm_kernels());
  return counts;
}

void gemm_use_pack(GemmDesc* d, GemmArgs* args, const GemmKernel& kernel) {
  d->packed = true;
  d->b_row = kernel.nr, d->b_col = 1;
  args->b = args->pack;
}

GemmPlan gemm(GemmDesc d, GemmArgs args, const GemmKernel* forced, int threads) {
  gemm_canonicalise(&d, &args);
  const double operations = 2.0 * static_cast<double>(d.batch * d.pairs) * static_cast<double>(d.M) *
                            static_cast<double>(d.N) * static_cast<double>(d.K);
  const Machine machine = this_machine(threads, operations);
  if (args.pack && gemm_pack_pays(d, machine))
    gemm_use_pack(&d, &args, gemm_pack_kernel(machine.isa, d.dtype, d.precision));
  const GemmPlan plan = gemm_plan(d, machine, forced, !args.accumulate);
  if (log_enabled()) log_once(describe(d, plan), gemm_candidates(d, machine, plan));
  gemm_calls().add(*plan.kernel);
  if (!gemm_run(d, plan, args)) gemm_run(d, gemm_plan(d, machine, plan.kernel, false), args);
  return plan;
}

}  // namespace fastdl
