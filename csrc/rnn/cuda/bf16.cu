#include "rnn/cuda/instances.cuh"

CUDA_RNN_ROWS(cuda_bf16, bf16, bf16, 1)
