#include "rnn/cuda/kernel.cuh"

namespace fastdl::cuda_f32_fma {

template <RnnCell cell, bool resident>
using Row = CudaRnnRow<float, float, 0, cell, resident>;

extern const CudaRnnFunctions lstm_resident = Row<RnnCell::lstm, true>::functions;
extern const CudaRnnFunctions lstm_steps = Row<RnnCell::lstm, false>::functions;
extern const CudaRnnFunctions gru_resident = Row<RnnCell::gru, true>::functions;
extern const CudaRnnFunctions gru_steps = Row<RnnCell::gru, false>::functions;
extern const CudaRnnFunctions plain_resident = Row<RnnCell::plain, true>::functions;
extern const CudaRnnFunctions plain_steps = Row<RnnCell::plain, false>::functions;

}  // namespace fastdl::cuda_f32_fma
