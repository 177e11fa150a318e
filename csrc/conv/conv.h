// Convolution on the CPU: plan() decides and is pure.
#pragma once
#include <string>
#include <vector>

#include "base/cpu_info.h"
#include "conv/cpu/kernel_args.h"
#include "conv/cpu/wgrad.h"
#include "conv/desc.h"
#include "gemm/gemm.h"

namespace fastdl {

struct ConvPhase {
  ConvAxis axis[3];
  i64 steps;  // packed steps of a panel
  i64 pack;   // where its panels begin in those of a group, in floats
  i64 peaks;  // likewise the largest |w| of its columns
  i64 row_blocks, w_blocks;
  i64 part;  // the first of its parts
};

// How a direct kernel cuts its work and the scratch of a thread.
struct DirectPlan {
  i64 channels;        // of a part; grouped: groups of a part
  i64 place_channels;  // of a part whose image is read in place
  i64 block[3];        // output pixels of a part, of one phase
  i64 chunks;          // wgrad: partial sums, added in their order
  // A thread's: the copied image, results (wgrad: dy), weights or their sums; row: depthwise bias and lists of taps,
  // grouped a row turned over.
  i64 x_floats, y_floats, w_floats, row_floats;
  i64 partial_bytes;  // for all threads

  i64 per_thread_bytes() const { return pages(4 * (x_floats + y_floats + w_floats + row_floats)); }
};

struct ConvPlan {
  const ConvKernel* kernel;
  int threads;
  const char* why;

  // Dense. A part is k_block output channels of a block of output pixels: `planes` whole ones (an image, of three
  // dimensions one depth of it), or `rows` rows of one, w_block wide. For c_block channels at a time the part of the
  // image that its taps meet, padding included, is copied to scratch: all taps of a dimension together where `shared`,
  // else one tap at a time.
  std::vector<ConvPhase> phases;
  i64 c_block, k_block, planes, rows, w_block;
  bool shared[3];
  // Groups of few channels: tiles take `merge` as one, weights between them zero. A part has group_block of these, each
  // with a panel of its own; a pixel of the band holds the channels of all.
  i64 merge = 1, group_block = 1;
  bool fold;    // few channels: a pixel of the band holds all taps along the width of an output pixel
  bool strips;  // of 32 pixels, against n_block columns at a time: all that is summed, then finished meanwhile
  i64 n_block;
  bool flat;         // tiles read pixels where they lie in the band, also those between its rows
  i64 group_floats;  // packed weights of a group, or of those taken as one
  i64 w_bytes;       // of all groups, for all threads; 0 where frozen
  i64 band_bytes, sum_bytes, pointer_bytes, strip_bytes;  // a thread
  i64 band_pixels, stage_floats;
  i64 tile_bytes;            // a thread: a gathered panel, peaks, what is computed again
  const GemmKernel* repair;  // as GemmPlan::repair
  i64 parts;

  DirectPlan direct;
  ConvWgradPlan wgrad;

  bool mixes_groups() const { return merge > 1 || group_block > 1; }
  i64 per_thread_bytes() const {
    return band_bytes + sum_bytes + pointer_bytes + strip_bytes + tile_bytes + wgrad.per_thread_bytes();
  }
  i64 workspace_bytes() const { return w_bytes + wgrad.chunk_bytes + threads * per_thread_bytes(); }
};

constexpr i64 kConvThreadBytes = i64{2} << 20;  // the most that a thread takes beside the packed weights

inline const GemmKernel& conv_tiles(const ConvKernel& kernel) {
  return gemm_pack_kernel(kernel.isa, kernel.dtype, kernel.precision);
}
// Whether the kernel needs the largest magnitudes of rows and columns: see GemmHelpers::suspects.
inline bool conv_has_peaks(const ConvKernel& kernel) { return is_tiled(kernel) && kernel.dtype == DType::f32; }
// From row to row of what tiles load or store, so many floats at least. (Rows a multiple of 1024 bytes apart fall on
// few sets of L1: 1x1, 64 -> 256, takes 12% longer.)
inline i64 conv_apart(i64 floats) { return floats + (floats % 256 == 240 ? 32 : 16); }
inline i64 conv_sum_row(const ConvKernel& kernel, i64 columns) {
  const i64 row = round_up(columns, kernel.nr / 2);
  return is_tiled(kernel) ? conv_apart(row) : row;
}
// Of a pixel in the band that holds so many.
inline i64 conv_pixel_floats(const ConvPlan& plan, i64 units) {
  const bool apart = plan.mixes_groups() || (is_tiled(*plan.kernel) && units % 256 == 0);
  return apart ? conv_apart(units) : units;
}
// Floats of a packed row or column that hold so many channels.
inline i64 conv_units(const ConvKernel& kernel, i64 channels) {
  return ceil_div(channels, kernel.k_step) * (kernel.k_step / kernel.k_unit * kernel.planes);
}

const std::vector<ConvKernel>& conv_kernels();

// The problem with `merge` groups at a time taken as one.
inline ConvDesc conv_merged(ConvDesc desc, i64 merge) {
  desc.groups /= merge;
  return desc;
}

// Direct kernels read the weight itself, of which they copy little: the problem without its pack where one of them
// runs.
ConvDesc conv_unfrozen(const ConvDesc& desc, const Machine& machine);
ConvPlan conv_plan(const ConvDesc& desc, const Machine& machine, const ConvKernel* forced = nullptr);
std::vector<std::string> conv_candidates(const ConvDesc& desc, const Machine& machine, const ConvPlan& chosen);
std::string describe(const ConvDesc& desc, const ConvPlan& plan);

// may_be_flat: see wgrad::trusted.
ConvWgradPlan conv_wgrad_plan(const ConvDesc& desc, const ConvKernel& kernel, int threads, bool may_be_flat = true);

void conv_run_dense(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);
void conv_run_wgrad(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);
void conv_run_depthwise(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);
void conv_run_grouped(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);

// Frozen packs: the packed weights of forward or dgrad, as the plan for a machine lays them out.
i64 conv_pack_size(const ConvDesc& desc, const Machine& machine);
void conv_pack(const ConvDesc& desc, const Machine& machine, const ConvTensor& w, float* out);

CallCounts<ConvKernel>& conv_calls();

// Plan for this machine, log, count, run.
void conv(const ConvDesc& desc, const ConvArgs& args, const ConvKernel* forced, int threads);

}  // namespace fastdl
