// What plans on the CPU reckon with: costs in multiply-adds of the float32 FMA kernel, times in nanoseconds of a core,
// and how sizes are cut into blocks.
#pragma once
#include <algorithm>
#include <numeric>

#include "base/cpu_info.h"
#include "base/sizes.h"
#include "base/table.h"

namespace fastdl {

// A region costs its team a few microseconds of waking and waiting: below this much work, one thread is faster.
constexpr double kSerialNanoseconds = 6000;
inline int team_for(double nanoseconds, const Machine& machine) {
  return nanoseconds < kSerialNanoseconds ? 1 : std::max(1, machine.threads);
}

// Packing an element costs about as much as this many multiply-adds: it is read, shuffled and written once; each part
// that it is split into costs that again.
constexpr double kPackCost = 8;

// Sapphire Rapids, a core: FMA 122e9 multiply-adds a second, tiles 1.9e12, 185 GB/s from L2, 28 from L3.
constexpr double kTileRate = 1900.0 / 122, kL2Byte = 122.0 / 185, kL3Byte = 122.0 / 28;
// Products of bfloat16 parts, on tiles, for each of the operands' elements: see Precision, and two parts of float16.
constexpr int tile_products(DType dtype, int planes) {
  return planes == 1 ? 1 : planes == 3 ? 6 : dtype == DType::f16 ? 4 : 3;
}

// Of a row of any operation: multiply-adds in the time of one of the float32 FMA kernel, and the cost of packing an
// element of its own dtype.
template <class Row>
double rate(const Row& k) {
  return is_tiled(k) ? kTileRate / tile_products(k.dtype, k.planes) : k.k_unit;
}
template <class Row>
double pack_cost(const Row& k) {
  return k.dtype == DType::bf16 ? kPackCost / k.k_unit : kPackCost * k.planes;
}

// Rows this many floats apart fall on one or two sets of an L1 way (4096 bytes) and evict each other.
inline bool rows_collide(i64 stride) { return std::gcd<i64>(stride * 4, 4096) >= 2048; }

// Columns of B, `bytes` each, that strips keep in L2: 3/8 of it. (GEMM 512 x 3072 x 768 and 2048 x 1024 x 1024 frozen,
// GFLOP/s: 1/4 2740 and 2870, 3/8 3020 and 2970, 1/2 3020 and 2960.)
inline i64 strip_columns(i64 l2, i64 bytes, i64 nr) {
  return std::max(nr, l2 * 3 / 8 / std::max<i64>(1, bytes) / nr * nr);
}

// The smallest block of a multiple of `unit` that cuts `size` into as many blocks as `limit` would: no short last one.
constexpr i64 even_block(i64 size, i64 limit, i64 unit) {
  if (size <= limit) return std::max(unit, round_up(size, unit));
  return round_up(ceil_div(size, ceil_div(size, limit)), unit);
}

}  // namespace fastdl
