// A dense convolution as its schedule and its packing see it.
#pragma once
#include <algorithm>

#include "conv/conv.h"
#include "gemm/gemm.h"

namespace fastdl::dense {

constexpr i64 kMaxRuns = 256;  // of a product: kc floats at least one long

// Positions of the image along a dimension, as the band of a part holds them: of `step` sub-images the (q % step)-th
// has position q, at q / step, so that the pixels of neighbouring outputs are neighbours there. `each`: from line to
// line of a sub-image; what is outside the image at both ends of a line is there once.
struct Line {
  i64 step, stride;     // stride: of the image, from position to position
  i64 first;            // in the image
  i64 positions, each;  // those from begin to end are inside the image
  i64 begin, end;

  i64 longest() const { return positions / step; }
  // Of sub-image s, those inside the image.
  i64 begin_of(i64 s) const { return std::max<i64>(0, ceil_div(begin - s, step)); }
  i64 end_of(i64 s) const { return std::max(begin_of(s), ceil_div(end - s, step)); }
};

// Of n outputs from the one `from` on; shared: with all taps, else with one.
inline Line line_of(const ConvAxis& a, i64 from, i64 n, bool shared, i64 tap, i64 size) {
  Line l = {};
  l.step = shared ? a.in_step : 1, l.stride = shared ? 1 : a.in_step;
  l.first = from * a.in_step + a.first + tap * a.tap_step;
  l.each = ceil_div(shared ? (n - 1) * a.in_step + std::max<i64>(0, a.taps - 1) * a.tap_step + 1 : n, l.step);
  l.positions = l.each * l.step;
  l.begin = l.first >= 0 ? 0 : std::min(l.positions, ceil_div(-l.first, l.stride));
  l.end = l.first >= size ? l.begin : std::clamp((size - 1 - l.first) / l.stride + 1, l.begin, l.positions);
  // Outputs keep places of their own.
  if (shared && l.step == 1) l.each = std::max(n, l.each - std::min(l.begin, l.positions - l.end));
  return l;
}
// The same of neighbours that a pixel of the band holds side by side.
inline Line folded_line(ConvAxis a, i64 from, i64 n, i64 size) {
  const i64 outputs = (n - 1) * a.in_step + 1;
  a.first += from * a.in_step, a.in_step = 1;
  return line_of(a, 0, outputs, true, 0, size);
}
// Pixels of a sub-image.
inline i64 sub_pixels(const Line& h, const Line& w, i64 planes) {
  return ((planes - 1) * h.each + h.longest() - 1) * w.each + w.longest();
}

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

// Whether the taps along the width make up for channels that are too few for tiles, or whose last would be paired with
// zero: neighbours in the image, and not more of them than are computed again at a time.
bool folds(const ConvDesc& desc, const ConvKernel& kernel);
// How many groups tiles take as one: as many as fit a step of channels and a panel of columns; 0: not even one does.
i64 merged_groups(const ConvDesc& desc, const ConvKernel& kernel);
// All of plan but the kernel and its threads, which are given.
void plan_dense(const ConvDesc& desc, const Machine& machine, ConvPlan* plan);

// All weights as tiles read them: see ConvPlan.
void pack_weights(const Problem& x, float* out, int threads);

}  // namespace fastdl::dense
