#include "conv/cpu/kernel_pairs.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

using L = VecAvx512Bf16;

extern const ConvFunctions dense_bf16;
const ConvFunctions dense_bf16 = dense_pairs<L, VecAvx512, 14, 2>();

}  // namespace fastdl::avx512bf16
