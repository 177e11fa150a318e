#include "attention/cuda/instances.cuh"

#define ATTENTION_BF16 ATTENTION_ELSEWHERE
#define ATTENTION_F16 ATTENTION_HERE
#define ATTENTION_F32 ATTENTION_ELSEWHERE

namespace fastdl {
#include "attention/cuda/kernels.inc"
ATTENTION_SMALL(f16)
}  // namespace fastdl
