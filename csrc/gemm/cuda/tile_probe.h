// out[16,32] = A[16,32] * B[32,32] by one warp: the tile product alone, for tests.
#pragma once
#include "ptx/device.h"

namespace fastdl {

struct TileProbe {
  const void* a;  // [16,32], or [32,16] if a_transposed
  const void* b;  // [32,32], stored [N][K], or [K][N] if b_transposed
  float* out;     // [16,32], and behind it the peaks of float operands: [16] of A's rows, [32] of B's columns
  bool a_transposed, b_transposed;
};
void tile_probe_run(const TileProbe& args, DType dtype, Precision precision, const Stream& stream);

}  // namespace fastdl
