#include "conv/cpu/kernel_direct.h"
#include "conv/cpu/kernel_pairs.h"
#include "conv/cpu/kernel_wgrad.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

using L = VecAvx512Bf16;

extern const ConvFunctions dense_bf16;
const ConvFunctions dense_bf16 = dense_pairs<L, VecAvx512, 6, 4>();

extern const ConvFunctions direct_bf16;
const ConvFunctions direct_bf16 = direct_functions_pairs<L, VecAvx512>();
extern const ConvFunctions wgrad;
const ConvFunctions wgrad = wgrad_functions<L, 14, 2>();

}  // namespace fastdl::avx512bf16
