#include "rnn/cuda/instances.cuh"

CUDA_RNN_ROWS(cuda_tf32, float, bf16, 2)
