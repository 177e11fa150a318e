#include "conv/cpu/kernel.h"
#include "conv/cpu/kernel_direct.h"
#include "conv/cpu/kernel_wgrad.h"
#include "simd/vec_avx512.h"

namespace fastdl::avx512 {

using L = VecAvx512;

extern const ConvFunctions dense_f32, dense_bf16, dense_f16;
const ConvFunctions dense_f32 = dense_functions<L, float, 6, 4>();
const ConvFunctions dense_bf16 = dense_functions<L, bf16, 6, 4>();
const ConvFunctions dense_f16 = dense_functions<L, f16, 6, 4>();

extern const ConvFunctions direct_f32, direct_bf16, direct_f16;
const ConvFunctions direct_f32 = direct_functions<L, float>();
const ConvFunctions direct_bf16 = direct_functions<L, bf16>();
const ConvFunctions direct_f16 = direct_functions<L, f16>();
extern const ConvFunctions wgrad;
const ConvFunctions wgrad = wgrad_functions<L, 14, 2>();

}  // namespace fastdl::avx512
