#include "conv/conv.h"

#include "base/check.h"
#include "base/log.h"
#include "base/parallel.h"

namespace fastdl {

#define CONV_KERNEL(name, level, isa, dtype, precision, kind, functions, k_unit, k_step, planes, mr, nr, kc) \
  namespace level {                                                                                          \
  extern const ConvFunctions functions;                                                                      \
  }
#include "conv/cpu/kernels.inc"
#undef CONV_KERNEL

const std::vector<ConvKernel>& conv_kernels() {
#define CONV_KERNEL(name, level, isa, dtype, precision, kind, functions, k_unit, k_step, planes, mr, nr, kc) \
  {#name, Isa::isa, DType::dtype, Precision::precision, ConvKind::kind, k_unit, k_step, planes,              \
   mr,    nr,       kc,           &level::functions},
  static const std::vector<ConvKernel> table = {
#include "conv/cpu/kernels.inc"
  };
#undef CONV_KERNEL
  return table;
}

CallCounts<ConvKernel>& conv_calls() {
  static CallCounts<ConvKernel> counts(conv_kernels());
  return counts;
}

void conv(const ConvDesc& desc, const ConvArgs& args, const ConvKernel* forced, int threads) {
  const Machine machine = this_machine(threads);
  const ConvDesc d = conv_unfrozen(desc, machine);
  const ConvPlan plan = conv_plan(d, machine, forced);
  if (log_enabled()) log_once(describe(d, plan), conv_candidates(d, machine, plan));
  conv_calls().add(*plan.kernel);
  switch (plan.kernel->kind) {
    case ConvKind::kDense:
      return conv_run_dense(d, plan, args);
    case ConvKind::kWgrad:
      return conv_run_wgrad(d, plan, args);
    case ConvKind::kDepthwise:
      return conv_run_depthwise(d, plan, args);
    case ConvKind::kGrouped:
      return conv_run_grouped(d, plan, args);
  }
}

}  // namespace fastdl
