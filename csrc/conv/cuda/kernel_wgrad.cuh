// The gradient of the weight on tensor cores: dw(k, j) = sum_m dy(m, k) x(m, j), j = (tap, channel), x gathered from
// the image (index.h), m the pixels of dy. Pixels are cut into chunks; their sums go to the workspace and are added in
// order.
//
// A block: kM channels of dy x kN of j, 32 pixels a step: shared tiles [32][kM] and [32][kN], read transposed.
#pragma once
#include "conv/cuda/kernel_gather.cuh"

namespace fastdl {

template <class T>
struct ConvWgradCuda {
  GatherPhase phase;
  GatherSource x;
  const T* in;
  i64 in_group;
  const T* dy;
  i64 dy_n_step, dy_c_step, dy_step[3];
  int columns;                   // channels of dy of a group
  int tiles_n, chunk;            // in steps
  bool wide_x, wide_dy;          // channels come in whole, aligned chunks of 16 bytes
  bool by_pixel_x, by_pixel_dy;  // else neighbours in memory are pixels rather than channels
  float* partial;                // [chunks][groups][columns][depth]
  i64 partial_chunk;
};

template <class T, int parts, int kM, int kN, int kWarpM, int kWarpN, int kStages>
struct ConvWgradTile {
  static constexpr int warps_n = kN / kWarpN, threads = kM / kWarpM * warps_n * kWarp;
  using A = SharedTile<T, kConvDepth, kM>;
  using B = SharedTile<T, kConvDepth, kN>;
  static constexpr bool repairs = sizeof(T) == 4;  // split sums that cannot be relied on are computed again
  static constexpr int stage = A::bytes + B::bytes, table = kStages * stage;
  static constexpr int shared_bytes = table + kN * static_cast<int>(sizeof(GatherCol));

  const ConvWgradCuda<T>& args;
  const T* in;
  const T* dy;
  int columns;  // of this tile on
  GatherCol* cols;
  unsigned char* memory;

  FASTDL_DEVICE A a(int s) const { return {reinterpret_cast<T*>(memory + s * stage)}; }
  FASTDL_DEVICE B b(int s) const { return {reinterpret_cast<T*>(memory + s * stage + A::bytes)}; }
  FASTDL_DEVICE i64 dy_offset(int m) const { return written_offset(args.phase, args.dy_step, args.dy_n_step, m); }

  FASTDL_DEVICE void load_dy(int m0, const A& to) const {
    const int pixels = args.phase.pixels;
    if (args.wide_dy) {
      constexpr int chunks = kM / A::chunk;
#pragma unroll
      for (int i = thread_x(); i < kConvDepth * chunks; i += threads) {
        const int r = i / chunks, k = i % chunks * A::chunk;
        const bool there = m0 + r < pixels && k < columns;
        copy_async<16>(to.at(r, k), there ? dy + dy_offset(m0 + r) + k : dy, there ? 16 : 0);
      }
    } else {
      for (int i = thread_x(); i < kConvDepth * kM; i += threads) {
        const int r = args.by_pixel_dy ? i % kConvDepth : i / kM, k = args.by_pixel_dy ? i / kConvDepth : i % kM;
        const bool there = m0 + r < pixels && k < columns;
        *to.at(r, k) = there ? dy[dy_offset(m0 + r) + k * args.dy_c_step] : conv_zero<T>();
      }
    }
  }
  FASTDL_DEVICE void load_x(int m0, const B& to) const {
    if (args.wide_x) {
      constexpr int chunks = kN / B::chunk;
#pragma unroll
      for (int i = thread_x(); i < kConvDepth * chunks; i += threads) {
        const int r = i / chunks, j = i % chunks * B::chunk;
        const GatherRow row = gather_row(args.phase, args.x, m0 + r);
        const GatherCol col = cols[j];
        const bool there = inside(args.x, row, col);
        copy_async<16>(to.at(r, j), there ? in + row.offset + col.offset : in, there ? 16 : 0);
      }
    } else {
      for (int i = thread_x(); i < kConvDepth * kN; i += threads) {
        const int r = args.by_pixel_x ? i % kConvDepth : i / kN, j = args.by_pixel_x ? i / kConvDepth : i % kN;
        const GatherRow row = gather_row(args.phase, args.x, m0 + r);
        const GatherCol col = cols[j];
        *to.at(r, j) = inside(args.x, row, col) ? in[row.offset + col.offset] : conv_zero<T>();
      }
    }
  }

  FASTDL_DEVICE void run(int tile_m, int tile_n, int group, int chunk) {
    for (int j = thread_x(); j < kN; j += threads) cols[j] = gather_col(args.phase, args.x, tile_n * kN + j);
    block_sync(threads);
    const int steps = (args.phase.pixels + kConvDepth - 1) / kConvDepth;
    const int begin = chunk * args.chunk, end = begin + args.chunk < steps ? begin + args.chunk : steps;
    WarpTile<T, parts, kWarpM, kWarpN> sum;
    sum.clear();
    Peak row_peak[kWarpM / 16], col_peak[kWarpN / 16];
    const int m0 = warp() / warps_n * kWarpM, n0 = warp() % warps_n * kWarpN;
    for (int s = 0; s < kStages - 1; ++s) {
      if (begin + s < end) load_dy((begin + s) * kConvDepth, a(s)), load_x((begin + s) * kConvDepth, b(s));
      copy_commit();
    }
    for (int step = begin; step < end; ++step) {
      copy_wait<kStages - 2>();
      block_sync(threads);  // the step has come for all threads, and nobody reads the one before any more
      const int ahead = step + kStages - 1, to = (ahead - begin) % kStages;
      if (ahead < end) load_dy(ahead * kConvDepth, a(to)), load_x(ahead * kConvDepth, b(to));
      copy_commit();
      const int s = (step - begin) % kStages;
#pragma unroll(repairs ? 1 : kConvDepth / 16)
      for (int k = 0; k < kConvDepth; k += 16)
        sum.template add<true, true>(a(s), b(s), m0, n0, k, repairs ? row_peak : nullptr, repairs ? col_peak : nullptr);
    }
    copy_wait<0>();

    const int depth = args.phase.depth;
    float* const out = args.partial + chunk * args.partial_chunk +
                       (static_cast<i64>(group) * args.columns + tile_m * kM) * depth + tile_n * kN;
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
      float col_peaks[2] = {};
      if constexpr (repairs) {
        const float peak = warp_max<4>(col_peak[j / 2].x[j % 2]);  // of column lane / 4
#pragma unroll
        for (int e = 0; e < 2; ++e) col_peaks[e] = shuffle(peak, sum_col(e) * 4);
      }
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) {
        float row_peaks[2] = {};
        if constexpr (repairs)
#pragma unroll
          for (int half = 0; half < 2; ++half) row_peaks[half] = warp_max<4>(row_peak[i].x[half]);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int k = m0 + 16 * i + sum_row(r), col = n0 + 8 * j + sum_col(r);
          if (k >= columns || tile_n * kN + col >= depth) continue;
          float x = sum.d[i][j][r];
          if constexpr (repairs)
            if (is_suspect(x, row_peaks[r / 2], col_peaks[r % 2]))
              x = exact(k, cols[col], begin * kConvDepth, end * kConvDepth);
          out[static_cast<i64>(k) * depth + col] = x;
        }
      }
    }
  }

  // The products of pixels [begin, end) again, by FMA.
  FASTDL_DEVICE float exact(int k, const GatherCol& col, int begin, int end) const {
    float sum = 0;
    for (int m = begin; m < end && m < args.phase.pixels; ++m) {
      const GatherRow row = gather_row(args.phase, args.x, m);
      sum = fma_rn(to_float(dy[dy_offset(m) + k * args.dy_c_step]),
                   inside(args.x, row, col) ? to_float(in[row.offset + col.offset]) : 0.0f, sum);
    }
    return sum;
  }
};

template <class T, int parts, int kM, int kN, int kWarpM, int kWarpN, int kStages>
FASTDL_GLOBAL(kM / kWarpM * (kN / kWarpN) * kWarp, sizeof(T) == 2 ? 2 : 1)
conv_wgrad_kernel(FASTDL_PARAM ConvWgradCuda<T> args) {
  using Tile = ConvWgradTile<T, parts, kM, kN, kWarpM, kWarpN, kStages>;
  const int group = block_y(), tile_m = block_x() / args.tiles_n, tile_n = block_x() % args.tiles_n;
  unsigned char* const memory = shared_memory<unsigned char>();
  Tile tile = {args,
               args.in + group * args.in_group,
               args.dy + (static_cast<i64>(group) * args.columns + tile_m * kM) * args.dy_c_step,
               args.columns - tile_m * kM,
               reinterpret_cast<GatherCol*>(memory + Tile::table),
               memory};
  tile.run(tile_m, tile_n, group, block_z());
}

// Partial sums [chunks][rows][depth], added in their order, to dw: element (row, (tap, c)) at row * row_step + c *
// channel_step + where the tap lies.
template <class T>
struct ConvReduceArgs {
  GatherPhase phase;
  FastDiv by_channels;
  const float* partial;
  int chunks;
  i64 rows, depth, row_step, channel_step, step[3];
  T* out;
};

template <class T>
FASTDL_GLOBAL(kConvThreads, 1)
conv_reduce_kernel(FASTDL_PARAM ConvReduceArgs<T> args) {
  const i64 total = args.rows * args.depth, stride = static_cast<i64>(grid_x()) * kConvThreads;
  for (i64 i = static_cast<i64>(block_x()) * kConvThreads + thread_x(); i < total; i += stride) {
    float sum = 0;
    for (int c = 0; c < args.chunks; ++c) sum += args.partial[c * total + i];
    const int k = static_cast<int>(i % args.depth), tap = args.by_channels.quotient(k);
    args.out[i / args.depth * args.row_step + (k - tap * args.by_channels.divisor) * args.channel_step +
             weight_offset(args.phase, args.step, tap)] = from_float<T>(sum);
  }
}

}  // namespace fastdl
