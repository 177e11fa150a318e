// GEMM with cp.async and mma.sync: a block computes a tile of C over a run of K, its warps a part of the tile each.
//
//   load      the next step of A and B into one of kStages slots of shared memory, in either storage order
//   multiply  the oldest slot, fragment by fragment
//   finish    the sums through shared memory, so that C, and all that is added to it, is touched in whole lines
//
// Sums of a block are in an order that follows from K and the row of the table alone.
#pragma once
#include "gemm/cuda/kernel_epilogue.cuh"
#include "gemm/cuda/kernel_tile.cuh"
#include "ptx/barrier.cuh"
#include "ptx/launch.h"

namespace fastdl {
namespace {

// A row of the table. parts: bfloat16 parts of float operands; 0: multiply-adds of float32 instead of tensor cores.
template <class Element, int kParts, int kTileM, int kTileN, int kWarpM, int kWarpN, int kTileDepth, int kSlots,
          int kBlocks>
struct TileShape {
  using T = Element;
  static constexpr int parts = kParts, m = kTileM, n = kTileN, warp_m = kWarpM, warp_n = kWarpN, depth = kTileDepth,
                       slots = kSlots, blocks = kBlocks;
  static constexpr int warps_n = n / warp_n, threads = m / warp_m * warps_n * kWarp;
  static constexpr int slot = (m + n) * depth;  // elements
  static constexpr bool promotes = parts == 0;  // serial sums start afresh every kPromoteDepth
  static constexpr bool repairs = sizeof(T) == 4 && parts > 0;
  static constexpr int load_bytes = slots * slot * static_cast<int>(sizeof(T));
  static constexpr int finish_bytes = (m * n + (repairs ? m + n : 0)) * 4;
  static constexpr int shared_bytes = load_bytes > finish_bytes ? load_bytes : finish_bytes;
};

// --- load ----------------------------------------------------------------------------------------------------------
// Element (row, col) of the tile = src[(row0 + row) * row_step + (col0 + col) * col_step]; zeros past rows and cols.
template <int threads, class Tile>
FASTDL_DEVICE void load_tile(const Tile& tile, const typename Tile::Element* src, i64 row_step, i64 col_step, i64 row0,
                             i64 rows, i64 col0, i64 cols, bool vector) {
  using T = typename Tile::Element;
  constexpr int per_row = Tile::cols / Tile::chunk, chunks = Tile::rows * per_row;
  if (vector) {  // a thread: a chunk of every `pass`-th row
    constexpr int pass = threads / per_row;
    static_assert(threads % per_row == 0 && Tile::rows % pass == 0, "whole passes");
    const int row = thread_x() / per_row, col = thread_x() % per_row * Tile::chunk;
    const i64 left = cols - col0 - col, down = rows - row0;
    const int valid = left <= 0 ? 0 : left < Tile::chunk ? static_cast<int>(left * sizeof(T)) : 16;
    const int end = down < Tile::rows ? static_cast<int>(down) : Tile::rows;
    const T* p = src + (row0 + row) * row_step + col0 + col;
    const i64 step = pass * row_step;
#pragma unroll
    for (int r = 0; r < Tile::rows; r += pass, p += step)
      copy_async<16>(tile.at(row + r, col), p, row + r < end ? valid : 0);
    return;
  }
#pragma unroll 1
  for (int c = thread_x(); c < chunks; c += threads) {
    const int row = c / per_row, col = c % per_row * Tile::chunk;
    const i64 left = row0 + row < rows ? cols - col0 - col : 0;
    const T* p = src + (row0 + row) * row_step + (col0 + col) * col_step;
    T* to = tile.at(row, col);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < Tile::chunk; ++e) copy_async<4>(to + e, e < left ? p + e * col_step : src, e < left ? 4 : 0);
    } else {
      Pack<T, Tile::chunk> x;
#pragma unroll
      for (int e = 0; e < Tile::chunk; ++e) x.x[e] = e < left ? p[e * col_step] : T{0};
      *reinterpret_cast<Pack<T, Tile::chunk>*>(to) = x;
    }
  }
}

template <int lines_of_tile, int depth, int threads, class T>
FASTDL_DEVICE void load_operand(T* to, const CudaOperand& o, const T* src, i64 line, i64 lines, i64 k, i64 k_end) {
  if (o.transposed) {
    load_tile<threads>(SharedTile<T, depth, lines_of_tile>{to}, src, o.k_step, o.line_step, k, k_end, line, lines,
                       o.vector);
  } else {
    load_tile<threads>(SharedTile<T, lines_of_tile, depth>{to}, src, o.line_step, o.k_step, line, lines, k, k_end,
                       o.vector);
  }
}

// --- multiply ------------------------------------------------------------------------------------------------------
// Fragments of a 16-bit operand in either storage order. The row that this lane reads of fragment i of its warp, step k
// of 16, is at ((first ^ i * i_xor) + i * i_add ^ k * k_xor) + k * k_add: steps along a stored row move chunks, which
// the swizzle turns into an exclusive or; steps across rows are of 16, which it does not see.
template <class T, int lines_of_tile, int depth, bool a>
struct FragmentReader {
  int first, i_xor, i_add, k_xor, k_add;
  bool transposed;

  FASTDL_DEVICE FragmentReader(bool transposed_, int line) : transposed(transposed_) {
    using Rows = SharedTile<T, lines_of_tile, depth>;
    using Columns = SharedTile<T, depth, lines_of_tile>;
    const int low = lane() / 8 % 2 * 8, high = lane() / 16 * 8, i = lane() % 8;
    const int along = line + (a ? low : high), deep = a ? high : low;
    first = 2 * (transposed ? Columns::offset(deep + i, along) : Rows::offset(along + i, deep));
    i_xor = transposed ? 32 : 0, i_add = transposed ? 0 : 32 * depth;
    k_xor = transposed ? 0 : 32, k_add = transposed ? 32 * lines_of_tile : 0;
  }
  FASTDL_DEVICE void load(Fragment<1>* f, const T* tile, int i, int k) const {
    const int at = (((first ^ i * i_xor) + i * i_add) ^ k * k_xor) + k * k_add;
    load_matrices(f->x[0], reinterpret_cast<const char*>(tile) + at, transposed);
  }
};

// One slot: kDepth of K. A float operand is read through the tile that it was stored as.
template <class S, class Sums>
FASTDL_DEVICE void multiply_slot(Sums* sums, const typename S::T* a, const typename S::T* b, const CudaGemmArgs& p,
                                 int m, int n, Peak* a_peaks, Peak* b_peaks) {
  using T = typename S::T;
  if constexpr (sizeof(T) == 2) {
    const FragmentReader<T, S::m, S::depth, true> ra(p.a.transposed, m);
    const FragmentReader<T, S::n, S::depth, false> rb(p.b.transposed, n);
#pragma unroll
    for (int k = 0; k < S::depth / 16; ++k) {
      Fragment<1> x[S::warp_m / 16], y[S::warp_n / 16];
#pragma unroll
      for (int j = 0; j < S::warp_n / 16; ++j) rb.load(&y[j], b, j, k);
#pragma unroll
      for (int i = 0; i < S::warp_m / 16; ++i) ra.load(&x[i], a, i, k);
#pragma unroll
      for (int i = 0; i < S::warp_m / 16; ++i) multiply<T>(sums->d[i], x[i], y);
    }
    (void)a_peaks, (void)b_peaks;
  } else {
    const SharedTile<T, S::m, S::depth> a_rows = {const_cast<T*>(a)};
    const SharedTile<T, S::depth, S::m> a_columns = {const_cast<T*>(a)};
    const SharedTile<T, S::n, S::depth> b_rows = {const_cast<T*>(b)};
    const SharedTile<T, S::depth, S::n> b_columns = {const_cast<T*>(b)};
    if constexpr (S::parts > 0) {
#pragma unroll 1
      for (int k = 0; k < S::depth; k += 16) {
        Fragment<S::parts> y[S::warp_n / 16];
        if (p.b.transposed) {
#pragma unroll
          for (int j = 0; j < S::warp_n / 16; ++j) load_b_transposed(&y[j], b_columns, k, n + 16 * j, b_peaks + j);
        } else {
#pragma unroll
          for (int j = 0; j < S::warp_n / 16; ++j) load_b(&y[j], b_rows, k, n + 16 * j, b_peaks + j);
        }
#pragma unroll
        for (int i = 0; i < S::warp_m / 16; ++i) {
          Fragment<S::parts> x;
          if (p.a.transposed)
            load_a_transposed(&x, a_columns, m + 16 * i, k, a_peaks + i);
          else
            load_a(&x, a_rows, m + 16 * i, k, a_peaks + i);
          multiply<T>(sums->d[i], x, y);
        }
      }
    } else {
      (void)a_peaks, (void)b_peaks;
#pragma unroll 2
      for (int k = 0; k < S::depth; ++k) {
        float y[S::warp_n / 8][2];
#pragma unroll
        for (int j = 0; j < S::warp_n / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int col = n + 8 * j + sum_col(e);
            y[j][e] = p.b.transposed ? *b_columns.at(k, col) : *b_rows.at(col, k);
          }
#pragma unroll
        for (int i = 0; i < S::warp_m / 8; ++i) {
          const int row = m + 8 * i + lane() / 4;
          const float x = p.a.transposed ? *a_columns.at(k, row) : *a_rows.at(row, k);
#pragma unroll
          for (int j = 0; j < S::warp_n / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& d = sums->d[i / 2][j][i % 2 * 2 + e];
              d = fma_rn(x, y[j][e], d);
            }
        }
      }
    }
  }
}

// --- the kernel ----------------------------------------------------------------------------------------------------
template <class S>
FASTDL_GLOBAL(S::threads, S::blocks)
gemm_kernel(FASTDL_PARAM CudaGemmArgs p) {
  using T = typename S::T;
  const i64 tiles = p.tiles_m * p.tiles_n, id = block_x();
  const TilePlace place = tile_place(id % tiles, p.tiles_m, p.tiles_n);
  const i64 split = id / tiles % p.splits, batch = id / tiles / p.splits;
  const BatchPlace at = batch_place(p.batch, batch);
  const T* a = static_cast<const T*>(p.a.data) + at.a;
  const T* b = static_cast<const T*>(p.b.data) + at.b;
  const i64 m0 = place.m * S::m, n0 = place.n * S::n;
  const i64 k_begin = split * p.split_depth, k_end = p.K < k_begin + p.split_depth ? p.K : k_begin + p.split_depth;
  const int steps = static_cast<int>((k_end - k_begin + S::depth - 1) / S::depth);
  const int wm = warp() / S::warps_n * S::warp_m, wn = warp() % S::warps_n * S::warp_n;
  T* const slots = shared_memory<T>();

  WarpTile<T, S::parts == 0 ? 1 : S::parts, S::warp_m, S::warp_n> sums, part;
  Peak a_peaks[S::warp_m / 16], b_peaks[S::warp_n / 16];
  sums.clear();
  if constexpr (S::promotes) part.clear();
  // Step s + slots - 1 is loaded while step s is multiplied. The barrier says both that all of step s has come, and
  // that the slot of step s - 1, which is the one to load, is no longer read.
#pragma unroll 1
  for (int s = 1 - S::slots; s < steps; ++s) {
    if (s >= 0) {
      copy_wait<S::slots - 2>();
      block_sync(S::threads);
    }
    const int next = s + S::slots - 1;
    if (next < steps) {
      T* slot = slots + next % S::slots * S::slot;
      const i64 k = k_begin + static_cast<i64>(next) * S::depth;
      load_operand<S::m, S::depth, S::threads>(slot, p.a, a, m0, p.M, k, k_end);
      load_operand<S::n, S::depth, S::threads>(slot + S::m * S::depth, p.b, b, n0, p.N, k, k_end);
    }
    copy_commit();
    if (s < 0) continue;
    const T* slot = slots + s % S::slots * S::slot;
    if constexpr (S::promotes) {
      multiply_slot<S>(&part, slot, slot + S::m * S::depth, p, wm, wn, a_peaks, b_peaks);
      if ((s + 1) % (kPromoteDepth / S::depth) == 0 || s + 1 == steps) sums.promote(&part);
    } else {
      multiply_slot<S>(&sums, slot, slot + S::m * S::depth, p, wm, wn, a_peaks, b_peaks);
    }
  }
  copy_wait<0>();
  block_sync(S::threads);

  const SharedTile<float, S::m, S::n> c = {shared_memory<float>()};
#pragma unroll
  for (int i = 0; i < S::warp_m / 16; ++i)
#pragma unroll
    for (int j = 0; j < S::warp_n / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; r += 2)
        *reinterpret_cast<Pack<float, 2>*>(c.at(wm + 16 * i + sum_row(r), wn + 8 * j + sum_col(r))) = {
            {sums.d[i][j][r], sums.d[i][j][r + 1]}};
  float* const row_peaks = c.data + S::m * S::n;
  float* const col_peaks = row_peaks + S::m;
  if constexpr (S::repairs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < S::warp_m / 16; ++i) {
        const float peak = warp_max<4>(a_peaks[i].x[half]);
        if (wn == 0 && lane() % 4 == 0) row_peaks[wm + 16 * i + 8 * half + lane() / 4] = peak;
      }
#pragma unroll
      for (int j = 0; j < S::warp_n / 16; ++j) {
        const float peak = warp_max<4>(b_peaks[j].x[half]);
        if (wm == 0 && lane() % 4 == 0) col_peaks[wn + 16 * j + 8 * half + lane() / 4] = peak;
      }
    }
  }
  block_sync(S::threads);

  const i64 run = split * p.batches + batch;
  if constexpr (S::repairs) {
    if (p.partial) {
      float* peaks = p.peaks + run * (p.M + p.N);
      for (int i = thread_x(); i < S::m; i += S::threads)
        if (place.n == 0 && m0 + i < p.M) peaks[m0 + i] = row_peaks[i];
      for (int j = thread_x(); j < S::n; j += S::threads)
        if (place.m == 0 && n0 + j < p.N) peaks[p.M + n0 + j] = col_peaks[j];
    }
  }
#pragma unroll 1
  for (int q = thread_x(); q < S::m * S::n / kFinish; q += S::threads) {
    const int row = q / (S::n / kFinish), col = q % (S::n / kFinish) * kFinish;
    const i64 i = m0 + row, j = n0 + col;
    if (i >= p.M || j >= p.N) continue;
    Pack<float, kFinish> x = *reinterpret_cast<const Pack<float, kFinish>*>(c.at(row, col));
    if (p.partial) {  // its rows are padded: whole stores
      *reinterpret_cast<Pack<float, kFinish>*>(p.partial + (run * p.M + i) * p.partial_row + j) = x;
      continue;
    }
    const int count = p.N - j < kFinish ? static_cast<int>(p.N - j) : kFinish;
    if constexpr (S::repairs) {
#pragma unroll 1
      for (int e = 0; e < kFinish; ++e) {
        float sum = x.x[0];
        if (e < count && is_suspect(sum, row_peaks[row], col_peaks[col + e]))
          sum = exact_sum(a + i * p.a.line_step, p.a.k_step, b + (j + e) * p.b.line_step, p.b.k_step, p.K);
        x.x[0] = x.x[1], x.x[1] = x.x[2], x.x[2] = x.x[3], x.x[3] = sum;
      }
    }
    finish<T>(p, x.x, at.c + i * p.c_row + j, j, count);
  }
}

template <class S>
void launch_gemm(const CudaGemmArgs& args, i64 blocks, const Stream& stream) {
  LaunchShape shape;
  shape.grid[0] = static_cast<int>(blocks);
  shape.threads = S::threads;
  shape.shared_bytes = S::shared_bytes;
  launch(gemm_kernel<S>, shape, stream, args);
}

}  // namespace
}  // namespace fastdl
