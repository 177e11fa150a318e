// Forward and dgrad on tensor cores: out(m, j) = sum_k in(m, k) w(k, j), in gathered from the image (index.h), w
// packed.
//
// A block: kM pixels x kN channels, kConvDepth = 32 of the depth a step, kStages steps in flight. Shared memory of a
// stage: pixels [kM][32] and weights [kN][32], 16 KiB at 128x128 of 2-byte elements (4 stages: 64 KiB, with tables 73;
// with 128 registers two blocks on a multiprocessor), 24 KiB at 128x64 of floats (3 stages: 72 KiB). A step of
// 128x128x32 is 256 mma, 8 cycles each on an sm80's four tensor cores: 512 cycles, for 4 copies of 16 bytes a thread.
// Where a step's taps and channels lie is worked out once for a block, by one warp, a step ahead of the loads.
#pragma once
#include "conv/cuda/epilogue.cuh"
#include "conv/cuda/index.h"
#include "conv/cuda/kernel_load.cuh"
#include "ptx/barrier.cuh"

namespace fastdl {

constexpr int kConvDepth = 32;  // of a step
constexpr int kConvPack = 4;    // results that are written together

template <class T>
struct ConvGatherArgs {
  GatherPhase phase[kMostPhases];
  int phases;
  GatherSource x;
  const T* in;
  i64 in_group;  // steps of a group
  const T* w;    // packed
  GatherGroups groups;
  int columns, tiles_n;
  int chunks, chunk;  // of the depth, in steps
  bool wide;          // channels come in whole, aligned chunks of 16 bytes
  bool by_pixel;      // else neighbours in memory are pixels rather than channels
  ConvEpilogue<T> out;
  bool vector_out;  // kConvPack neighbours along the channels are written together
  float* partial;   // [chunks][pixels][groups][columns] where there are several
  i64 partial_row, partial_chunk;
};

// Products of k in [begin, end) and of column j's own group by FMA: what is computed again.
template <class T>
FASTDL_DEVICE float gather_exact(const ConvGatherArgs<T>& a, const GatherPhase& p, const T* in, const T* w,
                                 const GatherRow& row, int j, int begin, int end) {
  float sum = 0;
  for (int k = begin; k < end; ++k) {
    if (!same_group(a.groups, k - a.x.by_channels.quotient(k) * a.x.by_channels.divisor, j)) continue;
    const GatherCol col = gather_col(p, a.x, k);
    sum = fma_rn(inside(a.x, row, col) ? to_float(in[row.offset + col.offset]) : 0.0f, to_float(w[k]), sum);
  }
  return sum;
}

template <class T, int parts, int kM, int kN, int kWarpM, int kWarpN, int kStages>
struct ConvGatherTile {
  static constexpr int warps_n = kN / kWarpN, threads = kM / kWarpM * warps_n * kWarp;
  using A = SharedTile<T, kM, kConvDepth>;
  using B = SharedTile<T, kN, kConvDepth>;
  static constexpr bool repairs = sizeof(T) == 4;  // split sums that cannot be relied on are computed again
  static constexpr int stage = A::bytes + B::bytes, pipeline = kStages * stage;
  static constexpr int sums = (kM * (kN + 4) + kM + kN) * 4;
  static constexpr int table = ((sums > pipeline ? sums : pipeline) + 15) / 16 * 16;
  static constexpr int place = static_cast<int>(sizeof(GatherPlace));
  static constexpr int shared_bytes = table + (kM + kStages * kConvDepth) * place;
  // In flight at a time beside 64 sums of a thread, where registers are short: half a step's elements.
  using Elements = ElementLoader<A, threads, kM == 128 && sizeof(T) == 2 ? 2 : 1>;

  const ConvGatherArgs<T>& args;
  const GatherPhase& phase;
  const T* in;
  const T* w;
  int columns;      // of this tile on
  GatherRow* rows;  // [kM]
  GatherCol* cols;  // [kStages][kConvDepth], of the steps that are loaded
  unsigned char* memory;

  FASTDL_DEVICE A a(int s) const { return {reinterpret_cast<T*>(memory + s * stage)}; }
  FASTDL_DEVICE B b(int s) const { return {reinterpret_cast<T*>(memory + s * stage + A::bytes)}; }

  // Element e of stage s, of this thread.
  FASTDL_DEVICE auto element(int s) const {
    const ElementWalk walk = Elements::walk(args.by_pixel);
    const GatherPlace* const r = rows + walk.r;
    const GatherPlace* const c = cols + s * kConvDepth + walk.c;
    const GatherPlace own = walk.dr == 0 ? *r : *c, *const others = walk.dr == 0 ? c : r;
    const int step = walk.dr == 0 ? walk.dc : walk.dr;
    return [=, this_in = in, &x = args.x](int e) {
      const GatherPlace other = others[e * step];
      return inside(x, own, other) ? this_in + own.offset + other.offset : nullptr;
    };
  }

  // Step `step` of the depth into stage s, all that comes asynchronously.
  FASTDL_DEVICE void load(int step, int s) const {
    constexpr int chunk = A::chunk, chunks = kConvDepth / chunk, lines = threads / chunks;
    const int k0 = step * kConvDepth, line = thread_x() / chunks, k = k0 + thread_x() % chunks * chunk;
    const A to = a(s);
    if (args.wide) {
      const GatherCol col = cols[s * kConvDepth + k - k0];
#pragma unroll
      for (int r = line; r < kM; r += lines) {
        const GatherRow row = rows[r];
        const bool in_image = inside(args.x, row, col);
        copy_async<16>(to.at(r, k - k0), in_image ? in + row.offset + col.offset : in, in_image ? 16 : 0);
      }
    } else if constexpr (!Elements::held) {
      Elements::copy(to, args.by_pixel, in, element(s));
    }
    const B weights = b(s);
#pragma unroll
    for (int j = line; j < kN; j += lines) {
      const bool there = j < columns && k < phase.pack_row;
      copy_async<16>(weights.at(j, k - k0), there ? w + static_cast<i64>(j) * phase.pack_row + k : w, there ? 16 : 0);
    }
  }

  FASTDL_DEVICE void run(int tile_m, int tile_n, int group, int chunk) {
    const int steps = (phase.depth + kConvDepth - 1) / kConvDepth;
    const int begin = args.chunks > 1 ? chunk * args.chunk : 0;
    const int end = args.chunks > 1 && begin + args.chunk < steps ? begin + args.chunk : steps;
    for (int r = thread_x(); r < kM; r += threads) rows[r] = gather_row(phase, args.x, tile_m * kM + r);
    for (int k = thread_x(); k < kStages * kConvDepth; k += threads)
      cols[k] = gather_col(phase, args.x, begin * kConvDepth + k);
    block_sync(threads);  // both tables
    const bool held = Elements::held && !args.wide;
    Elements elements;
    WarpTile<T, parts, kWarpM, kWarpN> sum;
    sum.clear();
    Peak row_peak[kWarpM / 16], col_peak[kWarpN / 16];
    const int m0 = warp() / warps_n * kWarpM, n0 = warp() % warps_n * kWarpN;
    for (int s = 0; s < kStages - 1; ++s) {
      if (begin + s < end) {
        load(begin + s, s);
        if constexpr (Elements::held)
          for (int round = 0; held && round < Elements::rounds; ++round)
            elements.fetch(round, element(s)), elements.put(round, a(s), args.by_pixel);
      }
      copy_commit();
    }
    for (int step = begin; step < end; ++step) {
      copy_wait<kStages - 2>();
      block_sync(threads);  // the step has come for all threads, and nobody reads the one before any more
      const int ahead = step + kStages - 1, to = (ahead - begin) % kStages, s = (step - begin) % kStages;
      const bool fetches = held && ahead < end;
      if (ahead < end) load(ahead, to);
      copy_commit();
      if (thread_x() < kConvDepth)  // what step + kStages reads, of which nobody knows before the next barrier
        cols[s * kConvDepth + thread_x()] = gather_col(phase, args.x, (step + kStages) * kConvDepth + thread_x());
#pragma unroll(repairs ? 1 : kConvDepth / 16)
      for (int k = 0; k < kConvDepth; k += 16) {
        constexpr int each = kConvDepth / Elements::rounds;
        if constexpr (Elements::held)
          if (fetches && k % each == 0) elements.fetch(k / each, element(to));
        sum.template add<false, false>(a(s), b(s), m0, n0, k, repairs ? row_peak : nullptr,
                                       repairs ? col_peak : nullptr);
        if constexpr (Elements::held)
          if (fetches && (k + 16) % each == 0) elements.put(k / each, a(to), args.by_pixel);
      }
    }
    block_sync(threads);  // sums take the place of tiles that other warps may still multiply

    // Through shared memory, so that neighbours are written together. Lines of kN + 4 keep packs aligned, of kN + 1 let
    // a warp read a column.
    const ConvEpilogue<T>& out = args.out;
    const int line = args.vector_out ? kN + 4 : kN + 1;
    float* const sums = reinterpret_cast<float*>(memory);
    float* const row_peaks = sums + kM * (kN + 4);
    float* const col_peaks = row_peaks + kM;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[(m0 + 16 * i + sum_row(r)) * line + n0 + 8 * j + sum_col(r)] = sum.d[i][j][r];
    if constexpr (repairs) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) {
          const float peak = warp_max<4>(row_peak[i].x[half]);
          if (n0 == 0 && lane() % 4 == 0) row_peaks[m0 + 16 * i + 8 * half + lane() / 4] = peak;
        }
#pragma unroll
        for (int j = 0; j < kWarpN / 16; ++j) {
          const float peak = warp_max<4>(col_peak[j].x[half]);
          if (m0 == 0 && lane() % 4 == 0) col_peaks[n0 + 16 * j + 8 * half + lane() / 4] = peak;
        }
      }
    }
    block_sync(threads);  // for all

    const int k_begin = begin * kConvDepth, k_end = end * kConvDepth < phase.depth ? end * kConvDepth : phase.depth;
    const i64 column0 = static_cast<i64>(group) * args.columns + tile_n * kN;
    const auto repaired = [&](float x, int r, int j) {
      // Of several groups zeros are multiplied too, by Inf and NaN of others.
      bool again = args.groups.count > 1 && x != x;
      if constexpr (repairs) again = again || is_suspect(x, row_peaks[r], col_peaks[j]);
      if (!again) return x;
      return gather_exact(args, phase, in, w + static_cast<i64>(j) * phase.pack_row, rows[r], tile_n * kN + j, k_begin,
                          k_end);
    };
    if (args.vector_out) {
#pragma unroll 1
      for (int q = thread_x(); q < kM * kN / kConvPack; q += threads) {
        const int r = q / (kN / kConvPack), j = q % (kN / kConvPack) * kConvPack, m = tile_m * kM + r;
        if (m >= phase.pixels || j >= columns) continue;
        float x[kConvPack];
#pragma unroll
        for (int e = 0; e < kConvPack; ++e) x[e] = repaired(sums[r * line + j + e], r, j + e);
        conv_finish_pack(out, x, column0 + j, written_offset(phase, out.step, out.n_step, m) + column0 + j);
      }
      return;
    }
    const bool by_column = args.chunks > 1 || out.channels_last;
#pragma unroll 1
    for (int q = thread_x(); q < kM * kN; q += threads) {
      const int r = by_column ? q / kN : q % kM, j = by_column ? q % kN : q / kM, m = tile_m * kM + r;
      if (m >= phase.pixels || j >= columns) continue;
      const float x = repaired(sums[r * line + j], r, j);
      if (args.chunks > 1)
        args.partial[chunk * args.partial_chunk + (phase.first_pixel + m) * args.partial_row + column0 + j] = x;
      else
        conv_finish(out, x, column0 + j, written_offset(phase, out.step, out.n_step, m) + (column0 + j) * out.c_step);
    }
  }
};

template <class T, int parts, int kM, int kN, int kWarpM, int kWarpN, int kStages>
FASTDL_GLOBAL(kM / kWarpM * (kN / kWarpN) * kWarp, sizeof(T) == 2 ? 2 : 1)
conv_gather_kernel(FASTDL_PARAM ConvGatherArgs<T> args) {
  using Tile = ConvGatherTile<T, parts, kM, kN, kWarpM, kWarpN, kStages>;
  const GatherTile at = gather_tile(args.phase, args.phases, args.tiles_n, block_x());
  const GatherPhase& phase = args.phase[at.phase];
  const int group = block_y(), column = at.n * kN;
  unsigned char* const memory = shared_memory<unsigned char>();
  Tile tile = {args,
               phase,
               args.in + group * args.in_group,
               args.w + phase.pack + (static_cast<i64>(group) * args.columns + column) * phase.pack_row,
               args.columns - column,
               reinterpret_cast<GatherRow*>(memory + Tile::table),
               reinterpret_cast<GatherCol*>(memory + Tile::table) + kM,
               memory};
  tile.run(at.m, at.n, group, block_z());
}

// Sums of all chunks, in their order, to what is written.
template <class T>
struct ConvFinishArgs {
  GatherPhase phase[kMostPhases];
  int phases;
  const float* partial;
  int chunks, columns;  // of all groups
  i64 partial_chunk;
  i64 total;
  ConvEpilogue<T> out;
};

constexpr int kConvThreads = 256;

template <class T>
FASTDL_GLOBAL(kConvThreads, 1)
conv_finish_kernel(FASTDL_PARAM ConvFinishArgs<T> args) {
  const i64 stride = static_cast<i64>(grid_x()) * kConvThreads;
  for (i64 i = static_cast<i64>(block_x()) * kConvThreads + thread_x(); i < args.total; i += stride) {
    const int pixel = static_cast<int>(i / args.columns), column = static_cast<int>(i % args.columns);
    float sum = 0;
    for (int c = 0; c < args.chunks; ++c) sum += args.partial[c * args.partial_chunk + i];
    int phase = 0;
    while (phase + 1 < args.phases && pixel >= args.phase[phase + 1].first_pixel) ++phase;
    const GatherPhase& p = args.phase[phase];
    conv_finish(args.out, sum, column,
                written_offset(p, args.out.step, args.out.n_step, pixel - p.first_pixel) + column * args.out.c_step);
  }
}

// Weights as tiles read them: out[phase.pack + (group * columns + j) * pack_row + k], zeros behind the depth and from
// one of the groups that are one to another.
template <class T>
struct ConvPackWeights {
  GatherPhase phase[kMostPhases];
  int phases;
  FastDiv by_channels;
  GatherGroups groups;
  i64 rows;  // columns of all groups
  const T* w;
  i64 group_step, channel_step, column_step, step[3];
  T* out;
};

template <class T>
FASTDL_GLOBAL(kConvThreads, 1)
conv_pack_kernel(FASTDL_PARAM ConvPackWeights<T> args) {
  const GatherPhase& p = args.phase[block_y()];
  if (p.pack_row == 0) return;
  const i64 total = args.rows * p.pack_row;
  const i64 stride = static_cast<i64>(grid_x()) * kConvThreads;
  for (i64 i = static_cast<i64>(block_x()) * kConvThreads + thread_x(); i < total; i += stride) {
    const int k = static_cast<int>(i % p.pack_row);
    const int j = static_cast<int>(i / p.pack_row), group = args.groups.by_columns.quotient(j);
    T x = conv_zero<T>();
    if (k < p.depth) {
      const int tap = args.by_channels.quotient(k);
      int c = k - tap * args.by_channels.divisor;
      if (divide(&c, args.groups.by_channels) == group % args.groups.count)
        x = args.w[group * args.group_step + (j - group * args.groups.by_columns.divisor) * args.column_step +
                   c * args.channel_step + weight_offset(p, args.step, tap)];
    }
    args.out[p.pack + i] = x;
  }
}

}  // namespace fastdl
