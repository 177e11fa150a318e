// What the attention kernels share: where rows lie, tiles out of global memory, scores after their product.
#pragma once
#include "attention/cuda/kernel_problem.h"
#include "attention/kernel_random.h"
#include "gemm/cuda/kernel_tile.cuh"
#include "ptx/barrier.cuh"
#include "ptx/launch.h"

namespace fastdl {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarp;
constexpr float kLog2OfE = 1.44269504f, kLargest = 3.402823466e38f, kInf = __builtin_inff();

template <class T>
constexpr bool kIsF16 = false;
template <>
constexpr bool kIsF16<f16> = true;
// Parts of an operand: three bf16 hold a float32, six products keep its accuracy (the bound of a score is (D + 8) units
// in the last place of float32, and that of a sum over P V so many as there are keys: two parts, 2^-16, are too few).
template <class T>
constexpr int kPartsOf = sizeof(T) == 4 ? 3 : 1;
// P is stored times 2^kLift: float16 has no room below 2^-14, and plenty above 1. It cancels against the sum.
template <class T>
constexpr int kLift = kIsF16<T> ? 14 : 0;

FASTDL_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
FASTDL_DEVICE int max_of(int a, int b) { return a > b ? a : b; }
FASTDL_DEVICE int clamp_of(int x, int low, int high) { return min_of(max_of(x, low), high); }

// --- which rows
// One sequence of the batch.
struct CudaSpan {
  int sequence, batch;  // batch: 0 where the sequences lie in one
  int q_begin, k_begin, Lq, Lk;
  int offset;  // the corner that j - i counts from
};

FASTDL_DEVICE CudaSpan span_of(const CudaAttentionProblem& p, int sequence) {
  CudaSpan s = {sequence, sequence, 0, 0, p.Lq, p.Lk, 0};
  if (p.seq_q) {  // offsets that are not what they should be read nothing outside
    s.batch = 0;
    s.q_begin = clamp_of(p.seq_q[sequence], 0, p.Lq), s.k_begin = clamp_of(p.seq_k[sequence], 0, p.Lk);
    s.Lq = clamp_of(p.seq_q[sequence + 1], s.q_begin, p.Lq) - s.q_begin;
    s.Lk = clamp_of(p.seq_k[sequence + 1], s.k_begin, p.Lk) - s.k_begin;
  }
  if (p.align_end) s.offset = s.Lk - s.Lq;
  return s;
}

// Packed sequences are cut into tiles of `rows` rows (queries times `pack`, or keys), one sequence after the other:
// *tile of them all becomes that of a sequence, which is returned; -1 behind the last. Called by whole warps.
FASTDL_DEVICE int find_sequence(const CudaAttentionProblem& p, bool keys, int rows, int pack, int* tile) {
  int before = 0;
  for (int begin = 0; begin < p.sequences; begin += kWarp) {
    const int s = begin + lane();
    int count = 0;
    if (s < p.sequences) {
      const CudaSpan span = span_of(p, s);
      count = ((keys ? span.Lk : span.Lq * pack) + rows - 1) / rows;
    }
    int end = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int y = shuffle(end, (lane() - step) & (kWarp - 1));
      if (lane() >= step) end += y;
    }
    const int total = shuffle(end, kWarp - 1);
    if (*tile < before + total) {
      const u32 behind = ballot(before + end > *tile);
      int found = 0;
      while (!(behind >> found & 1)) ++found;
      *tile -= before + shuffle(end - count, found);
      return begin + found;
    }
    before += total;
  }
  return -1;
}

// Keys that rows [first, last] see, cut to those that exist; queries that see keys [first, last] likewise.
struct CudaRange {
  int begin, end;
};
FASTDL_DEVICE CudaRange keys_seen(const CudaAttentionProblem& p, const CudaSpan& s, int first, int last) {
  return {clamp_of(first + p.lo + s.offset, 0, s.Lk), clamp_of(last + p.hi + s.offset + 1, 0, s.Lk)};
}
FASTDL_DEVICE CudaRange queries_seeing(const CudaAttentionProblem& p, const CudaSpan& s, int first, int last) {
  return {clamp_of(first - p.hi - s.offset, 0, s.Lq), clamp_of(last - p.lo - s.offset + 1, 0, s.Lq)};
}
// Whether some of the rows [first, last] do not see some of the keys [begin, end).
FASTDL_DEVICE bool is_edge(const CudaAttentionProblem& p, const CudaSpan& s, int first, int last, int begin, int end) {
  return end > s.Lk || last >= s.Lq || begin < last + p.lo + s.offset || end > first + p.hi + s.offset + 1;
}

// --- tiles
// A row of a matrix in global memory; of zeros unless `there`.
template <class T>
struct TileRow {
  const T* data;
  bool there;
};

// Rows source(0) ... of `width` elements that are `step` apart, zeros behind them to the next multiple of 16: by
// cp.async where `vector`, to be waited for, else an element at a time.
template <int rows, class Tile, class Source>
FASTDL_DEVICE void load_tile(const Tile& tile, const Source& source, int width, i64 step, bool vector) {
  using T = typename Tile::Element;
  constexpr int kChunk = Tile::chunk, kChunks = Tile::cols / kChunk, kSize = static_cast<int>(sizeof(T));
  const int stop = (width + 15) / 16 * 16;
#pragma unroll 1
  for (int c = thread_x(); c < rows * kChunks; c += kAttentionThreads) {
    const int row = c / kChunks, col = c % kChunks * kChunk;
    if (col >= stop) continue;
    const TileRow<T> from = source(row);
    if (vector) {
      copy_async<16>(tile.at(row, col), from.data + col, from.there ? clamp_of((width - col) * kSize, 0, 16) : 0);
    } else {
      Pack<T, kChunk> x = {};
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        if (from.there && col + e < width) x.x[e] = from.data[(col + e) * step];
      *reinterpret_cast<Pack<T, kChunk>*>(tile.at(row, col)) = x;
    }
  }
}

// --- scores
// Absolute error 2^-22, relative 2^-21.
FASTDL_DEVICE float tanh_of(float x) {
  const float a = x < 0 ? -x : x, y = x * x;
  if (a < 0.25f) {
    float s = fma_rn(y, 0.021869488f, -0.053968254f);
    s = fma_rn(s, y, 0.13333333f);
    s = fma_rn(s, y, -0.33333334f);
    return fma_rn(s * y, x, x);
  }
  const float r = 1 - 2 * reciprocal_approx(exp2_approx(a * (2 * kLog2OfE)) + 1);
  return x < 0 ? -r : r;
}

// Of row i, its column 0.
FASTDL_DEVICE const char* mask_row(const CudaAttentionProblem& p, int batch, int head, int i) {
  return static_cast<const char*>(p.mask) + batch * p.mask_step.batch + head * p.mask_step.head + i * p.mask_step.row;
}
// x with element j of a mask's row applied; -Inf where a boolean mask hides it.
template <class T>
FASTDL_DEVICE float masked(const CudaAttentionProblem& p, const char* row, int j, float x) {
  const char* const at = row + j * p.mask_step.col;
  if (p.mask_item == 1) return *at ? x : -kInf;
  if (sizeof(T) == 4 || p.mask_item == 4) return x + *reinterpret_cast<const float*>(at);
  return x + to_float(*reinterpret_cast<const T*>(at));
}

FASTDL_DEVICE bool is_dropped(const CudaAttentionProblem& p, u64 row_key, int column) {
  return dropout_hash(row_key, static_cast<u32>(column)) < p.threshold;
}

// Row m, column n of both out of shared memory, multiplied as float32: what products of parts of Inf do not give.
template <class TileA, class TileB>
FASTDL_DEVICE float exact_product(const TileA& a, int m, const TileB& b, int n, int depth) {
  float sum = 0;
#pragma unroll 1
  for (int d = 0; d < depth; ++d) sum = fma_rn(*a.at(m, d), *b.at(n, d), sum);
  return sum;
}

// multiply(), of float32 the products of its first `wanted` parts: 6, 3 or 1 of them, small ones first. They are added
// by an ordinary addition: a long chain of sums that are truncated costs several units in the last place (D = 200: 6 of
// lse instead of 1), four additions beside twelve mma nothing. `wanted` is a value, for one kernel serves all
// precisions: the parts themselves are made in any case.
template <class T, int parts>
FASTDL_DEVICE void multiply_add(float (&d0)[4], float (&d1)[4], const Fragment<parts>& a, const Fragment<parts>& b,
                                [[maybe_unused]] int wanted) {
  if constexpr (parts == 1) {
    multiply<T>(d0, d1, a, b);
  } else {
    float x0[4] = {}, x1[4] = {};
    const auto product = [&](int i, int j) {
      mma_16x8x16<bf16>(x0, a.x[i], {b.x[j][0], b.x[j][1]});
      mma_16x8x16<bf16>(x1, a.x[i], {b.x[j][2], b.x[j][3]});
    };
    if (wanted > 2) product(0, 2), product(1, 1), product(2, 0);
    if (wanted > 1) product(0, 1), product(1, 0);
    product(0, 0);
#pragma unroll
    for (int r = 0; r < 4; ++r) d0[r] += x0[r], d1[r] += x1[r];
  }
}

// S [16 kM, 8 kBlocks] = rows m.. of a times rows n.. of b, over `depth`.
template <class T, int kM, int kBlocks, class TileA, class TileB>
FASTDL_DEVICE void score_product(float (&s)[kM][kBlocks][4], const TileA& a, int m, const TileB& b, int n, int depth,
                                 int wanted) {
  constexpr int parts = kPartsOf<T>, kN = kBlocks / 2;
  [[maybe_unused]] constexpr int kSteps = parts == 1 ? 2 : 1;  // g++ does not read the pragma
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < 2 * kN; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) s[i][j][r] = 0;
#pragma unroll kSteps
  for (int k = 0; k < depth; k += 16) {
    Fragment<parts> x[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) load_a(&x[i], a, m + 16 * i, k);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      Fragment<parts> y;
      load_b(&y, b, k, n + 16 * j);
#pragma unroll
      for (int i = 0; i < kM; ++i) multiply_add<T>(s[i][2 * j], s[i][2 * j + 1], x[i], y, wanted);
    }
  }
}

// Products of parts give NaN where an operand is Inf: those scores of float32 are computed again by ordinary
// multiplications, one of a lane's registers at a time, for code that hardly ever runs is to be of few instructions.
template <int kBlocks, class TileA, class TileB>
FASTDL_DEVICE void repair_scores(float (&s)[1][kBlocks][4], const TileA& a, int m, const TileB& b, int n, int depth) {
  float all = 0;
#pragma unroll
  for (int e = 0; e < 4 * kBlocks; ++e) all += s[0][e / 4][e % 4] - s[0][e / 4][e % 4];
  if (!ballot(all != 0)) return;  // Inf less itself is NaN, and so not 0
#pragma unroll 1
  for (int at = 0; at < 4 * kBlocks; ++at) {
    float x = 0;
#pragma unroll
    for (int e = 0; e < 4 * kBlocks; ++e)
      if (e == at) x = s[0][e / 4][e % 4];
    if (!(x == x)) x = exact_product(a, m + sum_row(at % 4), b, n + at / 4 * 8 + sum_col(at % 4), depth);
#pragma unroll
    for (int e = 0; e < 4 * kBlocks; ++e)
      if (e == at) s[0][e / 4][e % 4] = x;
  }
}

// The A operands of sums [16, 16 kN]: as mma leaves them, its columns are the next product's K.
template <class T, int kN>
FASTDL_DEVICE void fragments_of(Fragment<kPartsOf<T>> (&f)[kN], const float (&s)[2 * kN][4]) {
#pragma unroll
  for (int j = 0; j < kN; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float low = s[2 * j + r / 2][r % 2 * 2], high = s[2 * j + r / 2][r % 2 * 2 + 1];
      if constexpr (sizeof(T) == 4) {
        split_pair(&f[j], r, low, high);
      } else {
        f[j].x[0][r] = pack2<T>(low, high);
      }
    }
}

// log x of a positive, normal x, to 1e-12: once a row, so float64 does not cost.
FASTDL_DEVICE double log_of(float x) {
  const u32 bits = float_bits(x);
  if (bits - 0x00800000u >= 0x7f000000u) return x;
  int exponent = static_cast<int>(bits >> 23) - 127;
  double m = 1 + static_cast<double>(bits & 0x7fffffu) / 8388608;
  if (m > 1.4142135) m /= 2, ++exponent;
  const double z = (m - 1) / (m + 1), y = z * z;
  double s = 1.0 / 17;
#pragma unroll 1
  for (int n = 15; n > 0; n -= 2) s = s * y + 1.0 / n;
  return exponent * 0.69314718055994530942 + 2 * z * s;
}

// See store_lse of the CPU: lse of a row rounded, and what rounding took from it.
template <class T>
FASTDL_DEVICE void store_lse(const CudaAttentionProblem& p, float max, float sum, float* lse) {
  lse[0] = -kInf, lse[1] = 0;
  if (sum == 0) return;
  const double a = static_cast<double>(max) * (p.plain ? p.scale : 1.0f);
  const double b = log_of(sum) - kLift<T> * 0.69314718055994530942;
  const double whole = a + b, part = whole - a, lost = (a - (whole - part)) + (b - part);
  lse[0] = static_cast<float>(whole);
  const double rest = (whole - static_cast<double>(lse[0])) + lost;
  if (rest - rest == 0) lse[1] = static_cast<float>(rest);
}

// Elements col and col + 1 of a row of `width`.
template <class T>
FASTDL_DEVICE void store_two(T* row, int col, int width, float a, float b) {
  if (col + 1 < width && reinterpret_cast<std::uintptr_t>(row + col) % (2 * sizeof(T)) == 0) {
    *reinterpret_cast<Pack<T, 2>*>(row + col) = {{from_float<T>(a), from_float<T>(b)}};
  } else {
    if (col < width) row[col] = from_float<T>(a);
    if (col + 1 < width) row[col + 1] = from_float<T>(b);
  }
}

}  // namespace fastdl
