// Recurrent layers on a GPU: the math and the arguments are those of rnn/rnn.h. plan() decides and is pure.
#pragma once
#include <string>
#include <vector>

#include "ptx/device.h"
#include "rnn/rnn.h"

namespace fastdl {

struct CudaRnnFunctions;

struct CudaRnnKernel {
  const char* name;
  DType dtype;
  Precision precision;
  RnnCell cell;
  int parts;      // bf16 parts of a float32; 0: FMA
  bool resident;  // W in shared memory, one cooperative launch a sequence; else a launch a step
  const CudaRnnFunctions* fn;
};

// One of the (with a projection two) products of a step.
struct CudaRnnProduct {
  int units, gates, K, groups, blocks;  // see RnnProduct
  i64 packed_bytes, operand_bytes;      // operand_bytes: one buffer
  int buffers;
};

struct CudaRnnPlan {
  const CudaRnnKernel* kernel;
  CudaRnnProduct product[2];
  int products;
  int tile_rows;                  // sequences of a tile
  int unit_blocks, batch_blocks;  // the grid of the first product; of both where W is resident
  int shared_bytes;               // a thread block
  i64 padded_rows;                // B up to whole fragments
  i64 c_bytes, keep_bytes, counter_bytes;
  const char* why;

  i64 workspace_bytes() const;
};

const std::vector<CudaRnnKernel>& cuda_rnn_kernels();

CudaRnnPlan cuda_rnn_plan(const RnnDesc& desc, const Gpu& gpu, const CudaRnnKernel* forced = nullptr);
std::vector<std::string> cuda_rnn_candidates(const RnnDesc& desc, const Gpu& gpu, const CudaRnnPlan& chosen);
std::string describe(const RnnDesc& desc, const CudaRnnPlan& plan);

// Launches on the stream; grads: backward. workspace: plan.workspace_bytes(), 16-byte aligned.
void cuda_rnn_run(const RnnDesc& desc, const CudaRnnPlan& plan, const RnnArgs& args, const RnnGradients* grads,
                  void* workspace, const Stream& stream);

// out [rows, P], contiguous: of each row of packed y the state that its step started from; rows of h0 [B, P].
void cuda_rnn_states_before(const RnnSteps& steps, i64 T, i64 P, const RnnRows& y, const void* h0, i64 h0_row,
                            void* out, DType dtype, const Stream& stream);

}  // namespace fastdl
