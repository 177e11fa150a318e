// The recurrent product: sums of one group of rows of W (layout.h) with up to 32 sequences, K cut over the warps.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"
#include "rnn/cuda/kernel_args.h"

namespace fastdl {

// Float32 goes through products of parts times 2^24 on either side, so that all parts of all float32 are ordinary
// bfloat16; what is too large for that becomes Inf or NaN, and such sums are computed again (see repaired). A 16-bit
// type is as it is, and so is float32 by FMA (parts 0).
template <class T, int parts>
constexpr bool kRnnSplits = sizeof(T) == 4 && parts > 0;
template <class T, int parts>
constexpr float kRnnScale = kRnnSplits<T, parts> ? 16777216.0f : 1.0f;

template <class T>
FASTDL_DEVICE float load_float(const void* p, i64 i) {
  return to_float(static_cast<const T*>(p)[i]);
}

// The parts of x, rounded to T already; E: what products multiply.
template <class T, class E, int parts>
FASTDL_DEVICE void split_parts(float x, std::uint16_t (&out)[parts]) {
  float rest = x * kRnnScale<T, parts>;
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    const E part = from_float<E>(rest);
    out[p] = part.bits;
    rest -= to_float(part);
  }
}

// x(b, k) = value
template <class T, class E, int parts>
FASTDL_DEVICE void put(const RnnOperand& x, int parity, i64 b, int k, float value) {
  if constexpr (parts > 0) {
    std::uint16_t part[parts];
    split_parts<T, E>(value, part);
#pragma unroll
    for (int p = 0; p < parts; ++p) x.data[parity][p * x.plane + b * x.row + k] = part[p];
  }
  if constexpr (sizeof(T) == 4) x.wide[parity][b * x.row + k] = value;
}
template <class T>
FASTDL_DEVICE float get(const RnnOperand& x, int parity, i64 b, int k) {
  if constexpr (sizeof(T) == 4) {
    return x.wide[parity][b * x.row + k];
  } else {
    return to_float(T{x.data[parity][b * x.row + k]});
  }
}

// Blocks of K in registers at once, for the latency of memory: 4 * 16 registers of x with one part; with three a block
// is 48, and sums of gru (3 tiles) take 96 more.
constexpr int rnn_ahead(int parts, int tiles) {
  return parts == 1 ? (tiles == 3 ? 2 : 4) : parts == 2 && tiles < 3 ? 2 : 1;
}

// sum[tile][columns] += W x over K blocks [begin, end). w: the group, x: the first of the sequences. Products of a
// batch of blocks are summed by the tensor cores, at most 128 of K, the rest in float32.
template <class E, int parts, int tiles>
FASTDL_DEVICE void multiply(const u32* w, const std::uint16_t* x, i64 plane, int row, int begin, int end,
                            int column_tiles, float (&sum)[tiles][kRnnColumnTiles][4]) {
  constexpr int kAhead = rnn_ahead(parts, tiles);
  const std::uint16_t* const from = x + static_cast<i64>(lane() / 4) * row + lane() % 4 * 8;
  for (int first = begin; first < end; first += kAhead) {
    Pack<u32, 4> b[kAhead][parts][kRnnColumnTiles];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int p = 0; p < parts; ++p)
#pragma unroll
        for (int n = 0; n < kRnnColumnTiles; ++n)
          if (first + a < end && n < column_tiles)
            b[a][p][n] = load_l2(
                static_cast<const void*>(from + p * plane + n * 8 * static_cast<i64>(row) + (first + a) * kRnnBlockK));
    float part[tiles][kRnnColumnTiles][4] = {};
    // All small products first: each instruction truncates, and twice a block is enough at the size of the sum.
#pragma unroll
    for (int low = parts - 1; low >= 0; --low)
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (first + a >= end) break;
        const u32* const block = w + static_cast<i64>(first + a) * rnn_block_words(2 * tiles, parts) + lane() * 4;
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int p = 0; p <= low; ++p)
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
              const auto f = *reinterpret_cast<const Pack<u32, 4>*>(block + ((p * tiles + m) * 2 + j) * 128);
#pragma unroll
              for (int n = 0; n < kRnnColumnTiles; ++n)
                if (n < column_tiles)
                  mma_16x8x16<E>(part[m][n], f.x, {b[a][low - p][n].x[2 * j], b[a][low - p][n].x[2 * j + 1]});
            }
      }
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int n = 0; n < kRnnColumnTiles; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[m][n][r] += part[m][n][r];
  }
}

// The same by FMA, of floats. A lane has the sums that it would have of tensor products: rows lane / 4 and 8 behind, of
// two columns of each tile. Of 4 K it reads 2 * tiles + 8 times 16 bytes for 64 * tiles multiply-adds.
template <int tiles>
FASTDL_DEVICE void multiply_fma(const u32* w, const float* x, int row, int begin, int end, int column_tiles,
                                float (&sum)[tiles][kRnnColumnTiles][4]) {
  const float* const from = x + static_cast<i64>(lane() % 4 * 2) * row;
  const u32* const rows = w + lane() / 4 * 4;
#pragma unroll 2
  for (int k = begin * kRnnBlockK; k < end * kRnnBlockK; k += 4) {
    Pack<u32, 4> b[kRnnColumnTiles][2], a[tiles][2];
#pragma unroll
    for (int n = 0; n < kRnnColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (n < column_tiles)
          b[n][e] = load_l2(static_cast<const void*>(from + (n * 8 + e) * static_cast<i64>(row) + k));
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        a[m][e] = *reinterpret_cast<const Pack<u32, 4>*>(rows + static_cast<i64>(k / 4) * tiles * 64 + m * 64 + e * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int n = 0; n < kRnnColumnTiles; ++n)
          if (n < column_tiles)
#pragma unroll
            for (int r = 0; r < 4; ++r)
              sum[m][n][r] = fma_rn(bits_float(a[m][r / 2].x[i]), bits_float(b[n][r % 2].x[i]), sum[m][n][r]);
  }
}

// A warp's K blocks; warps beyond rnn_busy_warps have none.
constexpr int rnn_warp_blocks(int blocks) { return (blocks + kRnnWarps - 1) / kRnnWarps; }
constexpr int rnn_busy_warps(int blocks) {
  return blocks == 0 ? 0 : (blocks + rnn_warp_blocks(blocks) - 1) / rnn_warp_blocks(blocks);
}

// The sums of a group to shared memory, sums[warp][column][rnn_sum_row]; ends with a barrier.
template <class E, int parts, int slots>
FASTDL_DEVICE void group_product(const u32* w, const RnnOperand& x, int parity, int blocks, int b0, int columns,
                                 float* sums) {
  constexpr int kTiles = slots / 2, kRow = rnn_sum_row(slots);
  const int column_tiles = (columns + 7) / 8, each = rnn_warp_blocks(blocks), begin = warp() * each;
  if (begin < blocks) {
    float sum[kTiles][kRnnColumnTiles][4] = {};
    const int end = begin + each < blocks ? begin + each : blocks;
    const i64 from = static_cast<i64>(b0) * x.row;
    if constexpr (parts > 0) {
      multiply<E, parts>(w, x.data[parity] + from, x.plane, x.row, begin, end, column_tiles, sum);
    } else {
      multiply_fma(w, x.wide[parity] + from, x.row, begin, end, column_tiles, sum);
    }
    float* const to = sums + warp() * column_tiles * 8 * kRow;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kRnnColumnTiles; ++n)
        if (n < column_tiles)
#pragma unroll
          for (int r = 0; r < 4; ++r)
            to[(n * 8 + lane() % 4 * 2 + r % 2) * kRow + m * 16 + lane() / 4 + r / 2 * 8] = sum[m][n][r];
  }
  block_sync(kRnnThreads);
}

// One of the sums, those of all warps in their order.
template <class T, int parts, int slots>
FASTDL_DEVICE float total(const float* sums, int blocks, int columns, int column, int row) {
  const int warp_floats = (columns + 7) / 8 * 8 * rnn_sum_row(slots);
  float s = 0.0f;
  for (int w = 0; w < rnn_busy_warps(blocks); ++w) s += sums[w * warp_floats + column * rnn_sum_row(slots) + row];
  return s * (1.0f / (kRnnScale<T, parts> * kRnnScale<T, parts>));
}

// A float32 sum that parts cannot hold, by FMA.
template <class T, int parts>
FASTDL_DEVICE float repaired(float s, const RnnProduct& p, const RnnOperand& x, int parity, i64 b, int row) {
  if constexpr (kRnnSplits<T, parts>) {
    if (s - s == 0.0f) return s;
    s = 0.0f;
    const T* const w = static_cast<const T*>(p.w) + row * p.w_row;
    for (int k = 0; k < p.K; ++k) s = fma_rn(w[k * p.w_col], load_l2(x.wide[parity] + b * x.row + k), s);
  }
  return s;
}

}  // namespace fastdl
