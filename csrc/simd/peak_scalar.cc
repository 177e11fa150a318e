#include "simd/peak_loops.h"
#include "simd/vec.h"

namespace fastdl::scalar {

double peak_fma(i64 turns, float* sink) { return fma_loop<VecScalar, 8>(turns, sink); }
void peak_read(const float* data, i64 count, float* sink) { read_loop<VecScalar>(data, count, sink); }

}  // namespace fastdl::scalar
