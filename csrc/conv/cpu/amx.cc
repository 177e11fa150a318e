#include "conv/cpu/kernel_amx.h"

namespace fastdl::amx {

extern const ConvFunctions dense_bf16, dense_f16, dense_f32_medium, dense_f32_high, dense_f32_split;
const ConvFunctions dense_bf16 = dense_tiles<bf16, Whole, Products1>();
const ConvFunctions dense_f16 = dense_tiles<f16, Parts<2>, Products4>();
const ConvFunctions dense_f32_medium = dense_tiles<float, Parts<1>, Products1>();
const ConvFunctions dense_f32_high = dense_tiles<float, Parts<2>, Products3>();
const ConvFunctions dense_f32_split = dense_tiles<float, Parts<3>, Products6>();

extern const ConvFunctions wgrad, wgrad_bf16, wgrad_f32_medium, wgrad_f32_high, wgrad_f32_split;
const ConvFunctions wgrad = {};  // GEMM's alone
const ConvFunctions wgrad_f32_medium = wgrad_tiles<float, Parts<1>, Products1>();
const ConvFunctions wgrad_f32_high = wgrad_tiles<float, Parts<2>, Products3>();
const ConvFunctions wgrad_f32_split = wgrad_tiles<float, Parts<3>, Products6>();
const ConvFunctions wgrad_bf16 = wgrad_tiles<bf16, Whole, Products1>();

}  // namespace fastdl::amx
