// What the schedules of the direct kernels share: plans of parts that fit a thread's caches, and the ends of a call.
//
// Both kernels copy the part of the image that they meet, padding included, to float32 scratch: depthwise with channels
// side by side (or read in place, where edges clip the taps), grouped with pixels side by side, rows one after another,
// so that a whole block of them is one line and every tap a shift of it.
#pragma once
#include "conv/conv.h"
#include "gemm/gemm.h"

namespace fastdl {

// Along one dimension and phase: copies ("planes") of every in_step-th element from base on, and where taps read in
// them.
struct DirectAxis {
  i64 count = 0, in_step = 1, out_step = 1, out_first = 0, span = 0;  // span: the largest shift
  std::vector<i64> base;
  std::vector<i64> plane, shift, tap;  // of each tap; tap: its index in the weight
};
DirectAxis direct_axis(const ConvDesc& d, int dim, i64 phase);

// The image that is read and the one that is written: of forward and wgrad x and y, of dgrad dy and dx.
struct DirectSides {
  i64 in[3], out[3], phases[3];
  i64 inputs, outputs;  // channels of a group
};
DirectSides direct_sides(const ConvDesc& d);

// Whether the scratch of a thread suffices; then *plan is how.
bool plan_depthwise(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan);
bool plan_grouped(const ConvDesc& d, const DirectOps& ops, DirectPlan* plan);

// dbias, where it is wanted.
void direct_bias_grad(const ConvDesc& d, const ConvPlan& p, const ConvArgs& args);

inline i64 direct_round(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }

// dw = the sums of `chunks` partial sums float[K][C/G * taps] each, in their order, narrowed.
void direct_combine(const ConvDesc& d, const float* partial, i64 chunks, const ConvTensor& dw, int threads);

inline const char* direct_at(const void* p, i64 elements, DType dtype) {
  return static_cast<const char*>(p) + elements * kItemSize[static_cast<int>(dtype)];
}
inline char* direct_at(void* p, i64 elements, DType dtype) {
  return static_cast<char*>(p) + elements * kItemSize[static_cast<int>(dtype)];
}

}  // namespace fastdl
