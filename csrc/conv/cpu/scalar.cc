#include "conv/cpu/kernel.h"
#include "simd/vec.h"

namespace fastdl::scalar {

using L = VecScalar;

extern const ConvFunctions dense_f32, dense_bf16, dense_f16;
const ConvFunctions dense_f32 = dense_functions<L, float, 4, 2>();
const ConvFunctions dense_bf16 = dense_functions<L, bf16, 4, 2>();
const ConvFunctions dense_f16 = dense_functions<L, f16, 4, 2>();

extern const ConvFunctions wgrad_plain;
const ConvFunctions wgrad_plain = {};

}  // namespace fastdl::scalar
