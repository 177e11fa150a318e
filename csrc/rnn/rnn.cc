#include "rnn/rnn.h"

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

CallCounts<RnnKernel>& rnn_calls() {
  static CallCounts<RnnKernel> counts(rnn_kernels());
  return counts;
}

void rnn(const RnnDesc& d, const RnnArgs& args, const RnnGradients* grads, const RnnKernel* forced, int threads) {
  const double weights = static_cast<double>(kGates[static_cast<int>(d.cell)]) * d.H * d.P;
  const double operations = 2 * weights * static_cast<double>(args.steps.rows);
  const Machine machine = this_machine(threads, operations);
  const RnnPlan plan = rnn_plan(d, machine, forced);
  if (log_enabled()) log_once(describe(d, plan), rnn_candidates(d, machine, plan));
  rnn_calls().add(*plan.kernel);
  if (grads) {
    rnn_run_backward(d, plan, args, *grads);
  } else {
    rnn_run(d, plan, args);
  }
}

}  // namespace fastdl
