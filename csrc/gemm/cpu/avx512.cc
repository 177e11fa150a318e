#include "gemm/cpu/kernel.h"
#include "simd/vec_avx512.h"

namespace fastdl::avx512 {

using L = VecAvx512;

extern const GemmHelpers helpers_f32, helpers_bf16, helpers_f16;
const GemmHelpers helpers_f32 = helpers<L, float>();
const GemmHelpers helpers_bf16 = helpers<L, bf16>();
const GemmHelpers helpers_f16 = helpers<L, f16>();

void tile_14x32(const TileArgs& t) { run_tile<L, 14, 2>(t); }
void dot_6x4_f32(const TileArgs& t) { run_dot<L, float, 6>(t); }
void dot_6x4_bf16(const TileArgs& t) { run_dot<L, bf16, 6>(t); }
void dot_6x4_f16(const TileArgs& t) { run_dot<L, f16, 6>(t); }

}  // namespace fastdl::avx512
