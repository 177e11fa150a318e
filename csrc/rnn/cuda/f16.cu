#include "rnn/cuda/instances.cuh"

CUDA_RNN_ROWS(cuda_f16, f16, f16, 1)
