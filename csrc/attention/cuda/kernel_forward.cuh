// Forward: a block keeps a tile of query rows and walks the keys that they see; each warp has 16 kM rows, P stays in
// its registers as the A operand of P V. K of the next tile comes in during P V, V during Q K^T: two buffers for both.
//
// By the two numbers (bf16, 64 keys, D = 128): a warp's mma of 16x8x16 takes 8 cycles of its quarter of a
// multiprocessor, its B 256 bytes, 2 cycles of the one shared memory: with 16 rows a warp shared memory is as busy as
// the tensor cores, and Q adds a quarter; with 32 (kM = 2) half as busy. Registers, of 255: O 128 + S 64 + P 16 (packed
// as S is freed) + fragments at kM = 2, D = 128; O 128 + S 32 at kM = 1, D = 256.
//
// Decode (kSplit = 4): up to 16 rows, those of the query heads that share K and V side by side. The four warps take the
// keys of a tile, each with a maximum, sum and output of its own. It is bound by reading K and V once: 32 KB a tile of
// 64 keys, 1.3 us at an H100's 25 GB/s a multiprocessor, against 128 mma a warp.
#pragma once
#include "attention/cuda/kernel_common.cuh"

namespace fastdl {

template <class T, int kDepth, int kM, int kKeys, int kSplit>
struct ForwardShape {
  static constexpr int kRows = 16 * kM * kAttentionWarps / kSplit;
  using Q = SharedTile<T, kRows, kDepth>;
  using K = SharedTile<T, kKeys, kDepth>;
  static_assert(Q::bytes + 2 * K::bytes <= attention_forward_bytes(kRows, kKeys, kDepth, sizeof(T)));
};

// x[16,16] = P V where an operand is Inf, as repair_scores; P [16][keys] in memory, for lanes need each other's.
template <class Tile>
FASTDL_DEVICE void repair_values(float (&x)[2][4], const float* memory, int keys, const Tile& v, int key, int col) {
  float all = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) all += x[r / 4][r % 4] - x[r / 4][r % 4];
  if (!ballot(all != 0)) return;
  warp_sync();  // P of the other lanes: a vote orders no memory
#pragma unroll
  for (int r = 0; r < 8; ++r) x[r / 4][r % 4] = 0;
#pragma unroll 1
  for (int j = 0; j < keys; ++j)
#pragma unroll
    for (int r = 0; r < 8; ++r)
      x[r / 4][r % 4] =
          fma_rn(memory[sum_row(r % 4) * keys + j], *v.at(key + j, col + r / 4 * 8 + sum_col(r % 4)), x[r / 4][r % 4]);
}

template <class T, int kDepth, int kM, int kKeys, int kSplit>
FASTDL_GLOBAL(kAttentionThreads, 1)
attention_forward_kernel(FASTDL_PARAM CudaAttentionArgs args) {
  using Shape = ForwardShape<T, kDepth, kM, kKeys, kSplit>;
  constexpr int kRows = Shape::kRows, kWarpKeys = kKeys / kSplit, kN = kWarpKeys / 16, parts = kPartsOf<T>;
  constexpr int kOut = attention_out_columns(kDepth, sizeof(T));
  const CudaAttentionProblem& p = args.p;

  int index = block_x();
  const int columns = index % args.columns * kOut, width = min_of(p.Dv - columns, kOut);  // of O
  index /= args.columns;
  int tile = args.tiles - 1 - index % args.tiles;  // of causal attention the last tiles are the longest: first
  index /= args.tiles;
  const int units = p.H / args.pack, unit = index % units;
  index /= units;
  const int chunk = index / p.B;
  int sequence = index % p.B;
  if (p.seq_q) sequence = find_sequence(p, false, kRows, args.pack, &tile);
  if (sequence < 0) return;
  const CudaSpan span = span_of(p, sequence);
  const int first = tile * kRows, count = span.Lq * args.pack;
  if (first >= count) return;
  const int kv = unit * args.pack / (p.H / p.Hkv);
  const auto row_of = [&](int r) { return args.pack == 1 ? first + r : (first + r) / args.pack; };
  const auto head_of = [&](int r) { return args.pack == 1 ? unit : unit * args.pack + (first + r) % args.pack; };

  char* const shared = shared_memory<char>();
  const typename Shape::Q q = {reinterpret_cast<T*>(shared)};
  const typename Shape::K k = {reinterpret_cast<T*>(shared + Shape::Q::bytes)};
  const typename Shape::K v = {reinterpret_cast<T*>(shared + Shape::Q::bytes + Shape::K::bytes)};

  float* const memory =
      reinterpret_cast<float*>(shared + Shape::Q::bytes + 2 * Shape::K::bytes) + warp() * 16 * kWarpKeys;
  static_assert(sizeof(T) == 2 || kM == 1);

  const T* const q_base = static_cast<const T*>(p.q) + span.batch * p.q_step.batch;
  const T* const k_base =
      static_cast<const T*>(p.k) + span.batch * p.k_step.batch + kv * p.k_step.head + span.k_begin * p.k_step.row;
  const T* const v_base =
      static_cast<const T*>(p.v) + span.batch * p.v_step.batch + kv * p.v_step.head + span.k_begin * p.v_step.row;
  const auto load_q = [&] {
    load_tile<kRows>(
        q,
        [&](int r) -> TileRow<T> {
          if (first + r >= count) return {q_base, false};
          return {q_base + head_of(r) * p.q_step.head + (span.q_begin + row_of(r)) * p.q_step.row, true};
        },
        p.D, p.q_step.col, p.vector_q);
  };
  const auto load_keys = [&](const typename Shape::K& to, const T* base, const AttentionStrides& step, int key,
                             int width, bool vector) {
    load_tile<kKeys>(
        to, [&](int r) -> TileRow<T> { return {base + min_of(key + r, span.Lk - 1) * step.row, key + r < span.Lk}; },
        width, step.col, vector);
  };

  const int i_first = row_of(0), i_last = row_of(min_of(kRows, count - first) - 1);
  const CudaRange range = keys_seen(p, span, i_first, i_last);
  const int tile_begin = range.begin / kKeys,
            all = range.begin < range.end ? (range.end + kKeys - 1) / kKeys - tile_begin : 0;
  const int from = tile_begin + static_cast<int>(static_cast<i64>(all) * chunk / args.chunks);
  const int to = tile_begin + static_cast<int>(static_cast<i64>(all) * (chunk + 1) / args.chunks);

  const int g = lane() / 4, t = lane() % 4;
  const int m0 = warp() / kSplit * 16 * kM, n0 = warp() % kSplit * kWarpKeys;
  float o[kM][kOut / 8][4], max[kM][2], sum[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) o[m][j][r] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) max[m][h] = -kInf, sum[m][h] = 0;
  }

  if (from < to) {
    load_q();
    load_keys(k, k_base, p.k_step, from * kKeys, p.D, p.vector_k);
    copy_commit();
  }
#pragma unroll 1
  for (int step = from; step < to; ++step) {
    const int key = step * kKeys, hide = opaque(0);
    copy_wait<0>();
    block_sync(kAttentionThreads);  // K is here, V is free
    load_keys(v, v_base + columns * p.v_step.col, p.v_step, key, width, p.vector_v);
    copy_commit();
    float s[kM][2 * kN][4];
    score_product<T>(s, q, m0, k, n0, p.D, p.parts);
    if constexpr (sizeof(T) == 4) repair_scores(s, q, m0, k, n0, p.D);
    copy_wait<0>();
    block_sync(kAttentionThreads);  // V is here, K is free
    if (step + 1 < to) load_keys(k, k_base, p.k_step, key + kKeys, p.D, p.vector_k);
    copy_commit();

    const bool edge = count - first < kRows || is_edge(p, span, i_first, i_last, key, key + kKeys);
    float rescale[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = hide + m0 + 16 * m + 8 * h + g, i = row_of(r), j0 = key + n0 + 2 * t;
        const bool real = first + r < count;
        const int see_begin = max_of(0, i + p.lo + span.offset);
        const int see_end = real ? min_of(span.Lk, i + p.hi + span.offset + 1) : 0;
        if (!p.plain) {
          const char* const mask = mask_row(p, span.batch, head_of(r), i);
#pragma unroll
          for (int n = 0; n < 4 * kN; ++n) {
            const int j = j0 + n / 2 * 8 + n % 2;
            float x = s[m][n / 2][2 * h + n % 2] * p.scale;
            if (p.softcap > 0) x = p.softcap * tanh_of(x * p.inverse_softcap);
            if (p.mask_item != 0 && j >= see_begin && j < see_end) x = masked<T>(p, mask, j, x);
            s[m][n / 2][2 * h + n % 2] = x;
          }
        }
        float highest = -kInf;
#pragma unroll
        for (int n = 0; n < 4 * kN; ++n) {
          float& x = s[m][n / 2][2 * h + n % 2];
          const int j = j0 + n / 2 * 8 + n % 2;
          if (edge && (j < see_begin || j >= see_end)) x = -kInf;
          if (x > highest) highest = x;
        }
        highest = warp_max<4>(highest);
        const float old = max[m][h];
        highest = highest > old ? highest : old;
        const float base = highest > -kLargest ? highest : -kLargest;  // nothing seen: -Inf less this is -Inf
        rescale[m][h] = exp2_approx((old - base) * p.factor);
        max[m][h] = highest;
        u64 row_key = 0;
        if (p.threshold) row_key = dropout_row_key(p.seed, span.sequence, head_of(r), i);
        float total = 0;
#pragma unroll
        for (int n = 0; n < 4 * kN; ++n) {
          float& x = s[m][n / 2][2 * h + n % 2];
          x = exp2_approx(fma_rn(x - base, p.factor, static_cast<float>(kLift<T>)));
          total += x;
          if (p.threshold && is_dropped(p, row_key, j0 + n / 2 * 8 + n % 2)) x = 0;
        }
        sum[m][h] = fma_rn(sum[m][h], rescale[m][h], total);
      }

    if constexpr (sizeof(T) == 4) {  // the P before was read before the first barrier of this step
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) memory[sum_row(r) * kWarpKeys + 8 * n + sum_col(r)] = s[0][n][r];
    }
    Fragment<parts> pf[kM][kN];
#pragma unroll
    for (int m = 0; m < kM; ++m) fragments_of<T, kN>(pf[m], s[m]);
#pragma unroll
    for (int d = 0; d < kOut; d += 16) {
      if (d >= width) break;
      const int at = opaque(n0);
      float x[kM][2][4] = {};
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        Fragment<parts> y;
        load_b_transposed(&y, v, at + 16 * j, d);
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_add<T>(x[m][0], x[m][1], pf[m][j], y, p.parts);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (sizeof(T) == 4) repair_values(x[m], memory, kWarpKeys, v, n0, d);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          float& sum_of = o[m][d / 8 + r / 4][r % 4];
          sum_of = fma_rn(sum_of, rescale[m][r % 4 / 2], x[m][r / 4][r % 4]);
        }
      }
    }
  }
  // Nothing is in flight: the last step waited for V, and no K came after it.

  const i64 rows = static_cast<i64>(p.B) * p.H * p.Lq;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = warp_sum<4>(sum[m][h]);
      const int r = m0 + 16 * m + 8 * h + g;
      if (first + r >= count) continue;
      const int head = head_of(r), i = span.q_begin + row_of(r);
      const i64 row = (static_cast<i64>(span.batch) * p.H + head) * p.Lq + i;
      if (args.slots > 1) {
        float* const part = args.parts + ((chunk * kSplit + warp() % kSplit) * rows + row) * (p.Dv + 2);
        if (t == 0 && columns == 0) part[0] = max[m][h], part[1] = total;
#pragma unroll
        for (int j = 0; j < kOut / 8; ++j) {
          if (8 * j >= width) break;
          store_two(part + 2 + columns, 8 * j + 2 * t, width, o[m][j][2 * h], o[m][j][2 * h + 1]);
        }
        continue;
      }
      T* const out = static_cast<T*>(args.out) + span.batch * args.out_step.batch + head * args.out_step.head +
                     i * args.out_step.row + columns;
      const bool seen = !(total == 0);
      const float factor = p.keep_factor / total;
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j) {
        if (8 * j >= width) break;
        store_two(out, 8 * j + 2 * t, width, seen ? o[m][j][2 * h] * factor : 0.0f,
                  seen ? o[m][j][2 * h + 1] * factor : 0.0f);
      }
      if (args.lse && t == 0 && columns == 0) store_lse<T>(p, max[m][h], total, args.lse + 2 * row);
    }
}

// out and lse of rows whose keys were cut into pieces: a warp a row, the pieces in order.
template <class T>
FASTDL_GLOBAL(kAttentionThreads, 1)
attention_combine_kernel(FASTDL_PARAM CudaAttentionArgs args) {
  const CudaAttentionProblem& p = args.p;
  const i64 rows = static_cast<i64>(p.B) * p.H * p.Lq;
  const i64 row = static_cast<i64>(block_x()) * kAttentionWarps + warp();
  if (row >= rows) return;
  const i64 step = rows * (p.Dv + 2);
  const float* const parts = args.parts + row * (p.Dv + 2);
  float highest = -kInf, total = 0;
  for (int s = 0; s < args.slots; ++s)
    if (parts[s * step] > highest) highest = parts[s * step];
  const float base = highest > -kLargest ? highest : -kLargest;
  for (int s = 0; s < args.slots; ++s) total += parts[s * step + 1] * exp2_approx((parts[s * step] - base) * p.factor);
  T* const out = static_cast<T*>(args.out) + row / p.Lq / p.H * args.out_step.batch +
                 row / p.Lq % p.H * args.out_step.head + row % p.Lq * args.out_step.row;
  for (int d = lane(); d < p.Dv; d += kWarp) {
    float x = 0;
    for (int s = 0; s < args.slots; ++s)
      if (!(parts[s * step + 1] == 0))
        x = fma_rn(parts[s * step + 2 + d], exp2_approx((parts[s * step] - base) * p.factor), x);
    out[d] = from_float<T>(total == 0 ? 0.0f : x * (p.keep_factor / total));
  }
  if (args.lse && lane() == 0) store_lse<T>(p, highest, total, args.lse + 2 * row);
}

}  // namespace fastdl
