#include "rnn/cpu/kernel.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

using L = VecAvx512Bf16;

extern const RnnFunctions lstm_bf16, gru_bf16, plain_bf16;
const RnnFunctions lstm_bf16 = functions<L, VecAvx512, bf16, bf16, RnnCell::lstm, 6, 4, 1>();
const RnnFunctions gru_bf16 = functions<L, VecAvx512, bf16, bf16, RnnCell::gru, 8, 3, 1>();
const RnnFunctions plain_bf16 = functions<L, VecAvx512, bf16, bf16, RnnCell::plain, 14, 2, 1>();

}  // namespace fastdl::avx512bf16
