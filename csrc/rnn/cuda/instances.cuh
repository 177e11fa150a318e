// The rows of kernels.inc for one dtype: values T, multiplied as E in that many parts (0: by FMA).
#pragma once
#include "rnn/cuda/kernel.cuh"

#define CUDA_RNN_ROWS(space, T, E, parts)                                              \
  namespace fastdl::space {                                                            \
  template <RnnCell cell, bool resident>                                               \
  using Row = CudaRnnRow<T, E, parts, cell, resident>;                                 \
  extern const CudaRnnFunctions lstm_resident = Row<RnnCell::lstm, true>::functions;   \
  extern const CudaRnnFunctions lstm_steps = Row<RnnCell::lstm, false>::functions;     \
  extern const CudaRnnFunctions gru_resident = Row<RnnCell::gru, true>::functions;     \
  extern const CudaRnnFunctions gru_steps = Row<RnnCell::gru, false>::functions;       \
  extern const CudaRnnFunctions plain_resident = Row<RnnCell::plain, true>::functions; \
  extern const CudaRnnFunctions plain_steps = Row<RnnCell::plain, false>::functions;   \
  }  // namespace fastdl::space
