// Attention on a GPU: which kernels run a problem, how its keys are cut, what workspace it takes. Pure, for any GPU.
// The problem is the CPU's AttentionDesc; of packed sequences Lq and Lk are the rows of all together, for their own
// lengths are known to the GPU alone.
#pragma once
#include <string>
#include <vector>

#include "attention/cuda/kernel_problem.h"
#include "ptx/device.h"

namespace fastdl {

enum class CudaAttentionKind : std::uint8_t {
  kTile,       // 64 or 128 query rows a block
  kDecode,     // up to 16, the warps share the keys
  kQueryGrad,  // dQ, and the gradient of the mask
  kKeyGrad,    // dK and dV
};

struct CudaAttentionKernel {
  const char* name;
  DType dtype;
  CudaAttentionKind kind;
  int depth;                      // D and Dv at most
  int rows, cols;                 // that stay in a block, that stream by
  int split;                      // warps that share the keys of a tile
  int shared_bytes, stage_bytes;  // with one stage, each further one
  void (*forward)(const CudaAttentionArgs&, int blocks, int shared_bytes, const Stream&);
  void (*grad)(const CudaAttentionGradArgs&, int blocks, int shared_bytes, const Stream&);
};

struct CudaAttentionPlan {
  const CudaAttentionKernel* kernel;
  int tiles;    // of rows, of one head: of packed sequences at most so many
  int pack;     // query heads side by side in a tile
  int chunks;   // of keys
  int columns;  // pieces of the columns of O, a block each
  int slots;    // pieces of a row that are combined: chunks, times warps in decode
  i64 blocks;
  i64 workspace_bytes;
  const char* why;
};

struct CudaAttentionBackwardPlan {
  const CudaAttentionKernel* query;  // dQ and dmask
  const CudaAttentionKernel* key;    // dK and dV
  int query_stages, key_stages;
  i64 workspace_bytes;  // delta [B,H,Lq]
};

const char* kind_name(CudaAttentionKind kind);
const std::vector<CudaAttentionKernel>& cuda_attention_kernels();

// forced: a forward row, or null. Throws Error where it does not take the problem, or nothing does.
CudaAttentionPlan cuda_attention_plan(const AttentionDesc& desc, const Gpu& gpu, const CudaAttentionKernel* forced);
CudaAttentionBackwardPlan cuda_attention_backward_plan(const AttentionDesc& desc, const Gpu& gpu);
// Why kernels for these head dimensions do not run on a GPU, or "": float32's tiles at 256 are 136 KiB and more, of
// which GPUs of sm_86, 89 and 120 have 99.
std::string cuda_attention_refusal(DType dtype, i64 D, i64 Dv, const Gpu& gpu);
std::string describe(const AttentionDesc& desc, const CudaAttentionPlan& plan);
std::string describe(const AttentionDesc& desc, const CudaAttentionBackwardPlan& plan);

// The sequences of a packed batch, on the GPU.
struct CudaSequences {
  const std::int32_t* q = nullptr;
  const std::int32_t* k = nullptr;
};

void cuda_attention_run(const AttentionDesc& desc, const CudaAttentionPlan& plan, const AttentionArgs& args,
                        const CudaSequences& sequences, void* workspace, const Stream& stream);
void cuda_attention_backward_run(const AttentionDesc& desc, const CudaAttentionBackwardPlan& plan,
                                 const AttentionArgs& args, const AttentionGrads& grads, const i64 (&dmask_sizes)[4],
                                 const CudaSequences& sequences, void* workspace, const Stream& stream);

}  // namespace fastdl
