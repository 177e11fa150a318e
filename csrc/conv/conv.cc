#include "conv/conv.h"

#include <atomic>

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

const ConvKernel& conv_kernel(const std::string& name, const char* op) {
  std::string names;
  for (const ConvKernel& k : conv_kernels()) {
    if (name == k.name) return k;
    names += names.empty() ? k.name : std::string(", ") + k.name;
  }
  fail(op, ": argument 'kernel': expected one of ", names, "; got '", name, "'");
}

namespace {
constexpr int kMaxKernels = 128;
std::atomic<i64> g_calls[kMaxKernels];
std::atomic<i64>& calls(const ConvKernel& k) { return g_calls[&k - conv_kernels().data()]; }
}  // namespace

i64 conv_calls(const ConvKernel& kernel) { return calls(kernel).load(std::memory_order_relaxed); }
void conv_reset_calls() {
  for (auto& n : g_calls) n.store(0, std::memory_order_relaxed);
}

void conv(const ConvDesc& desc, const ConvArgs& args, const ConvKernel* forced, int threads) {
  const CpuInfo& cpu = cpu_info();
  const Machine machine = {cpu.isa, current_team(threads).threads, cpu.l1d, cpu.l2, cpu.l3};
  const ConvDesc d = conv_unfrozen(desc, machine);
  const ConvPlan plan = conv_plan(d, machine, forced);
  if (log_enabled()) {
    std::string line = describe(d, plan);
    for (const std::string& c : conv_candidates(d, machine, plan)) line += "\n    not " + c;
    log_once(line);
  }
  calls(*plan.kernel).fetch_add(1, std::memory_order_relaxed);
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
