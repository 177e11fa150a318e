#include "conv/cpu/kernel_direct.h"
#include "conv/cpu/kernel_pairs.h"
#include "conv/cpu/kernel_wgrad.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

using L = VecAvx512Bf16;

extern const ConvFunctions dense_bf16;
const ConvFunctions dense_bf16 = dense_pairs<L, VecAvx512, 14, 2>();

extern const ConvFunctions direct_bf16;
const ConvFunctions direct_bf16 = {nullptr, nullptr, nullptr, nullptr, &direct_ops_pairs<L, VecAvx512>};
extern const ConvFunctions wgrad;
const ConvFunctions wgrad = {{}, {}, {}, run_wgrad_tile<L, 14, 2>};

}  // namespace fastdl::avx512bf16
