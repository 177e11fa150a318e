// A dense convolution as its schedule and its packing see it.
#pragma once
#include <algorithm>

#include "conv/conv.h"
#include "gemm/gemm.h"

namespace fastdl::dense {

// The problem as forward sees it: `in` is read, `out` is written.
struct Problem {
  const ConvDesc d;  // of the groups that are taken as one
  const ConvPlan& p;
  const ConvArgs& args;
  const GemmHelpers& helpers;
  i64 channels, columns;  // of a group: summed over, and written
  ConvTensor in, out;
  i64 size[3];              // of in
  i64 w_channel, w_column;  // strides of w
  const float* pack = nullptr;

  Problem(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& a)
      : d(conv_merged(desc, plan.merge)), p(plan), args(a), helpers(*conv_tiles(*plan.kernel).helpers) {
    const bool forward = d.pass == ConvPass::forward;
    channels = (forward ? d.C : d.K) / d.groups, columns = (forward ? d.K : d.C) / d.groups;
    in = forward ? a.x : a.y, out = forward ? a.y : a.x;
    std::copy_n(forward ? d.in : d.out, 3, size);
    w_channel = forward ? a.w.c_step : a.w.n_step, w_column = forward ? a.w.n_step : a.w.c_step;
  }
  i64 units(i64 c) const { return conv_units(*p.kernel, c); }
  i64 panels() const { return ceil_div(columns, p.kernel->nr); }
  // Where the panel of a phase and group begins in all of them, and its peaks.
  i64 panel_at(const ConvPhase& phase, i64 group, i64 panel) const {
    return group * p.group_floats + phase.pack + panel * phase.steps * p.kernel->nr;
  }
  i64 peaks_at(const ConvPhase& phase, i64 group, i64 panel) const {
    return group * p.group_floats + phase.peaks + panel * p.kernel->nr;
  }
};

// All weights as tiles read them: see ConvPlan.
void pack_weights(const Problem& x, float* out, int threads);

}  // namespace fastdl::dense
