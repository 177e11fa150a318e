// What a GEMM kernel of the CUDA side is given, and the index arithmetic that it shares with the plan.
#pragma once
#include "gemm/gemm.h"

namespace fastdl {

// An operand as its lines, rows of A or columns of B: element (line, k) = data[line * line_step + k * k_step].
struct CudaOperand {
  const void* data;
  i64 line_step, k_step;
  bool transposed;  // lies in shared memory as [k][line] rather than [line][k]
  bool vector;      // contiguous along the rows of that, every chunk of 16 bytes aligned
};

struct CudaGemmArgs {
  i64 M, N, K;
  CudaOperand a, b;
  GemmBatch batch;  // strides of a, b, c
  i64 tiles_m, tiles_n;
  i64 splits, split_depth;  // K is cut into `splits` runs of split_depth
  float* partial;           // [splits][batch][M][partial_row], sums of a run each; null: one run, finished in place
  float* peaks;             // [splits][batch][M + N], the largest magnitudes of A's rows and B's columns, or null
  i64 partial_row, batches;
  // C(i,j) = c[i * c_row + j] and what becomes of a sum: see GemmArgs.
  void* c;
  i64 c_row;
  const void* bias;
  i64 bias_step;
  const void* residual;
  void* pre;
  bool turned;  // dot kernels: columns are few rather than rows, B takes A's place
  Activation activation;
  bool accumulate;
  bool c_vector;  // four elements of c, residual and pre lie aligned to their size
};

// Tiles in the order in which blocks take them: columns of up to kTileGroup rows, so that blocks that run together
// share what they read of A and of B.
constexpr i64 kTileGroup = 8;
struct TilePlace {
  i64 m, n;
};
constexpr TilePlace tile_place(i64 id, i64 tiles_m, i64 tiles_n) {
  const i64 group = id / (kTileGroup * tiles_n), left = tiles_m - group * kTileGroup;
  const i64 rows = left < kTileGroup ? left : kTileGroup, within = id - group * kTileGroup * tiles_n;
  return {group * kTileGroup + within % rows, within / rows};
}

// Of dot kernels: threads of a block, blocks that fit a multiprocessor, and a block's lines of the operand that has
// many.
constexpr int kDotThreads = 128, kDotBlocks = 4, kDotColumns = 4;

struct BatchPlace {
  i64 a, b, c;
};
constexpr BatchPlace batch_place(const GemmBatch& batch, i64 index) {
  BatchPlace at = {0, 0, 0};
  for (int i = batch.dims - 1; i >= 0; --i) {
    const i64 here = index % batch.size[i];
    index /= batch.size[i];
    at.a += here * batch.a[i], at.b += here * batch.b[i], at.c += here * batch.c[i];
  }
  return at;
}

}  // namespace fastdl
