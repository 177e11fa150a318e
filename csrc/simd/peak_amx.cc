// AMX peak: four accumulator tiles, two operands each way, as in a 2x2 tile product.
#include "simd/tile_amx.h"

namespace fastdl::amx {

double peak_products(i64 turns, float* sink) {
  alignas(64) float out[256] = {};
  tile_configure();
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  tile_load<4>(out, 64);
  tile_load<5>(out, 64);
  tile_load<6>(out, 64);
  tile_load<7>(out, 64);
  for (i64 t = 0; t < turns; ++t) {
    tile_dpbf16ps<0, 4, 6>();
    tile_dpbf16ps<1, 4, 7>();
    tile_dpbf16ps<2, 5, 6>();
    tile_dpbf16ps<3, 5, 7>();
  }
  tile_store<0>(out, 64);
  tile_release();
  *sink = out[0];
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(turns);
}

}  // namespace fastdl::amx
