// GEMM of few rows by many, a product of which reads the many once and is bound by that: multiply-adds, no tensor
// cores. A block: kDotColumns lines of the many (B's columns; A's rows where those are more) by up to kRows of the few,
// both contiguous along K, in chunks of 16 bytes that its threads take in turn.
//
// A block has 128 threads x 4 lines x 16 bytes = 8 KiB on their way from memory, four blocks of a multiprocessor 32:
// what it receives within 0.7 us at 46 GB/s, more than its share on an H200. The few come from the cache, a fourth of
// the many's elements for each row. Registers of a thread: 4 kRows sums, 4 chunks of the many, one of the few.
//
// An element is summed by thread (K in steps of all threads' chunks), over the lanes, over the warps: an order that
// follows from K and the dtype alone, wherever the operands lie.
#pragma once
#include "gemm/cuda/kernel_epilogue.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/launch.h"
#include "ptx/shuffle.cuh"

namespace fastdl {
namespace {

constexpr int kDotWarps = kDotThreads / kWarp;

// A chunk of a line, zeros from element `count` on.
template <class T, int chunk>
FASTDL_DEVICE void load_chunk(float (&x)[chunk], const T* p, bool whole, int count) {
  if (whole) {
    const Pack<u32, 4> bits = load_once(p);
    Pack<T, chunk> v;
    static_assert(sizeof(v) == sizeof(bits), "16 bytes");
    __builtin_memcpy(&v, &bits, sizeof(v));
#pragma unroll
    for (int e = 0; e < chunk; ++e) x[e] = to_float(v.x[e]);
  } else {
    load_floats(x, p, false, count);
  }
}

template <class T, int kRows>
FASTDL_GLOBAL(kDotThreads, kDotBlocks)
dot_kernel(FASTDL_PARAM CudaGemmArgs p) {
  constexpr int chunk = 16 / static_cast<int>(sizeof(T)), step = kDotThreads * chunk,
                sums_of_block = kRows * kDotColumns;
  const i64 tiles = p.tiles_m * p.tiles_n, id = block_x();
  const TilePlace place = tile_place(id % tiles, p.tiles_m, p.tiles_n);
  const i64 split = id / tiles % p.splits, batch = id / tiles / p.splits;
  const BatchPlace at = batch_place(p.batch, batch);
  const CudaOperand &few = p.turned ? p.b : p.a, &many = p.turned ? p.a : p.b;
  const i64 row0 = place.m * kRows, col0 = place.n * kDotColumns;
  const i64 rows_left = (p.turned ? p.N : p.M) - row0, cols_left = (p.turned ? p.M : p.N) - col0;
  const int rows = rows_left < kRows ? static_cast<int>(rows_left) : kRows;
  const int cols = cols_left < kDotColumns ? static_cast<int>(cols_left) : kDotColumns;
  const T* const x = static_cast<const T*>(few.data) + (p.turned ? at.b : at.a) + row0 * few.line_step;
  const T* const w = static_cast<const T*>(many.data) + (p.turned ? at.a : at.b) + col0 * many.line_step;
  const i64 k_begin = split * p.split_depth, k_end = p.K < k_begin + p.split_depth ? p.K : k_begin + p.split_depth;

  float sums[sums_of_block] = {};
#pragma unroll 1
  for (i64 k = k_begin + thread_x() * chunk; k < k_end; k += step) {
    const int count = k_end - k < chunk ? static_cast<int>(k_end - k) : chunk;
    float y[kDotColumns][chunk];
#pragma unroll
    for (int c = 0; c < kDotColumns; ++c)  // past the last line: that one again
      load_chunk(y[c], w + (c < cols ? c : cols - 1) * many.line_step + k, many.vector && count == chunk, count);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      float v[chunk];
      load_floats(v, x + r * few.line_step + k, few.vector && count == chunk, count);
#pragma unroll
      for (int c = 0; c < kDotColumns; ++c)
#pragma unroll
        for (int e = 0; e < chunk; ++e) sums[r * kDotColumns + c] = fma_rn(v[e], y[c][e], sums[r * kDotColumns + c]);
    }
  }
  warp_sums(sums);
  constexpr int lanes_of_sum = kWarp / sums_of_block;
  float* const all = shared_memory<float>();  // [kDotWarps][sums_of_block]
  if (lane() % lanes_of_sum == 0) all[warp() * sums_of_block + lane() / lanes_of_sum] = sums[0];
  block_sync(kDotThreads);
  const int r = thread_x() / kDotColumns, c = thread_x() % kDotColumns;
  if (r >= rows || c >= cols) return;
  float sum[kFinish] = {};
#pragma unroll
  for (int v = 0; v < kDotWarps; ++v) sum[0] += all[v * sums_of_block + thread_x()];
  const i64 i = p.turned ? col0 + c : row0 + r, j = p.turned ? row0 + r : col0 + c;
  if (p.partial)
    p.partial[((split * p.batches + batch) * p.M + i) * p.partial_row + j] = sum[0];
  else
    finish<T>(p, sum, at.c + i * p.c_row + j, j, 1);
}

template <class T, int kRows>
void launch_dot(const CudaGemmArgs& args, i64 blocks, const Stream& stream) {
  LaunchShape shape;
  shape.grid[0] = static_cast<int>(blocks);
  shape.threads = kDotThreads;
  shape.shared_bytes = kDotWarps * kRows * kDotColumns * 4;
  launch(dot_kernel<T, kRows>, shape, stream, args);
}

}  // namespace
}  // namespace fastdl
