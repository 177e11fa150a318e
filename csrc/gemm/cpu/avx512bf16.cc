#include "gemm/cpu/kernel_pairs.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

using L = VecAvx512Bf16;

extern const GemmHelpers helpers_bf16;
const GemmHelpers helpers_bf16 = pair_helpers<L, VecAvx512>();

void tile_14x32(const TileArgs& t) { run_tile<L, 14, 2>(t); }
void dot_6x4_bf16(const TileArgs& t) { run_dot<L, bf16, 6, Pairs<L>>(t); }

}  // namespace fastdl::avx512bf16
