// The recurrent schedule: steps one after the other, in each one or two products (with a projection). The grid is
// (groups of hidden units, tiles of sequences). One launch runs one product of one step, with W read from memory; or,
// cooperative, a whole sequence, with W in shared memory from first to last and h going through L2: blocks of the same
// sequences meet at a barrier before each product.
#pragma once
#include <type_traits>

#include "rnn/cuda/kernel_cell.cuh"

namespace fastdl {

// A product's groups and sequences of this thread block, and what follows on them. `first`: nothing to wait for.
template <class T, class E, int parts, bool resident, class Item>
FASTDL_DEVICE void run_product(const RnnCudaArgs& args, const RnnStep& step, int phase, const u32* shared_w,
                               float* sums, bool first, u32* round) {
  constexpr int kSlots = Item::kSlots, kCellGates = rnn_gates(kSlots), kUnits = rnn_units(kCellGates);
  constexpr int kItems = kUnits * kRnnRows / kRnnThreads;
  const RnnProduct& p = args.product[phase];
  const i64 group_words = static_cast<i64>(p.blocks) * rnn_block_words(kSlots, parts);
  const int parity = phase == 0 ? step.parity : 0, rows = Item::rows(step);
  // What no sequence had a step before is a product with zeros: left out.
  const int blocks = Item::kSkipsFirst && step.before == 0 ? 0 : p.blocks;
  bool waited = first || !resident;
  const auto wait = [&] {
    if (!waited) grid_sync(args.arrived + block_y(), ++*round, static_cast<u32>(grid_x()), kRnnThreads);
    waited = true;
  };
  int local = 0;
  for (int group = block_x(); group < p.groups; group += grid_x(), ++local) {
    const u32* const w = resident ? shared_w + local * group_words : p.packed + group * group_words;
    for (int b0 = block_y() * args.tile_rows; b0 < rows; b0 += args.batch_blocks * args.tile_rows) {
      const int columns = rows - b0 < args.tile_rows ? rows - b0 : args.tile_rows;
      Item items[kItems] = {};
      const auto place = [&](int i, int* unit, int* column) {
        const int e = thread_x() + i * kRnnThreads;
        *unit = e % kUnits, *column = e / kUnits;
        return *column < columns && group * kUnits + *unit < p.units;
      };
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        int unit, column;
        if (place(i, &unit, &column)) items[i].load(args, step, b0 + column, group * kUnits + unit);
      }
      wait();
      group_product<E, parts, kSlots>(w, args.operand[phase], parity, blocks, b0, columns, sums);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        int unit, column;
        if (!place(i, &unit, &column)) continue;
        float sum[kCellGates];
#pragma unroll
        for (int g = 0; g < kCellGates; ++g) {
          const int slot = unit / 8 * kCellGates + g;
          sum[g] = total<T, parts, kSlots>(sums, blocks, columns, column, slot * 8 + unit % 8);
          sum[g] = repaired<T, parts>(sum[g], p, args.operand[phase], parity, b0 + column,
                                      g * p.units + group * kUnits + unit);
        }
        items[i].finish(args, step, b0 + column, group * kUnits + unit, sum);
      }
      block_sync(kRnnThreads);
    }
  }
  wait();
}

// This block's groups of W to shared memory.
template <int slots, int parts>
FASTDL_DEVICE u32* keep_weights(const RnnProduct& p, u32* to) {
  const i64 words = static_cast<i64>(p.blocks) * rnn_block_words(slots, parts);
  for (int group = block_x(); group < p.groups; group += grid_x(), to += words)
    for (i64 i = thread_x() * 4; i < words; i += kRnnThreads * 4) copy_async<16>(to + i, p.packed + group * words + i);
  return to;
}

// First: what follows on the first product; Second: on the second; void: there is none.
template <class T, class E, int parts, bool resident, class First, class Second>
FASTDL_DEVICE void run_steps(const RnnCudaArgs& args) {
  float* const sums = shared_memory<float>();
  u32* const shared_w = shared_memory<u32>() + rnn_sum_floats(args.tile_rows, First::kSlots);
  u32* second_w = shared_w;
  if constexpr (resident) {
    second_w = keep_weights<First::kSlots, parts>(args.product[0], shared_w);
    if constexpr (!std::is_void_v<Second>)
      if (args.projected) keep_weights<Second::kSlots, parts>(args.product[1], second_w);
    copy_commit();
    copy_wait<0>();
    block_sync(kRnnThreads);
  }
  RnnStep step = {};
  step.before = args.before, step.t = args.t, step.row = args.row, step.parity = args.first_step & 1;
  const int dt = args.rising ? 1 : -1;
  bool first = true;
  u32 round = 0;
  for (int r = 0; r < args.run_count; ++r) {
    const RnnRun run = args.runs[r];
    for (int i = 0; i < run.steps; ++i) {
      step.m = run.rows;
      step.after = i + 1 < run.steps ? run.rows : r + 1 < args.run_count ? args.runs[r + 1].rows : args.after;
      step.t_after = step.t + dt, step.row_after = step.row + (args.rising ? step.m : -step.after);
      if (args.phase_begin == 0)
        run_product<T, E, parts, resident, First>(args, step, 0, shared_w, sums, first, &round);
      if constexpr (!std::is_void_v<Second>)
        if (args.phase_end == 2)
          run_product<T, E, parts, resident, Second>(args, step, 1, second_w, sums, false, &round);
      first = false;
      step.before = step.m, step.t = step.t_after, step.row = step.row_after, step.parity ^= 1;
    }
  }
}

template <class T, class E, int parts, RnnCell cell, bool resident>
FASTDL_GLOBAL(kRnnThreads, 1)
rnn_forward_kernel(FASTDL_PARAM RnnCudaArgs args) {
  using Projection = std::conditional_t<cell == RnnCell::lstm, ForwardProjection<T, E, parts>, void>;
  run_steps<T, E, parts, resident, ForwardCell<T, E, parts, cell>, Projection>(args);
}

template <class T, class E, int parts, bool projected, bool resident>
FASTDL_GLOBAL(kRnnThreads, 1)
rnn_backward_kernel(FASTDL_PARAM RnnCudaArgs args) {
  using Cell = BackwardCell<T, E, parts, projected>;
  using First = std::conditional_t<projected, BackwardMerge<T, E, parts>, Cell>;
  run_steps<T, E, parts, resident, First, std::conditional_t<projected, Cell, void>>(args);
}

// What one lane holds of a tile's fragments: both steps of 16, all parts.
template <class T, class E, int parts>
FASTDL_DEVICE void pack_fragments(const RnnPackArgs& args, int group, int tile, int k0, int in_warp, u32* to) {
  const int tiles = rnn_slots(args.gates) / 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    Pack<u32, 4> out[parts] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = tile * 16 + rnn_fragment_row(in_warp, r), k = k0 + rnn_fragment_k(in_warp, j, r, e);
        const int unit = group * rnn_units(args.gates) + rnn_row_unit(row, args.gates);
        if (unit >= args.units || k >= args.K) continue;
        std::uint16_t part[parts];
        const i64 at = (rnn_row_gate(row, args.gates) * static_cast<i64>(args.units) + unit) * args.w_row;
        split_parts<T, E>(load_float<T>(args.w, at + k * args.w_col), part);
#pragma unroll
        for (int p = 0; p < parts; ++p) out[p].x[r] |= static_cast<u32>(part[p]) << 16 * e;
      }
    }
#pragma unroll
    for (int p = 0; p < parts; ++p)
      *reinterpret_cast<Pack<u32, 4>*>(to + ((p * tiles + tile) * 2 + j) * 128 + in_warp * 4) = out[p];
  }
}
// Of float32 for FMA: half a row.
FASTDL_DEVICE void pack_floats(const RnnPackArgs& args, int group, int tile, int k0, int in_warp, u32* to) {
  const int row = tile * 16 + in_warp % 16, unit = group * rnn_units(args.gates) + rnn_row_unit(row, args.gates);
  const i64 at = (rnn_row_gate(row, args.gates) * static_cast<i64>(args.units) + unit) * args.w_row;
  for (int k = in_warp / 16 * 16, end = k + 16; k < end; k += 4) {
    Pack<u32, 4> out = {};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (unit < args.units && k0 + k + e < args.K)
        out.x[e] = float_bits(load_float<float>(args.w, at + (k0 + k + e) * args.w_col));
    *reinterpret_cast<Pack<u32, 4>*>(to + rnn_fma_word(rnn_slots(args.gates), row, k)) = out;
  }
}

template <class T, class E, int parts>
FASTDL_GLOBAL(kRnnThreads, 1)
rnn_pack_kernel(FASTDL_PARAM RnnPackArgs args) {
  const int tiles = rnn_slots(args.gates) / 2;
  const i64 count = static_cast<i64>(args.groups) * args.blocks * tiles * kWarp;
  for (i64 i = static_cast<i64>(block_x()) * kRnnThreads + thread_x(); i < count;
       i += static_cast<i64>(grid_x()) * kRnnThreads) {
    const int in_warp = static_cast<int>(i % kWarp), tile = static_cast<int>(i / kWarp % tiles);
    const i64 block = i / kWarp / tiles;  // of all groups
    const int k0 = static_cast<int>(block % args.blocks) * kRnnBlockK, group = static_cast<int>(block / args.blocks);
    u32* const to = args.packed + block * rnn_block_words(2 * tiles, parts);
    if constexpr (parts > 0) {
      pack_fragments<T, E, parts>(args, group, tile, k0, in_warp, to);
    } else {
      pack_floats(args, group, tile, k0, in_warp, to);
    }
  }
}

template <class T, class E, int parts>
FASTDL_GLOBAL(kRnnThreads, 1)
rnn_begin_kernel(FASTDL_PARAM RnnBeginArgs args) {
  const int row = args.to.data[0] ? args.to.row : args.K;
  const i64 count = static_cast<i64>(args.to.data[0] ? args.padded_rows : args.B) * row;
  for (i64 i = static_cast<i64>(block_x()) * kRnnThreads + thread_x(); i < count;
       i += static_cast<i64>(grid_x()) * kRnnThreads) {
    const i64 b = i / row;
    const int k = static_cast<int>(i % row);
    const bool inside = b < args.B && k < args.K;
    const float x = inside ? load_state<T>(args.from, b, k) : 0.0f;
    if (args.to.data[0]) put<T, E, parts>(args.to, 0, b, k, x), put<T, E, parts>(args.to, 1, b, k, x);
    if (inside) store_state<T>(args.out, b, k, x);
  }
}

// One row of the table. T in memory, E what is multiplied, in so many parts; parts 0: T, by FMA.
template <class T, class E, int parts, RnnCell cell, bool resident>
struct CudaRnnRow {
  static void forward(const LaunchShape& shape, const Stream& stream, const RnnCudaArgs& args) {
    launch(rnn_forward_kernel<T, E, parts, cell, resident>, shape, stream, args);
  }
  static void backward(const LaunchShape& shape, const Stream& stream, const RnnCudaArgs& args) {
    if constexpr (cell == RnnCell::lstm)
      if (args.projected) return launch(rnn_backward_kernel<T, E, parts, true, resident>, shape, stream, args);
    launch(rnn_backward_kernel<T, E, parts, false, resident>, shape, stream, args);
  }
  static void pack(const LaunchShape& shape, const Stream& stream, const RnnPackArgs& args) {
    launch(rnn_pack_kernel<T, E, parts>, shape, stream, args);
  }
  static void begin(const LaunchShape& shape, const Stream& stream, const RnnBeginArgs& args) {
    launch(rnn_begin_kernel<T, E, parts>, shape, stream, args);
  }
  static constexpr CudaRnnFunctions functions = {forward, backward, pack, begin};
};

}  // namespace fastdl
