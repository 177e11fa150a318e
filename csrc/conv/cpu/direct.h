// What the schedules of the direct kernels share: plans of parts that fit a thread's caches, and the ends of a call.
//
// Both kernels copy the part of the image that they meet, padding included, to float32 scratch: depthwise with channels
// side by side (or read in place, where edges clip the taps), grouped with pixels side by side, rows one after another,
// so that a whole block of them is one line and every tap a shift of it.
#pragma once
#include "conv/conv.h"

namespace fastdl {

constexpr i64 kDirectBudget = i64{320} << 10;  // floats of scratch a thread, of all kinds
constexpr i64 kDirectImage = i64{64} << 10;    // of them the copied image, where more than one row
constexpr i64 kDirectChunks = 32;              // wgrad: parts to aim for

// The image that is read and the one that is written: of forward and wgrad x and y, of dgrad dy and dx.
struct DirectSides {
  i64 in[3], out[3], phases[3];
  i64 inputs, outputs;  // channels of a group
};
DirectSides direct_sides(const ConvDesc& d);

// Of the depthwise kernel: forward and dgrad whose results lie with pixels side by side. Sums are turned over at the
// end of a part.
inline bool turns(const ConvDesc& d) { return d.pass != ConvPass::wgrad && !d.channels_last && d.C > 1; }

// A call as the schedules see it.
struct DirectProblem {
  const ConvDesc& d;
  const ConvPlan& p;
  const DirectPlan& q;
  const ConvArgs& args;
  const DirectOps& ops;
  const GemmHelpers& helpers;

  DirectProblem(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& a)
      : d(desc),
        p(plan),
        q(plan.direct),
        args(a),
        ops(*plan.kernel->functions->direct),
        helpers(*gemm_pack_kernel(plan.kernel->isa, desc.dtype).helpers) {}
  // m x n sums, rows sum_row apart, to the written tensor `out` from element `first` on, rows `row` apart.
  void finish(const float* sums, i64 sum_row, const ConvTensor& out, i64 first, i64 row, i64 m, i64 n) const;
};

// Whether the scratch of a thread suffices; then *plan is how.
bool plan_depthwise(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan);
bool plan_grouped(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan);

// *block, of `count` pixels, to the most that fits(), which reads it, allows; then evenly.
template <class Fits>
void direct_grow(i64 count, i64* block, const Fits& fits) {
  for (i64 most = count; *block < most;) {
    const i64 old = *block, half = (old + most + 1) / 2;
    *block = half;
    if (!fits()) *block = old, most = half - 1;
  }
  *block = ceil_div(count, ceil_div(count, *block));
}

// dbias, where it is wanted.
void direct_bias_grad(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args);

// dw = the sums of `chunks` partial sums float[K][C/G * taps] each, in their order, narrowed.
void direct_combine(const ConvDesc& d, const float* partial, i64 chunks, const ConvTensor& dw, int threads);

}  // namespace fastdl
