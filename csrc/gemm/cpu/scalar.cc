#include "gemm/cpu/kernel.h"
#include "simd/vec.h"

namespace fastdl::scalar {

using L = VecScalar;

extern const GemmHelpers helpers_f32, helpers_bf16, helpers_f16;
const GemmHelpers helpers_f32 = helpers<L, float>();
const GemmHelpers helpers_bf16 = helpers<L, bf16>();
const GemmHelpers helpers_f16 = helpers<L, f16>();

void tile_4x8(const TileArgs& t) { run_tile<L, 4, 2>(t); }

}  // namespace fastdl::scalar
