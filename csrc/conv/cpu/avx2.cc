#include "conv/cpu/kernel.h"
#include "simd/vec_avx2.h"

namespace fastdl::avx2 {

using L = VecAvx2;

extern const ConvFunctions dense_f32, dense_bf16, dense_f16;
const ConvFunctions dense_f32 = dense_functions<L, float, 6, 2>();
const ConvFunctions dense_bf16 = dense_functions<L, bf16, 6, 2>();
const ConvFunctions dense_f16 = dense_functions<L, f16, 6, 2>();

}  // namespace fastdl::avx2
