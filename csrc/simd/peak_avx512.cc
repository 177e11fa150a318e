#include "simd/peak_loops.h"
#include "simd/vec_avx512.h"

namespace fastdl::avx512 {

double peak_fma(i64 turns, float* sink) { return fma_loop<VecAvx512, 24>(turns, sink); }
void peak_read(const float* data, i64 count, float* sink) { read_loop<VecAvx512>(data, count, sink); }

}  // namespace fastdl::avx512
