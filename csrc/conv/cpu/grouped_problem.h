// A grouped convolution as its schedules see it: the image that a block of pixels meets lies in scratch as planes, one
// for each way of stepping through it, in which every tap is a shift.
#pragma once
#include <algorithm>

#include "conv/cpu/direct.h"

namespace fastdl::grouped {

// Along one dimension and phase: copies ("planes") of every in_step-th element from base on, and where taps read in
// them.
struct Axis {
  i64 count = 0, in_step = 1, out_step = 1, out_first = 0, span = 0;  // span: the largest shift
  std::vector<i64> base;
  std::vector<i64> plane, shift, tap;  // of each tap; tap: its index in the weight
};
Axis axis_of(const ConvDesc& d, int dim, i64 phase);

// One phase of each dimension together.
struct Phase {
  Axis axis[3];
  i64 taps = 1;          // of a channel
  i64 extent[3], plane;  // of a plane, in pixels
  i64 planes;
  std::vector<i64> off;  // [inputs][taps]

  void lay_out(const DirectPlan& p, i64 inputs);
  i64 line(const i64* n) const { return ((n[0] - 1) * extent[1] + n[1] - 1) * extent[2] + n[2]; }  // of n pixels
};

// A block of output pixels of one phase.
struct Block {
  i64 first[3], n[3];
};

struct Problem : DirectProblem {
  DirectSides sides;
  std::vector<Phase> phases;
  i64 bundles;            // of q.channels groups
  i64 blocks[3], pixels;  // blocks of output pixels: of a dimension's longest phase, of all three together

  Problem(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& a);
  Block block(const Phase& phase, i64 index) const;
};

// dst[c][planes][extent] = the image from `origin` on that a block meets, zeros outside it; a channel is two where
// floats are pairs.
void copy_image(const Problem& x, const ConvTensor& image, const void* origin, const Phase& f, const Block& b,
                i64 channels, float* dst);

// The widths of the kernel that `left` outputs are cut into: the next, and the sum of all.
int outputs_at(i64 left, const DirectOps& ops);
i64 padded_outputs(i64 outputs, const DirectOps& ops);

// dw, without dbias.
void gradient(const Problem& x);

}  // namespace fastdl::grouped
