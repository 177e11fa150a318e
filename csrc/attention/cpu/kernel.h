// The softmax and the last step of attention, written once over a vector level L (simd/vec.h).
#pragma once
#include "attention/cpu/kernel_args.h"
#include "attention/cpu/kernel_dropout.h"
#include "gemm/cpu/kernel.h"

namespace fastdl {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_inff(), kMaxFloat = 3.402823466e38f;

// 2^x for x <= 0 (or a rounding error above): 2^n (1 + f q(f)), n = round(x), |f| <= 1/2; minimax by Lawson's
// iteration, relative error 2e-8, exactly 1 at 0.
template <class L>
FASTDL_INLINE typename L::V exp2_falling(typename L::V x) {
  x = L::max(L::set1(-150.0f), x);
  const auto n = L::round(x);
  const auto f = L::sub(x, n);
  auto p = L::set1(0.0001535336196f);
  p = L::fma(p, f, L::set1(0.001339887385f));
  p = L::fma(p, f, L::set1(0.009618436918f));
  p = L::fma(p, f, L::set1(0.05550332367f));
  p = L::fma(p, f, L::set1(0.2402264774f));
  p = L::fma(p, f, L::set1(0.6931471825f));
  p = L::fma(p, f, L::set1(1.0f));
  return L::scale(p, n);
}

// Of products ahead, those that the rows before row i + 1 of m have not started yet but should have.
FASTDL_INLINE void start_products(const ProductsAhead (&ahead)[2], int i, int m) {
  for (const ProductsAhead& a : ahead) {
    if (a.count == 0) continue;
    for (int j = a.count * i / m; j < a.count * (i + 1) / m; ++j) {
      TileArgs t = a.first;
      t.b = static_cast<const float*>(t.b) + j * a.b_step, t.c += j * a.first.n;
      if (j == a.count - 1) t.n = a.last_n;
      a.tile(t);
    }
  }
}

struct NoMask {};

// `lanes` consecutive elements of a mask row from p, step apart; zeros behind.
template <class L, class Mask>
FASTDL_INLINE typename L::V load_mask(const Mask* p, i64 step, i64 lanes) {
  constexpr int W = L::width;
  if (step == 1) return lanes >= W ? L::load(p) : L::load(p, L::first(static_cast<int>(lanes)));
  float x[W] = {};
  for (int l = 0; l < W && l < lanes; ++l) x[l] = widen(p[l * step]);
  return L::load(x);
}

// What the products after the softmax read: float32, or bf16 from the start of the row.
template <class L>
struct FloatRows {
  static FASTDL_INLINE void store(float* row, i64 j, typename L::V v) { L::store(row + j, v); }
};
template <class L>
struct PairRows {
  static FASTDL_INLINE void store(float* row, i64 j, typename L::V v) {
    L::narrow_pairs(reinterpret_cast<bf16*>(row) + j, v);
  }
};

// Lane i: the reduction of rows[i] over its lanes, by a tree over the transposed rows.
template <class L, class Op>
FASTDL_INLINE typename L::V reduce_rows(typename L::V (&rows)[L::width], const Op& op) {
  L::transpose(rows);
#pragma GCC unroll 4
  for (int step = L::width / 2; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) rows[i] = op(rows[i], rows[i + step]);
  return rows[0];
}

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

// p where element j + lane of the row is kept, else 0. x & 0 also drops NaN: dropped elements of P count for nothing.
template <class L>
FASTDL_INLINE typename L::V drop(typename L::V p, std::uint64_t key, i64 j, std::uint64_t threshold) {
  using Bits = typename Lanes32<L::width>::V;
  if (threshold > 0xffffffffu) return L::zero();
  Bits column;
  for (unsigned l = 0; l < L::width; ++l) column[l] = l;
  column += static_cast<unsigned>(j);
  const Bits kept = dropout_bits<L::width>(key, column) >= static_cast<unsigned>(threshold);
  Bits bits;
  __builtin_memcpy(&bits, &p, sizeof bits);
  bits &= kept;
  __builtin_memcpy(&p, &bits, sizeof bits);
  return p;
}

FASTDL_INLINE i64 clamped(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }

// See SoftmaxArgs. Mask: NoMask, std::uint8_t (boolean), or what is added.
template <class L, class Rows, class Mask>
void softmax(const SoftmaxArgs& t) {
  constexpr int W = L::width;
  constexpr bool kMask = !is_same<Mask, NoMask>, kBoolean = is_same<Mask, std::uint8_t>;
  using V = typename L::V;
  const bool plain = !kMask && t.plain;
  const auto lowest = L::set1(-kInfinity);
  const auto factor = L::set1(plain ? t.scale * kLog2E : kLog2E);

  for (int group = 0; group < t.m; group += W) {
    const int rows = t.m - group < W ? t.m - group : W;
    i64 from[W], to[W];  // whole vectors that hold what a row sees
    V r[W];
    for (int i = 0; i < W; ++i) {
      r[i] = lowest;
      if (i >= rows) continue;
      const i64 row = group + i;
      const i64 first = clamped(t.see_begin + row, t.begin, t.end), last = clamped(t.see_end + row, first, t.end);
      from[i] = first / W * W, to[i] = first == last ? from[i] : (last + W - 1) / W * W;
      float* const s = t.s + row * t.s_row;
      if (kMask || !plain) {
        for (i64 j = from[i]; j < to[i]; j += W) {
          auto x = L::mul(L::load(s + j), L::set1(t.scale));
          if (t.softcap > 0) x = L::mul(L::set1(t.softcap), tanh<L>(L::div(x, L::set1(t.softcap))));
          if constexpr (kMask) {
            const Mask* const mask = static_cast<const Mask*>(t.mask) + row * t.mask_row + j * t.mask_col;
            const auto y = load_mask<L>(mask, t.mask_col, t.n - j);
            x = kBoolean ? L::select_le_zero(y, lowest, x) : L::add(x, y);
          }
          L::store(s + j, x);
          r[i] = L::max(x, r[i]);
        }
        if (first == from[i] && last == to[i]) continue;
        r[i] = lowest;
      }
      for (i64 j = from[i]; j < first; ++j) s[j] = -kInfinity;
      for (i64 j = last; j < to[i]; ++j) s[j] = -kInfinity;
      for (i64 j = from[i]; j < to[i]; j += W) r[i] = L::max(L::load(s + j), r[i]);
    }
    auto highest = reduce_rows<L>(r, [](V a, V b) __attribute__((always_inline)) { return L::max(a, b); });

    float shift[W], rescale[W];
    const auto old = t.first ? lowest : L::load(t.max + group);
    highest = L::max(old, highest);
    const auto base = L::max(L::set1(-kMaxFloat), highest);  // where nothing is seen yet: -Inf minus this is -Inf
    const auto correction = exp2_falling<L>(L::mul(L::sub(old, base), factor));
    L::store(t.max + group, highest);
    L::store(shift, base);
    L::store(rescale, correction);

    for (int i = 0; i < rows; ++i) {
      const i64 row = group + i;
      start_products(t.ahead, static_cast<int>(row), t.m);
      const float* const s = t.s + row * t.s_row;
      float* const out = t.p + row * t.p_row;
      const auto x0 = L::set1(shift[i]);
      const std::uint64_t key =
          t.dropout.threshold ? dropout_row_key(t.dropout.seed, t.dropout.batch, t.dropout.head, t.dropout.row + row)
                              : 0;
      r[i] = L::zero();
      for (i64 j = from[i]; j < to[i]; j += W) {
        const auto x = L::load(s + j);
        auto p = exp2_falling<L>(L::mul(L::sub(x, x0), factor));
        r[i] = L::add(r[i], p);
        if (t.dropout.threshold) p = drop<L>(p, key, t.dropout.col + j, t.dropout.threshold);
        Rows::store(out, j, p);
      }
      for (i64 j = t.begin; j < from[i]; j += W) Rows::store(out, j, L::zero());
      for (i64 j = to[i]; j < t.stop; j += W) Rows::store(out, j, L::zero());
      if (t.first || rescale[i] == 1.0f) continue;
      float* const o = t.o + row * t.o_row;
      const auto c = L::set1(rescale[i]);
      for (int j = 0; j < t.dv; j += W) L::store(o + j, L::mul(L::load(o + j), c));
    }
    for (int i = rows; i < W; ++i) r[i] = L::zero();
    auto sum = reduce_rows<L>(r, [](V a, V b) __attribute__((always_inline)) { return L::add(a, b); });
    if (!t.first) sum = L::fma(L::load(t.sum + group), correction, sum);
    L::store(t.sum + group, sum);
  }
}

// See AttentionFinishArgs.
template <class L, class T>
void attention_finish(const AttentionFinishArgs& t) {
  for (int i = 0; i < t.m; ++i) {
    const bool seen = !(t.sum[i] == 0.0f);
    const auto factor = L::set1(seen ? t.factor / t.sum[i] : 0.0f);
    T* const out = static_cast<T*>(t.out) + i * t.out_row;
    for (int j = 0; j < t.dv; j += L::width) {
      const Lanes<L> lanes(t.dv - j);
      lanes.store(out + j, seen ? L::mul(lanes.load(t.o + i * t.o_row + j), factor) : L::zero());
    }
  }
}

// Keys that stay in L1 while all rows (and columns of V) pass over them. (32/8 heads, D 128, kv 4096, 2 threads of
// Zen 4, where 4 products a vector read allow 117 GB/s: horizontal sums by sum4, masked loads and a softmax a head gave
// 41 GB/s in float32 and 55 in bf16; sum4x4, plain loads, one softmax a chunk and twice the keys for bf16 48 and 71.)
constexpr int kDecodeKeys = 32;
// Bytes of K or V to prefetch ahead: pages end too soon for the processor's own prefetching.
constexpr i64 kDecodeAhead = 16384;

// From an element to the one so many bytes ahead, in rows of `count` elements that are `step` apart.
template <class T>
FASTDL_INLINE i64 decode_ahead(i64 step, int count) {
  return (kDecodeAhead / (count * static_cast<i64>(sizeof(T))) + 1) * step;
}

// The cache lines of `count` elements, in rising order: that is what the processor's prefetching continues.
template <class T>
FASTDL_INLINE void prefetch_row(const T* p, int count) {
  for (int i = 0; i < count; i += static_cast<int>(64 / sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// s(i,:) = the sums over the lanes of acc(i,:).
template <class L, int MR>
FASTDL_INLINE void decode_sums(const typename L::V (&acc)[MR][4], float* s, i64 s_row) {
  if constexpr (MR == 4) {
    L::sum4x4(acc, s, s_row);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) L::sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], s + i * s_row);
  }
}

template <class L, class T, int MR>
void decode_scores_rows(const DecodeScoresArgs& t, int row, int begin, int end) {
  constexpr int W = L::width, NR = 4, kRun = 16 * W;
  const T* const q = static_cast<const T*>(t.q) + row * t.q_row;
  float* const s = t.s + row * t.s_row;
  const i64 ahead = decode_ahead<T>(t.k_row, t.d);
  for (int j = begin; j < end; j += NR) {
    const T* k[NR];
    for (int l = 0; l < NR; ++l) k[l] = static_cast<const T*>(t.k) + (j + l < t.n ? j + l : t.n - 1) * t.k_row;
    if (row == 0) {
      for (int l = 0; l < NR; ++l) prefetch_row(k[l] + ahead, t.d);
    }
    typename L::V acc[MR][NR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < NR; ++l) acc[i][l] = L::zero();
    const auto step = [&](auto load) __attribute__((always_inline)) {
      typename L::V x[NR];
#pragma GCC unroll 4
      for (int l = 0; l < NR; ++l) x[l] = load(k[l]);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const auto y = load(q + i * t.q_row);
#pragma GCC unroll 4
        for (int l = 0; l < NR; ++l) acc[i][l] = L::fma(y, x[l], acc[i][l]);
      }
    };
    int d = 0;
    const auto run = [&](int last) __attribute__((always_inline)) {
      for (; d + W <= last; d += W) {
        step([&](const T* p) __attribute__((always_inline)) { return L::load(p + d); });
      }
      if (d < last) {
        const auto mask = L::first(last - d);
        step([&](const T* p) __attribute__((always_inline)) { return L::load(p + d, mask); });
      }
    };
    run(t.d < kRun ? t.d : kRun);
    decode_sums<L>(acc, s + j, t.s_row);
    for (int first = kRun; first < t.d; first += kRun) {  // a lane sums 16 terms: few lanes do not mean large errors
      float more[MR * NR];
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int l = 0; l < NR; ++l) acc[i][l] = L::zero();
      d = first;
      run(t.d - first < kRun ? t.d : first + kRun);
      decode_sums<L>(acc, more, NR);
      for (int i = 0; i < MR; ++i)
        for (int l = 0; l < NR; ++l) s[i * t.s_row + j + l] += more[i * NR + l];
    }
  }
}

// See DecodeScoresArgs. Registers: 4 MR sums + 4 of K + 1 of Q.
template <class L, class T, int MR>
void decode_scores(const DecodeScoresArgs& t) {
  for (int begin = 0; begin < t.n; begin += kDecodeKeys) {
    const int end = begin + kDecodeKeys < t.n ? begin + kDecodeKeys : t.n;
    int row = 0;
    for (; row + MR <= t.m; row += MR) decode_scores_rows<L, T, MR>(t, row, begin, end);
    if constexpr (MR > 2) {
      if (row + 2 <= t.m) decode_scores_rows<L, T, 2>(t, row, begin, end), row += 2;
    }
    if (row < t.m) decode_scores_rows<L, T, 1>(t, row, begin, end);
  }
}

template <class L, class T, int MR, int NV>
FASTDL_INLINE void decode_values_tile(const DecodeValuesArgs& t, int row, int column, int begin, int end) {
  constexpr int W = L::width;
  const int left = t.dv - column;
  const bool tail = left < NV * W;
  const i64 ahead = decode_ahead<T>(t.v_row, t.dv);
  const auto mask = L::first(tail ? left - (NV - 1) * W : W);
  float* const o = t.o + row * t.o_row + column;
  typename L::V acc[MR][NV];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = L::zero();
  const auto run = [&](auto load_last) __attribute__((always_inline)) {
    for (int j = begin; j < end; ++j) {
      const T* const p = static_cast<const T*>(t.v) + j * t.v_row + column;
      if (row == 0 && column == 0) prefetch_row(p + ahead, t.dv);
      typename L::V x[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) x[v] = v == NV - 1 ? load_last(p + v * W) : L::load(p + v * W);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const auto y = L::set1(t.p[(row + i) * t.p_row + j]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = L::fma(y, x[v], acc[i][v]);
      }
    }
  };
  if (tail) {
    run([&](const T* p) __attribute__((always_inline)) { return L::load(p, mask); });
  } else {
    run([](const T* p) __attribute__((always_inline)) { return L::load(p); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {  // blocks of keys are summed apart: half the rounding of one long sum
      float* const to = o + i * t.o_row + v * W;
      L::store(to, begin == 0 ? acc[i][v] : L::add(L::load(to), acc[i][v]));
    }
}

template <class L, class T, int MR, int NV>
void decode_values_rows(const DecodeValuesArgs& t, int row, int begin, int end) {
  constexpr int W = L::width;
  int column = 0;
  for (; column + (NV - 1) * W < t.dv; column += NV * W) decode_values_tile<L, T, MR, NV>(t, row, column, begin, end);
  if constexpr (NV > 1) {
    for (; column < t.dv; column += W) decode_values_tile<L, T, MR, 1>(t, row, column, begin, end);
  }
}

// See DecodeValuesArgs. Registers: MR NV sums + NV of V + 1 of P.
template <class L, class T, int MR, int NV>
void decode_values(const DecodeValuesArgs& t) {
  for (int begin = 0; begin < t.n; begin += kDecodeKeys) {
    const int end = begin + kDecodeKeys < t.n ? begin + kDecodeKeys : t.n;
    int row = 0;
    for (; row + MR <= t.m; row += MR) decode_values_rows<L, T, MR, NV>(t, row, begin, end);
    for (; row < t.m; ++row) decode_values_rows<L, T, 1, NV>(t, row, begin, end);
  }
}

// See DecodeCombineArgs.
template <class L>
void decode_combine(const DecodeCombineArgs& t) {
  constexpr int W = L::width;
  float highest = -kInfinity;
  for (i64 c = 0; c < t.chunks; ++c) highest = t.max[c * t.row_step] > highest ? t.max[c * t.row_step] : highest;
  const float base = highest < -kMaxFloat ? -kMaxFloat : highest;
  float sum = 0;
  for (i64 c = 0; c < t.chunks; ++c) {
    float factor[W];
    const auto x = L::mul(L::set1(t.max[c * t.row_step] - base), L::set1(t.factor * kLog2E));
    const auto y = exp2_falling<L>(x);
    L::store(factor, y);
    sum += t.sum[c * t.row_step] * factor[0];
    for (int j = 0; j < t.dv; j += W) {
      const auto part = L::mul(L::load(t.o + c * t.o_step + j), y);
      L::store(t.o + j, c == 0 ? part : L::add(L::load(t.o + j), part));
    }
  }
  *t.max = highest, *t.sum = sum;
}

// kDecodeRows x kDecodeVectors: the sums that decode keeps in registers.
template <class L, class Rows, class T, int kDecodeRows, int kDecodeVectors>
constexpr AttentionOps attention_ops() {
  return {decode_scores<L, T, kDecodeRows>,
          decode_values<L, T, kDecodeRows, kDecodeVectors>,
          decode_combine<L>,
          {softmax<L, Rows, NoMask>, softmax<L, Rows, std::uint8_t>, softmax<L, Rows, float>, softmax<L, Rows, T>},
          attention_finish<L, T>};
}

}  // namespace
}  // namespace fastdl
