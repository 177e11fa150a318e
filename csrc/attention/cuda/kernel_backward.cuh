// Backward: a block keeps 64 rows of one side and the other side streams by, a tile of it at a time; each warp has 16
// rows, scores and their gradients stay in its registers, where they are the A operands of the sums.
//
//   rows are queries: dQ += dS K
//   rows are keys: dK += dS^T Q, dV += P'^T dO (scores come transposed)
//   P = exp(S - lse)    P' = P .* keep / (1 - p)    dP = dO V^T .* keep / (1 - p)    dS = P .* (dP - delta) * scale
//
// Two passes, 4 + 3 products of a tile where one pass has 5: one pass would add to dQ in global memory for each tile of
// keys, in their order: 64 x 128 floats read and written a tile are 64 KB, 1.5 us of a multiprocessor's share of an
// H100's L2, for 1.7 us of products, and blocks would wait for each other. Two passes write each gradient once.
//
// Inf among the operands of float32: scores and dP are mended as in the forward pass (repair_scores), so that keys
// which it hides have no part in anything. Sums over keys or queries are not: their products of parts give NaN where
// the sum is Inf. To mend those takes P and dS back from the other lanes, in twice the code of the loop.
//
// The gradient of a mask is the first pass without the product: dS is summed over what the mask is broadcast along.
#pragma once
#include "attention/cuda/kernel_common.cuh"

namespace fastdl {

FASTDL_DEVICE QuerySide query_side(const CudaAttentionGradArgs& args, const CudaSpan& span, int head, int i) {
  const CudaAttentionProblem& p = args.p;
  QuerySide s = {0, 0, 0, 0, 0};
  if (i >= span.Lq) return s;
  const i64 row = (static_cast<i64>(span.batch) * p.H + head) * p.Lq + span.q_begin + i;
  const float lse = args.lse[2 * row];
  if (lse == -kInf) return s;
  s.lse = lse, s.rest = -kLog2OfE * args.lse[2 * row + 1], s.delta = args.delta[row], s.sees = 1;
  if (p.threshold) s.key = dropout_row_key(p.seed, span.sequence, head, i);
  return s;
}

template <class T, int kDepth, bool kKeys>
struct GradShape {
  static constexpr int kItem = static_cast<int>(sizeof(T));
  static constexpr int kRows = kGradRows, kCols = attention_stream_rows(kItem, kDepth);
  using Still = SharedTile<T, kRows, kDepth>;
  using Stream = SharedTile<T, kCols, kDepth>;
  static constexpr int kStill = attention_still_bytes(kDepth, kItem);
  static constexpr int kStage = attention_stage_bytes(kCols, kDepth, kItem, kKeys);
  static_assert(kCols <= kDepth && kRows == 16 * kAttentionWarps && 2 * Still::bytes == kStill &&
                2 * Stream::bytes <= kStage);
};

// sums += A B, A [16, 16 kN] in parts, B [16 kN, width] of a tile, its columns from `begin` on; each part of the sum is
// `scale` of the product.
template <class T, int kN, int kBlocks, class Tile>
FASTDL_DEVICE void add_product(float (&sums)[kBlocks][4], const Fragment<kPartsOf<T>> (&a)[kN], const Tile& b,
                               int width, int begin, float scale, int wanted) {
#pragma unroll
  for (int d = 0; d < 8 * kBlocks; d += 16) {
    if (begin + d >= width) break;
    const int hide = opaque(0);
    float x[2][4] = {};
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      Fragment<kPartsOf<T>> y;
      load_b_transposed(&y, b, hide + 16 * j, begin + d);
      multiply_add<T>(x[0], x[1], a[j], y, wanted);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      float& sum = sums[d / 8 + r / 4][r % 4];
      sum = fma_rn(x[r / 4][r % 4], scale, sum);
    }
  }
}

// A power of two that brings the largest of a warp's values near 2^14: dS in float16 would be lost below 2^-24.
template <class T, int kBlocks>
FASTDL_DEVICE float lift_of(const float (&x)[kBlocks][4]) {
  if constexpr (!kIsF16<T>) {
    return 1;
  } else {
    float highest = 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float a = x[n][r] < 0 ? -x[n][r] : x[n][r];
        if (a > highest) highest = a;
      }
    const int exponent = static_cast<int>(float_bits(warp_max(highest)) >> 23);
    return exponent == 0 || exponent == 255 ? 1.0f
                                            : bits_float(static_cast<u32>(clamp_of(268 - exponent, 1, 253)) << 23);
  }
}

template <class T, int kBlocks>
FASTDL_DEVICE void store_sums(const float (&sums)[kBlocks][4], T* data, i64 step, int row, int rows, int width,
                              float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + lane() / 4 + 8 * h;
    if (r >= rows) continue;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (8 * n >= width) break;
      store_two(data + r * step, 8 * n + lane() % 4 * 2, width, sums[n][2 * h] * scale, sums[n][2 * h + 1] * scale);
    }
  }
}

// kKeys: the rows are keys, for dK and dV; else queries, for dQ or the gradient of the mask.
template <class T, int kDepth, bool kKeys>
FASTDL_GLOBAL(kAttentionThreads, 1)
attention_grad_kernel(FASTDL_PARAM CudaAttentionGradArgs args) {
  using Shape = GradShape<T, kDepth, kKeys>;
  using Still = typename Shape::Still;
  using Stream = typename Shape::Stream;
  constexpr int kRows = Shape::kRows, kCols = Shape::kCols, kN = kCols / 16, parts = kPartsOf<T>;
  constexpr int kSums = attention_sum_columns(kDepth, sizeof(T));
  const CudaAttentionProblem& p = args.p;
  const bool of_mask = !kKeys && args.dmask;
  const int group = p.H / p.Hkv, heads = kKeys ? p.Hkv : p.H;

  // What this block goes through: normally one batch, one head, one tile of rows and all columns.
  int index = block_x(), columns = 0;  // of the sums, from there on
  int batch_begin, batch_end, head_begin, head_end, tile_begin, tile_end, only_col = -1;
  if (of_mask) {
    const int cols = (args.mask_Lk + kCols - 1) / kCols, rows = (args.mask_Lq + kRows - 1) / kRows;
    if (args.mask_Lk > 1 || p.Lk == 1) only_col = index % cols;
    index /= cols;
    tile_begin = index % rows, tile_end = tile_begin + 1;
    if (args.mask_Lq == 1) tile_end = (p.Lq + kRows - 1) / kRows;
    index /= rows;
    head_begin = index % args.mask_H, head_end = args.mask_H == 1 ? p.H : head_begin + 1;
    index /= args.mask_H;
    batch_begin = index, batch_end = args.mask_B == 1 ? p.B : batch_begin + 1;
  } else {
    columns = index % args.parts * kSums;
    index /= args.parts;
    tile_begin = index % args.tiles;
    if (!kKeys) tile_begin = args.tiles - 1 - tile_begin;
    index /= args.tiles;
    head_begin = index % heads, head_end = head_begin + 1;
    batch_begin = index / heads;
    if (p.seq_q) batch_begin = find_sequence(p, kKeys, kRows, 1, &tile_begin);
    if (batch_begin < 0) return;
    batch_end = batch_begin + 1, tile_end = tile_begin + 1;
  }

  char* const shared = shared_memory<char>();
  const Still a1 = {reinterpret_cast<T*>(shared)}, a2 = {reinterpret_cast<T*>(shared + Still::bytes)};
  const auto stream = [&](int stage, int which) -> Stream {
    return {reinterpret_cast<T*>(shared + Shape::kStill + stage * Shape::kStage + which * Stream::bytes)};
  };
  const auto sides = [&](int stage) {
    return reinterpret_cast<QuerySide*>(shared + Shape::kStill + stage * Shape::kStage + 2 * Stream::bytes);
  };

  const int g = lane() / 4, t = lane() % 4, m0 = 16 * warp();
  float first[kSums / 8][4] = {}, second[kKeys ? kSums / 8 : 1][4] = {};

#pragma unroll 1
  for (int batch = batch_begin; batch < batch_end; ++batch)
#pragma unroll 1
    for (int head = head_begin; head < head_end; ++head)
#pragma unroll 1
      for (int tile = tile_begin; tile < tile_end; ++tile) {
        const CudaSpan span = span_of(p, batch);
        const int row0 = tile * kRows;
        const int rows = kKeys ? span.Lk : span.Lq, cols = kKeys ? span.Lq : span.Lk;
        if (row0 >= rows) continue;
        const int kv = kKeys ? head : head / group, last = min_of(row0 + kRows, rows) - 1;
        const CudaRange range = kKeys ? queries_seeing(p, span, row0, last) : keys_seen(p, span, row0, last);
        int from = range.begin / kCols, to = range.begin < range.end ? (range.end + kCols - 1) / kCols : from;
        if (only_col >= 0) from = max_of(from, only_col), to = min_of(to, only_col + 1);
        const int per_head = to - from, steps = per_head * (kKeys ? group : 1);
        if (steps <= 0) continue;

        const T* const k_base =
            static_cast<const T*>(p.k) + span.batch * p.k_step.batch + kv * p.k_step.head + span.k_begin * p.k_step.row;
        const T* const v_base =
            static_cast<const T*>(p.v) + span.batch * p.v_step.batch + kv * p.v_step.head + span.k_begin * p.v_step.row;
        const T* const q_base = static_cast<const T*>(p.q) + span.batch * p.q_step.batch + span.q_begin * p.q_step.row;
        const T* const o_base =
            static_cast<const T*>(args.dout) + span.batch * args.dout_step.batch + span.q_begin * args.dout_step.row;
        const auto rows_from = [](const T* base, i64 step, int begin, int end) {
          return [=](int r) -> TileRow<T> { return {base + min_of(begin + r, end - 1) * step, begin + r < end}; };
        };
        const auto issue = [&](int step) {
          const int stage = args.stages == 2 ? step % 2 : 0, col0 = (from + step % per_head) * kCols;
          if constexpr (kKeys) {
            const int q_head = head * group + step / per_head;
            load_tile<kCols>(stream(stage, 0), rows_from(q_base + q_head * p.q_step.head, p.q_step.row, col0, cols),
                             p.D, p.q_step.col, p.vector_q);
            load_tile<kCols>(stream(stage, 1),
                             rows_from(o_base + q_head * args.dout_step.head, args.dout_step.row, col0, cols), p.Dv,
                             args.dout_step.col, p.vector_dout);
            if (thread_x() < kCols) sides(stage)[thread_x()] = query_side(args, span, q_head, col0 + thread_x());
          } else {
            load_tile<kCols>(stream(stage, 0), rows_from(k_base, p.k_step.row, col0, cols), p.D, p.k_step.col,
                             p.vector_k);
            load_tile<kCols>(stream(stage, 1), rows_from(v_base, p.v_step.row, col0, cols), p.Dv, p.v_step.col,
                             p.vector_v);
          }
        };

        // Of another tile of rows nobody reads any more: its last step ended with a barrier.
        QuerySide own[2] = {};
        if constexpr (kKeys) {
          load_tile<kRows>(a1, rows_from(k_base, p.k_step.row, row0, rows), p.D, p.k_step.col, p.vector_k);
          load_tile<kRows>(a2, rows_from(v_base, p.v_step.row, row0, rows), p.Dv, p.v_step.col, p.vector_v);
        } else {
          load_tile<kRows>(a1, rows_from(q_base + head * p.q_step.head, p.q_step.row, row0, rows), p.D, p.q_step.col,
                           p.vector_q);
          load_tile<kRows>(a2, rows_from(o_base + head * args.dout_step.head, args.dout_step.row, row0, rows), p.Dv,
                           args.dout_step.col, p.vector_dout);
          for (int h = 0; h < 2; ++h) own[h] = query_side(args, span, head, row0 + m0 + g + 8 * h);
        }

    // Steps before 0 only issue the first stages (and the rows that stay, with them).
#pragma unroll 1
        for (int step = -args.stages; step < steps; ++step) {
          if (step >= 0) {
            if (args.stages == 2)
              copy_wait<1>();
            else
              copy_wait<0>();
            block_sync(kAttentionThreads);
            const int stage = args.stages == 2 ? step % 2 : 0, col0 = (from + step % per_head) * kCols,
                      hide = opaque(0);
            const int q_head = kKeys ? head * group + step / per_head : head;
            const Stream b1 = stream(stage, 0), b2 = stream(stage, 1);
            float s[1][2 * kN][4], ds[1][2 * kN][4];
            score_product<T>(s, a1, m0, b1, 0, p.D, p.parts);
            score_product<T>(ds, a2, m0, b2, 0, p.Dv, p.parts);
            if constexpr (sizeof(T) == 4) {
              repair_scores(s, a1, m0, b1, 0, p.D);
              repair_scores(ds, a2, m0, b2, 0, p.Dv);
            }

            const bool edge = kKeys ? is_edge(p, span, col0, col0 + kCols - 1, row0, row0 + kRows)
                                    : is_edge(p, span, row0, row0 + kRows - 1, col0, col0 + kCols);
#pragma unroll
            for (int n = 0; n < 2 * kN; ++n)
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                const int row = hide + row0 + m0 + g + r / 2 * 8, in_tile = 8 * n + 2 * t + r % 2, col = col0 + in_tile;
                const int i = kKeys ? col : row, j = kKeys ? row : col;
                QuerySide side = own[r / 2];
                if constexpr (kKeys) side = sides(stage)[in_tile];
                bool sees = side.sees;
                if (edge) {
                  const int distance = j - i - span.offset;
                  sees = sees && i < span.Lq && j < span.Lk && distance >= p.lo && distance <= p.hi;
                }
                float x, slope = 1;
                if (p.plain) {
                  x = fma_rn(s[0][n][r], p.scale, -side.lse);
                } else {
                  x = s[0][n][r] * p.scale;
                  if (p.softcap > 0) {
                    const float h = tanh_of(x * p.inverse_softcap);
                    x = p.softcap * h, slope = 1 - h * h;
                  }
                  if (p.mask_item != 0 && sees) {
                    x = masked<T>(p, mask_row(p, span.batch, q_head, i), j, x);
                    if (p.mask_item == 1 && x == -kInf) sees = false;
                  }
                  x -= side.lse;
                }
                const float probability = exp2_approx(fma_rn(x, kLog2OfE, side.rest));
                const bool dropped = p.threshold && is_dropped(p, side.key, j);
                const float kept = sees && !dropped ? probability : 0.0f;
                const float gradient = dropped ? 0.0f : ds[0][n][r] * p.keep_factor;
                const float y = probability * (gradient - side.delta);
                ds[0][n][r] = !sees ? 0.0f : of_mask ? y : y * slope;
                if constexpr (kKeys) s[0][n][r] = kept * (1 << kLift<T>);
              }

            if (of_mask) {
#pragma unroll
              for (int n = 0; n < 2 * kN; ++n)
#pragma unroll
                for (int r = 0; r < 4; ++r) first[n][r] += ds[0][n][r];
            } else {
              const float lift = lift_of<T>(ds[0]);
              if constexpr (kIsF16<T>) {
#pragma unroll
                for (int n = 0; n < 2 * kN; ++n)
#pragma unroll
                  for (int r = 0; r < 4; ++r) ds[0][n][r] *= lift;
              }
              Fragment<parts> f[kN];
              fragments_of<T, kN>(f, ds[0]);
              const float back = bits_float((254u << 23) - float_bits(lift));  // 2^-k of 2^k
              add_product<T>(first, f, b1, p.D, columns, back, p.parts);
            }
            if constexpr (kKeys) {
              Fragment<parts> f[kN];
              fragments_of<T, kN>(f, s[0]);
              add_product<T>(second, f, b2, p.Dv, columns, 1, p.parts);
            }
            block_sync(kAttentionThreads);  // of this stage nobody reads any more
          }
          if (step + args.stages < steps) issue(step + args.stages);
          copy_commit();
        }
        // Nothing is in flight: the groups after that of the last step are empty.
      }

  if (of_mask) {
    if constexpr (!kKeys) {
      // dS [64, kCols] of this block's elements, summed over what is broadcast along rows or columns.
      float* const out = args.dmask + batch_begin * args.dmask_step.batch + head_begin * args.dmask_step.head;
      float* const memory = shared_memory<float>();  // which nobody reads any more
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) memory[(m0 + g + r / 2 * 8) * (kCols + 1) + 8 * n + 2 * t + r % 2] = first[n][r];
      block_sync(kAttentionThreads);
      const int sum_rows = args.mask_Lq == 1 ? kRows : 1, sum_cols = only_col < 0 ? kCols : 1;
      for (int e = thread_x(); e < kRows / sum_rows * (kCols / sum_cols); e += kAttentionThreads) {
        const int row = e / (kCols / sum_cols), col = e % (kCols / sum_cols);
        const int i = sum_rows > 1 ? 0 : tile_begin * kRows + row, j = sum_cols > 1 ? 0 : only_col * kCols + col;
        if (i >= args.mask_Lq || j >= args.mask_Lk) continue;
        float sum = 0;
        for (int a = 0; a < sum_rows; ++a)
          for (int b = 0; b < sum_cols; ++b) sum += memory[(row + a) * (kCols + 1) + col + b];
        out[i * args.dmask_step.row + j * args.dmask_step.col] = sum;
      }
    }
    return;
  }
  const CudaSpan span = span_of(p, batch_begin);
  const int rows = kKeys ? span.Lk : span.Lq, row = tile_begin * kRows + m0,
            begin = kKeys ? span.k_begin : span.q_begin;
  if (args.first) {
    const AttentionStrides& step = args.first_step;
    T* const out = static_cast<T*>(args.first) + span.batch * step.batch + head_begin * step.head + begin * step.row;
    store_sums(first, out + columns, step.row, row, rows, p.D - columns, p.scale);
  }
  if (kKeys && args.second) {
    const AttentionStrides& step = args.second_step;
    T* const out = static_cast<T*>(args.second) + span.batch * step.batch + head_begin * step.head + begin * step.row;
    store_sums(second, out + columns, step.row, row, rows, p.Dv - columns, p.keep_factor / (1 << kLift<T>));
  }
}

// delta(i) = sum_d dO(i,d) O(i,d): a warp a row.
template <class T>
FASTDL_GLOBAL(kAttentionThreads, 1)
attention_delta_kernel(FASTDL_PARAM CudaAttentionDeltaArgs args) {
  const i64 row = static_cast<i64>(block_x()) * kAttentionWarps + warp();
  if (row >= static_cast<i64>(args.B) * args.H * args.L) return;
  const i64 i = row % args.L, head = row / args.L % args.H, batch = row / args.L / args.H;
  const T* const dout = static_cast<const T*>(args.dout) + batch * args.dout_step.batch + head * args.dout_step.head +
                        i * args.dout_step.row;
  const T* const out =
      static_cast<const T*>(args.out) + batch * args.out_step.batch + head * args.out_step.head + i * args.out_step.row;
  float sum = 0;
  for (int d = lane(); d < args.Dv; d += kWarp)
    sum = fma_rn(to_float(dout[d * args.dout_step.col]), to_float(out[d]), sum);
  sum = warp_sum(sum);
  if (lane() == 0) args.delta[row] = sum;
}

}  // namespace fastdl
