#include "rnn/cpu/kernel_amx.h"

namespace fastdl::amx {

extern const RnnFunctions lstm_bf16, gru_bf16, plain_bf16;
const RnnFunctions lstm_bf16 = tile_functions<bf16, bf16, Whole, Products1, RnnCell::lstm, 2>();
const RnnFunctions gru_bf16 = tile_functions<bf16, bf16, Whole, Products1, RnnCell::gru, 3>();
const RnnFunctions plain_bf16 = tile_functions<bf16, bf16, Whole, Products1, RnnCell::plain, 1>();
extern const RnnFunctions lstm_f16, gru_f16, plain_f16;
const RnnFunctions lstm_f16 = tile_functions<f16, float, Parts<2>, Products4, RnnCell::lstm, 2>();
const RnnFunctions gru_f16 = tile_functions<f16, float, Parts<2>, Products4, RnnCell::gru, 3>();
const RnnFunctions plain_f16 = tile_functions<f16, float, Parts<2>, Products4, RnnCell::plain, 1>();
extern const RnnFunctions lstm_f32_medium, gru_f32_medium, plain_f32_medium;
const RnnFunctions lstm_f32_medium = tile_functions<float, float, Parts<1>, Products1, RnnCell::lstm, 2>();
const RnnFunctions gru_f32_medium = tile_functions<float, float, Parts<1>, Products1, RnnCell::gru, 3>();
const RnnFunctions plain_f32_medium = tile_functions<float, float, Parts<1>, Products1, RnnCell::plain, 1>();
extern const RnnFunctions lstm_f32_high, gru_f32_high, plain_f32_high;
const RnnFunctions lstm_f32_high = tile_functions<float, float, Parts<2>, Products3, RnnCell::lstm, 2>();
const RnnFunctions gru_f32_high = tile_functions<float, float, Parts<2>, Products3, RnnCell::gru, 3>();
const RnnFunctions plain_f32_high = tile_functions<float, float, Parts<2>, Products3, RnnCell::plain, 1>();
extern const RnnFunctions lstm_f32_split, gru_f32_split, plain_f32_split;
const RnnFunctions lstm_f32_split = tile_functions<float, float, Parts<3>, Products6, RnnCell::lstm, 2>();
const RnnFunctions gru_f32_split = tile_functions<float, float, Parts<3>, Products6, RnnCell::gru, 3>();
const RnnFunctions plain_f32_split = tile_functions<float, float, Parts<3>, Products6, RnnCell::plain, 1>();

}  // namespace fastdl::amx
