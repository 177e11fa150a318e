#include "simd/peak_loops.h"
#include "simd/vec_avx2.h"

namespace fastdl::avx2 {

double peak_fma(i64 turns, float* sink) { return fma_loop<VecAvx2, 12>(turns, sink); }
void peak_read(const float* data, i64 count, float* sink) { read_loop<VecAvx2>(data, count, sink); }

}  // namespace fastdl::avx2
