#include "gemm/cpu/kernel.h"
#include "simd/vec_avx2.h"

namespace fastdl::avx2 {

using L = VecAvx2;

extern const GemmHelpers helpers_f32, helpers_bf16, helpers_f16;
const GemmHelpers helpers_f32 = helpers<L, float>();
const GemmHelpers helpers_bf16 = helpers<L, bf16>();
const GemmHelpers helpers_f16 = helpers<L, f16>();

void tile_6x16(const TileArgs& t) { run_tile<L, 6, 2>(t); }
void dot_3x4_f32(const TileArgs& t) { run_dot<L, float, 3>(t); }
void dot_3x4_bf16(const TileArgs& t) { run_dot<L, bf16, 3>(t); }
void dot_3x4_f16(const TileArgs& t) { run_dot<L, f16, 3>(t); }

}  // namespace fastdl::avx2
