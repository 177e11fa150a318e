#include "rnn/cpu/kernel.h"
#include "simd/vec.h"

namespace fastdl::scalar {

using L = VecScalar;

extern const RnnFunctions lstm_f32, gru_f32, plain_f32;
const RnnFunctions lstm_f32 = functions<L, L, float, float, RnnCell::lstm, 4, 2, 2>();
const RnnFunctions gru_f32 = functions<L, L, float, float, RnnCell::gru, 3, 3, 1>();
const RnnFunctions plain_f32 = functions<L, L, float, float, RnnCell::plain, 4, 2, 1>();
extern const RnnFunctions lstm_bf16, gru_bf16, plain_bf16;
const RnnFunctions lstm_bf16 = functions<L, L, bf16, float, RnnCell::lstm, 4, 2, 2>();
const RnnFunctions gru_bf16 = functions<L, L, bf16, float, RnnCell::gru, 3, 3, 1>();
const RnnFunctions plain_bf16 = functions<L, L, bf16, float, RnnCell::plain, 4, 2, 1>();
extern const RnnFunctions lstm_f16, gru_f16, plain_f16;
const RnnFunctions lstm_f16 = functions<L, L, f16, float, RnnCell::lstm, 4, 2, 2>();
const RnnFunctions gru_f16 = functions<L, L, f16, float, RnnCell::gru, 3, 3, 1>();
const RnnFunctions plain_f16 = functions<L, L, f16, float, RnnCell::plain, 4, 2, 1>();

}  // namespace fastdl::scalar
