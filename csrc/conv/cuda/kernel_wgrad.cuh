// The gradient of the weight on tensor cores: dw(k, j) = sum_m dy(m, k) x(m, j), j = (tap, channel), x gathered from
// the image (index.h), m the pixels of dy. Pixels are cut into chunks; their sums go to the workspace and are added in
// order.
//
// A block: kM channels of dy x kN of j, 32 pixels a step: shared tiles [32][kM] and [32][kN], read transposed. Where
// pixels lie is worked out once for a block, a step ahead of the loads. Of groups that are one, what one's channels
// make with another's is computed and dropped.
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
  int columns;  // channels of dy of groups that are one
  GatherGroups groups;
  int own_depth;                 // of each of them
  int tiles_n, chunk;            // in steps
  bool wide_x, wide_dy;          // channels come in whole, aligned chunks of 16 bytes
  bool by_pixel_x, by_pixel_dy;  // else neighbours in memory are pixels rather than channels
  float* partial;                // [chunks][channels of dy][depth of a group]
  i64 partial_chunk;
};

template <class T, int parts, int kM, int kN, int kWarpM, int kWarpN, int kStages>
struct ConvWgradTile {
  static constexpr int warps_n = kN / kWarpN, threads = kM / kWarpM * warps_n * kWarp;
  using A = SharedTile<T, kConvDepth, kM>;
  using B = SharedTile<T, kConvDepth, kN>;
  static constexpr bool repairs = sizeof(T) == 4;  // split sums that cannot be relied on are computed again
  static constexpr int stage = A::bytes + B::bytes, table = kStages * stage;
  static constexpr int shared_bytes =
      table + (kN + kStages * kConvDepth) * static_cast<int>(sizeof(GatherPlace)) + kStages * kConvDepth * 8;
  // Beside 64 sums of a thread registers are short: half a step's elements of x are in flight at a time, and those of
  // dy are waited for.
  static constexpr bool is_short = kM == 128 && sizeof(T) == 2;
  static constexpr int rounds = is_short ? 2 : 1;
  using ElementsA = ElementLoader<A, threads, rounds>;
  using ElementsB = ElementLoader<B, threads, rounds>;

  const ConvWgradCuda<T>& args;
  const T* in;
  const T* dy;
  int columns;      // of this tile on
  GatherCol* cols;  // [kN]
  GatherRow* rows;  // [kStages][kConvDepth], pixels of x of the steps that are loaded
  i64* dy_rows;     // [kStages][kConvDepth], where they lie in dy; -1: nowhere
  unsigned char* memory;

  FASTDL_DEVICE A a(int s) const { return {reinterpret_cast<T*>(memory + s * stage)}; }
  FASTDL_DEVICE B b(int s) const { return {reinterpret_cast<T*>(memory + s * stage + A::bytes)}; }
  FASTDL_DEVICE i64 dy_offset(int m) const { return written_offset(args.phase, args.dy_step, args.dy_n_step, m); }
  FASTDL_DEVICE void find(int i, int m) const {
    rows[i] = gather_row(args.phase, args.x, m);
    dy_rows[i] = m < args.phase.pixels ? dy_offset(m) : -1;
  }

  // Element e of stage s, of this thread.
  FASTDL_DEVICE auto dy_element(int s) const {
    const ElementWalk walk = ElementsA::walk(args.by_pixel_dy);
    const i64* const r = dy_rows + s * kConvDepth + walk.r;
    return [=, from = dy, step = args.dy_c_step, most = columns](int e) {
      const i64 row = r[e * walk.dr];
      const int k = walk.c + e * walk.dc;
      return row >= 0 && k < most ? from + row + k * step : nullptr;
    };
  }
  FASTDL_DEVICE auto x_element(int s) const {
    const ElementWalk walk = ElementsB::walk(args.by_pixel_x);
    const GatherPlace* const r = rows + s * kConvDepth + walk.r;
    const GatherPlace* const c = cols + walk.c;
    const GatherPlace own = walk.dr == 0 ? *r : *c, *const others = walk.dr == 0 ? c : r;
    const int step = walk.dr == 0 ? walk.dc : walk.dr;
    return [=, from = in, &x = args.x](int e) {
      const GatherPlace other = others[e * step];
      return inside(x, own, other) ? from + own.offset + other.offset : nullptr;
    };
  }

  // A step into stage s, all that comes asynchronously.
  FASTDL_DEVICE void load(int s) const {
    const A to_a = a(s);
    const B to_b = b(s);
    if (args.wide_dy) {
      constexpr int chunks = kM / A::chunk;
#pragma unroll
      for (int i = thread_x(); i < kConvDepth * chunks; i += threads) {
        const int r = i / chunks, k = i % chunks * A::chunk;
        const i64 row = dy_rows[s * kConvDepth + r];
        const bool there = row >= 0 && k < columns;
        copy_async<16>(to_a.at(r, k), there ? dy + row + k : dy, there ? 16 : 0);
      }
    } else if constexpr (!ElementsA::held) {
      ElementsA::copy(to_a, args.by_pixel_dy, dy, dy_element(s));
    }
    if (args.wide_x) {
      constexpr int chunks = kN / B::chunk;
#pragma unroll
      for (int i = thread_x(); i < kConvDepth * chunks; i += threads) {
        const int r = i / chunks, j = i % chunks * B::chunk;
        const GatherRow row = rows[s * kConvDepth + r];
        const GatherCol col = cols[j];
        const bool there = inside(args.x, row, col);
        copy_async<16>(to_b.at(r, j), there ? in + row.offset + col.offset : in, there ? 16 : 0);
      }
    } else if constexpr (!ElementsB::held) {
      ElementsB::copy(to_b, args.by_pixel_x, in, x_element(s));
    }
  }
  // What does not come asynchronously, a round of it: read, and stored.
  FASTDL_DEVICE void fetch(int round, int s, ElementsA* dys, ElementsB* xs) const {
    if constexpr (ElementsA::held) {
      if (!args.wide_dy) {
        dys->fetch(round, dy_element(s));
        if (is_short) dys->put(round, a(s), args.by_pixel_dy);
      }
      if (!args.wide_x) xs->fetch(round, x_element(s));
    }
  }
  FASTDL_DEVICE void put(int round, int s, const ElementsA& dys, const ElementsB& xs) const {
    if constexpr (ElementsA::held) {
      if (!args.wide_dy && !is_short) dys.put(round, a(s), args.by_pixel_dy);
      if (!args.wide_x) xs.put(round, b(s), args.by_pixel_x);
    }
  }

  FASTDL_DEVICE void run(int tile_m, int tile_n, int group, int chunk) {
    const int steps = (args.phase.pixels + kConvDepth - 1) / kConvDepth;
    const int begin = chunk * args.chunk, end = begin + args.chunk < steps ? begin + args.chunk : steps;
    for (int j = thread_x(); j < kN; j += threads) cols[j] = gather_col(args.phase, args.x, tile_n * kN + j);
    for (int m = thread_x(); m < kStages * kConvDepth; m += threads) find(m, begin * kConvDepth + m);
    block_sync(threads);  // both tables
    ElementsA dys;
    ElementsB xs;
    WarpTile<T, parts, kWarpM, kWarpN> sum;
    sum.clear();
    Peak row_peak[kWarpM / 16], col_peak[kWarpN / 16];
    const int m0 = warp() / warps_n * kWarpM, n0 = warp() % warps_n * kWarpN;
    for (int s = 0; s < kStages - 1; ++s) {
      if (begin + s < end) {
        load(s);
        for (int round = 0; round < rounds; ++round) fetch(round, s, &dys, &xs), put(round, s, dys, xs);
      }
      copy_commit();
    }
    for (int step = begin; step < end; ++step) {
      copy_wait<kStages - 2>();
      block_sync(threads);  // the step has come for all threads, and nobody reads the one before any more
      const int ahead = step + kStages - 1, to = (ahead - begin) % kStages, s = (step - begin) % kStages;
      if (ahead < end) load(to);
      copy_commit();
      if (thread_x() < kConvDepth)  // for step + kStages, of which nobody knows before the next barrier
        find(s * kConvDepth + thread_x(), (step + kStages) * kConvDepth + thread_x());
#pragma unroll(repairs ? 1 : kConvDepth / 16)
      for (int k = 0; k < kConvDepth; k += 16) {
        constexpr int each = kConvDepth / rounds;
        if (ahead < end && k % each == 0) fetch(k / each, to, &dys, &xs);
        sum.template add<true, true>(a(s), b(s), m0, n0, k, repairs ? row_peak : nullptr, repairs ? col_peak : nullptr);
        if (ahead < end && (k + 16) % each == 0) put(k / each, to, dys, xs);
      }
    }

    const int own_depth = args.own_depth;
    float* const out =
        args.partial + chunk * args.partial_chunk + (static_cast<i64>(group) * args.columns + tile_m * kM) * own_depth;
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
      int own[2], own_group[2];  // of the columns of this lane: where they are written
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int c = tile_n * kN + n0 + 8 * j + sum_col(e);
        const bool there = c < args.phase.depth;
        const int tap = divide(&c, args.x.by_channels);
        own_group[e] = there ? divide(&c, args.groups.by_channels) : -1;
        own[e] = tap * args.groups.by_channels.divisor + c;
      }
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
          const int k = m0 + 16 * i + sum_row(r);
          if (k >= columns || args.groups.by_columns.quotient(tile_m * kM + k) != own_group[r % 2]) continue;
          float x = sum.d[i][j][r];
          if constexpr (repairs)
            if (is_suspect(x, row_peaks[r / 2], col_peaks[r % 2]))
              x = exact(k, cols[n0 + 8 * j + sum_col(r)], begin * kConvDepth, end * kConvDepth);
          out[static_cast<i64>(k) * own_depth + own[r % 2]] = x;
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
  GatherCol* const cols = reinterpret_cast<GatherCol*>(memory + Tile::table);
  Tile tile = {args,
               args.in + group * args.in_group,
               args.dy + (static_cast<i64>(group) * args.columns + tile_m * kM) * args.dy_c_step,
               args.columns - tile_m * kM,
               cols,
               cols + kN,
               reinterpret_cast<i64*>(cols + kN + kStages * kConvDepth),
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
