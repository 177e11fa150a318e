// Convolution on a GPU: which kernel, how its work is cut, how much workspace. Pure; any GPU's plan on any machine.
#pragma once
#include <string>
#include <vector>

#include "conv/cuda/index.h"
#include "conv/desc.h"
#include "ptx/device.h"

namespace fastdl {

enum class CudaConvKind : std::uint8_t {
  kTile,       // forward and dgrad: tiles of output pixels x output channels on tensor cores
  kWgrad,      // tiles of output channels x (taps, channels) on tensor cores, pixels summed over
  kDepthwise,  // one channel a group, every pass: bound by memory
  kDirect,     // every pass of every problem, one thread a few results, by FMA
};

struct CudaConvKernel {
  const char* name;
  DType dtype;
  CudaConvKind kind;
  Precision precision;  // of products of float32
  int tile_m, tile_n, tile_k, threads;
};

struct CudaConvPlan {
  const CudaConvKernel* kernel = nullptr;
  const char* why = "";
  int multiprocessors = 0;
  // Forward and dgrad: all phases. wgrad: the one gather, whose rows are summed over.
  int phases = 0;
  GatherPhase phase[kMostPhases];
  int merged = 1;                 // groups that tiles take as one
  i64 groups = 1;                 // of that many each
  int channels = 0, columns = 0;  // of such a group: what is summed over with the taps, and results
  int tiles_n = 0, tiles = 0;     // of such a group
  int chunks = 1, chunk = 0;      // of a sum: steps of tile_k, or of depthwise wgrad pixels
  int grid[3] = {0, 0, 0};        // blocks of the tiles' launch: at most 2^31 - 1, 65535, 65535
  i64 pack_bytes = 0;             // weights, in the order that tiles read them
  i64 partial_bytes = 0;          // sums of all chunks
  int bias_chunks = 0, bias_chunk = 0;
  i64 bias_bytes = 0;  // wgrad: partial sums of dbias

  i64 workspace_bytes() const { return pack_bytes + partial_bytes + bias_bytes; }
};

const std::vector<CudaConvKernel>& cuda_conv_kernels();
const char* cuda_conv_kind_name(CudaConvKind kind);

CudaConvPlan cuda_conv_plan(const ConvDesc& desc, const Gpu& gpu, const CudaConvKernel* forced = nullptr);
std::vector<std::string> cuda_conv_candidates(const ConvDesc& desc, const CudaConvPlan& chosen);
std::string describe(const ConvDesc& desc, const CudaConvPlan& plan);

// Launches on the stream; workspace: plan.workspace_bytes(), aligned to 16 bytes.
void cuda_conv_run(const ConvDesc& desc, const CudaConvPlan& plan, const ConvArgs& args, void* workspace,
                   const Stream& stream);

}  // namespace fastdl
