#include "rnn/cuda/instances.cuh"

CUDA_RNN_ROWS(cuda_f32, float, bf16, 3)
