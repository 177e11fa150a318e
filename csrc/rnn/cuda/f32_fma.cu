#include "rnn/cuda/instances.cuh"

CUDA_RNN_ROWS(cuda_f32_fma, float, float, 0)
