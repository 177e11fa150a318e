// Convolution over 1 to 3 spatial dimensions (D, H, W; missing leading ones have size 1) and its gradients.
//   forward  y(n,k,o) = sum_{c,t} w(k,c,t) x(n, g*C/G + c, o*stride - pad + t*dilation) [+ bias(k)], zero outside x
//   dgrad    dx(n,c,i) = sum over (k,o,t) with o*stride - pad + t*dilation = i of w(k,c,t) dy(n,k,o): also the forward
//            of a transposed convolution, then with bias and epilogue
//   wgrad    dw(k,c,t) = sum_{n,o} dy(n,k,o) x(n,c, o*stride - pad + t*dilation);  dbias(k) = sum_{n,o} dy(n,k,o)
// x, dx [N,C,in], y, dy [N,K,out], w, dw [K,C/G,kernel]. Sums are float32 in an order that the shape and the kernel
// fix, rounded once. plan() decides and is pure.
#pragma once
#include <string>
#include <vector>

#include "base/cpu_info.h"
#include "base/types.h"
#include "conv/cpu/kernel_args.h"
#include "conv/cpu/wgrad.h"
#include "gemm/gemm.h"

namespace fastdl {

enum class ConvPass : std::uint8_t { forward, dgrad, wgrad };

struct ConvDesc {
  ConvPass pass;
  i64 N, C, K, groups;
  i64 in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
  bool channels_last = true;  // channels of the written tensor lie side by side
  DType dtype = DType::f32;
  bool frozen = false;                    // w is a pack (conv_pack)
  Precision precision = Precision::ieee;  // asked of float32 operands
};

// Forward and dgrad along one dimension are one gather: out(j*out_step + out_first) = sum_t in(j*in_step + first +
// t*tap_step) w(tap_first + t*tap_inc), j < count, t < taps. dgrad of stride s is s of them, each with its own taps.
struct ConvAxis {
  i64 count, in_step, first, taps, tap_step, out_step, out_first, tap_first, tap_inc;
};

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
  i64 x_floats, y_floats, w_floats, row_floats;
  i64 partial_bytes;  // for all threads

  i64 per_thread_bytes() const { return (4 * (x_floats + y_floats + w_floats + row_floats) + 4095) / 4096 * 4096; }
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
  bool fold;         // tiles of few channels: a pixel of the band holds all taps along the width of an output pixel
  i64 group_floats;  // packed weights of a group
  i64 w_bytes;       // of all groups, for all threads; 0 where frozen
  i64 band_bytes, sum_bytes, pointer_bytes;  // a thread
  i64 band_pixels, stage_floats;
  i64 tile_bytes;            // a thread: a gathered panel, peaks, what is computed again
  const GemmKernel* repair;  // as GemmPlan::repair
  i64 parts;

  DirectPlan direct;
  ConvWgradPlan wgrad;

  i64 per_thread_bytes() const {
    return band_bytes + sum_bytes + pointer_bytes + tile_bytes + wgrad.per_thread_bytes();
  }
  i64 workspace_bytes() const { return w_bytes + wgrad.chunk_bytes + threads * per_thread_bytes(); }
};

constexpr i64 kConvThreadBytes = i64{2} << 20;  // the most that a thread takes beside the packed weights

// Element (n, c, z) lies at n*n_step + c*c_step + sum_i z[i]*step[i].
struct ConvTensor {
  void* data;
  i64 n_step, c_step, step[3];
};

struct ConvArgs {
  ConvTensor x;  // or dx
  ConvTensor y;  // or dy
  ConvTensor w;  // or dw: (n, c, z) is (k, c, t)
  const void* bias = nullptr;
  i64 bias_step = 1;
  Activation activation = Activation::none;
  const void* residual = nullptr;  // added after the activation; lies as what is written does
  void* pre = nullptr;             // gets what the activation is applied to; lies as what is written does
  void* dbias = nullptr;
  i64 dbias_step = 1;
  const float* pack = nullptr;  // the frozen pack, read in place of w
};

// The kernel multiplies tiles of bfloat16, by the gemm row conv_tiles().
inline bool conv_is_tiled(const ConvKernel& kernel) { return kernel.isa == Isa::kAmx; }
inline const GemmKernel& conv_tiles(const ConvKernel& kernel) {
  return gemm_pack_kernel(kernel.isa, kernel.dtype, kernel.precision);
}
// Whether the kernel needs the largest magnitudes of rows and columns: see GemmHelpers::suspects.
inline bool conv_has_peaks(const ConvKernel& kernel) { return conv_is_tiled(kernel) && kernel.dtype == DType::f32; }
// Floats of a packed row or column that hold so many channels.
inline i64 conv_units(const ConvKernel& kernel, i64 channels) {
  return (channels + kernel.k_step - 1) / kernel.k_step * (kernel.k_step / kernel.k_unit * kernel.planes);
}

const char* conv_pass_name(ConvPass pass);
const std::vector<ConvKernel>& conv_kernels();
const ConvKernel& conv_kernel(const std::string& name, const char* op);  // throws Error naming the rows
ConvAxis conv_axis(const ConvDesc& desc, int dim, i64 phase);

// Direct kernels read the weight itself, of which they copy little: the problem without its pack where one of them
// runs.
ConvDesc conv_unfrozen(const ConvDesc& desc, const Machine& machine);
ConvPlan conv_plan(const ConvDesc& desc, const Machine& machine, const ConvKernel* forced = nullptr);
std::vector<std::string> conv_candidates(const ConvDesc& desc, const Machine& machine, const ConvPlan& chosen);
std::string describe(const ConvDesc& desc, const ConvPlan& plan);

ConvWgradPlan conv_wgrad_plan(const ConvDesc& desc, const ConvKernel& kernel, int threads);

void conv_run_dense(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);
void conv_run_wgrad(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);
void conv_run_depthwise(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);
void conv_run_grouped(const ConvDesc& desc, const ConvPlan& plan, const ConvArgs& args);

// Frozen packs: the packed weights of forward or dgrad, as the plan for a machine lays them out.
i64 conv_pack_size(const ConvDesc& desc, const Machine& machine);
void conv_pack(const ConvDesc& desc, const Machine& machine, const ConvTensor& w, float* out);

// Calls that ran this row since the last reset.
i64 conv_calls(const ConvKernel& kernel);
void conv_reset_calls();

// Plan for this machine, log, count, run.
void conv(const ConvDesc& desc, const ConvArgs& args, const ConvKernel* forced, int threads);

}  // namespace fastdl
