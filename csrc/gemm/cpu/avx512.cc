#include "gemm/cpu/kernel.h"
#include "simd/vec_avx512.h"

namespace fastdl::avx512 {

using L = VecAvx512;

void gemm_f32_14x32_avx512(const TileArgs& t) { run_tile<L, 14, 2>(t); }
void gemm_f32_dot_6x4_avx512(const TileArgs& t) { run_dot<L, 6>(t); }
void pack(const float* src, i64 k_step, i64 j_step, i64 k_count, int n, int panel, float* dst) {
  fastdl::pack<L>(src, k_step, j_step, k_count, n, panel, dst);
}
void sum_rows(const float* x, i64 rows, i64 cols, i64 row, i64 col, float* out, bool accumulate) {
  fastdl::sum_rows<L>(x, rows, cols, row, col, out, accumulate);
}

}  // namespace fastdl::avx512
