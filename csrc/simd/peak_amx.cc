// AMX peak: four accumulator tiles, two operands each way, as in a 2x2 tile product.
#include <immintrin.h>

#include "simd/vec.h"

namespace fastdl::amx {
namespace {

struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {};
  unsigned char rows[16] = {};
};

}  // namespace

double peak_products(i64 turns, float* sink) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" : : "m"(config));  // gcc drops the stores before ldtilecfg otherwise
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (i64 t = 0; t < turns; ++t) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float out[256];
  _tile_stored(0, out, 64);
  _tile_release();
  *sink = out[0];
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(turns);
}

}  // namespace fastdl::amx
