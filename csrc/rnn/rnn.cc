#include "rnn/rnn.h"

#include <atomic>

#include "base/check.h"
#include "base/log.h"
#include "base/parallel.h"

namespace fastdl {

#define RNN_KERNEL(name, level, isa, dtype, precision, variant, cell, k_unit, k_step, planes, mr, nr, panels, kc) \
  namespace level {                                                                                               \
  extern const RnnFunctions cell##_##variant;                                                                     \
  }
#include "rnn/cpu/kernels.inc"
#undef RNN_KERNEL

const std::vector<RnnKernel>& rnn_kernels() {
#define RNN_KERNEL(name, level, isa, dtype, precision, variant, cell, k_unit, k_step, planes, mr, nr, panels, kc) \
  {#name, Isa::isa, DType::dtype, Precision::precision,    RnnCell::cell, k_unit, k_step, planes, mr,             \
   nr,    panels,   kc,           &level::cell##_##variant},
  static const std::vector<RnnKernel> table = {
#include "rnn/cpu/kernels.inc"
  };
#undef RNN_KERNEL
  return table;
}

const RnnKernel& rnn_kernel(const std::string& name, const char* op) {
  std::string names;
  for (const RnnKernel& k : rnn_kernels()) {
    if (name == k.name) return k;
    names += names.empty() ? k.name : std::string(", ") + k.name;
  }
  fail(op, ": argument 'kernel': expected one of ", names, "; got '", name, "'");
}

namespace {
constexpr int kMaxKernels = 64;
std::atomic<i64> g_calls[kMaxKernels];
std::atomic<i64>& calls(const RnnKernel& k) { return g_calls[&k - rnn_kernels().data()]; }
}  // namespace

i64 rnn_calls(const RnnKernel& kernel) { return calls(kernel).load(std::memory_order_relaxed); }
void rnn_reset_calls() {
  for (auto& n : g_calls) n.store(0, std::memory_order_relaxed);
}

void rnn(const RnnDesc& d, const RnnArgs& args, const RnnGradients* grads, const RnnKernel* forced, int threads) {
  const CpuInfo& cpu = cpu_info();
  const double weights = static_cast<double>(kGates[static_cast<int>(d.cell)]) * d.H * d.P;
  const double operations = 2 * weights * static_cast<double>(args.steps.rows);
  const Machine machine = {cpu.isa, current_team(threads, operations).threads, cpu.l1d, cpu.l2, cpu.l3};
  const RnnPlan plan = rnn_plan(d, machine, forced);
  if (log_enabled()) {
    std::string line = describe(d, plan);
    for (const std::string& c : rnn_candidates(d, machine, plan)) line += "\n    not " + c;
    log_once(line);
  }
  calls(*plan.kernel).fetch_add(1, std::memory_order_relaxed);
  if (grads) {
    rnn_run_backward(d, plan, args, *grads);
  } else {
    rnn_run(d, plan, args);
  }
}

}  // namespace fastdl
