// What the backward pass of attention does between its products, written once over a vector level L (simd/vec.h).
#pragma once
#include "attention/cpu/kernel.h"

namespace fastdl {
namespace {

// How the products read P' and dS: rows of float32.
template <class L>
struct FloatGrads {
  static constexpr int rows = 1;
  using V = typename L::V;
  static FASTDL_INLINE void store_p(const SoftmaxGradArgs& t, int i, i64 j, const V (&p)[1]) {
    L::store(t.p + i * t.scores.s_row + j, p[0]);
  }
  static FASTDL_INLINE void store_ds(const SoftmaxGradArgs& t, int i, i64 j, const V (&ds)[1]) {
    L::store(t.ds + i * t.scores.s_row + j, ds[0]);
  }
};

// Pairs along the rows, for products that sum over queries; dS also along the columns, for the one that sums over keys.
template <class L>
struct PairGrads {
  static constexpr int rows = 2;
  using V = typename L::V;
  static FASTDL_INLINE void store_p(const SoftmaxGradArgs& t, int i, i64 j, const V (&p)[2]) {
    L::store(t.p + i / 2 * t.scores.s_row + j, L::narrow_pair(p[0], p[1]));
  }
  static FASTDL_INLINE void store_ds(const SoftmaxGradArgs& t, int i, i64 j, const V (&ds)[2]) {
    L::store(t.ds + i / 2 * t.scores.s_row + j, L::narrow_pair(ds[0], ds[1]));
    L::narrow_pairs(reinterpret_cast<bf16*>(t.ds_rows + i * t.rows_step) + j, ds[0]);
    if (i + 1 < t.scores.m) L::narrow_pairs(reinterpret_cast<bf16*>(t.ds_rows + (i + 1) * t.rows_step) + j, ds[1]);
  }
};

// x in lanes whose column j + lane lies in [first, last), else 0, whatever x is.
template <class L>
FASTDL_INLINE typename L::V within(typename L::V x, i64 j, i64 first, i64 last) {
  using Bits = typename Lanes32<L::width>::V;
  Bits column;
  for (unsigned l = 0; l < L::width; ++l) column[l] = l;
  column += static_cast<unsigned>(j);
  const Bits from = column >= static_cast<unsigned>(first), to = column < static_cast<unsigned>(last);
  Bits bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits &= from & to;
  __builtin_memcpy(&x, &bits, sizeof bits);
  return x;
}

// See SoftmaxGradArgs.
template <class L, class Out, class Mask>
void softmax_grad(const SoftmaxGradArgs& t) {
  constexpr int W = L::width, R = Out::rows;
  constexpr bool kMask = !is_same<Mask, NoMask>, kBoolean = is_same<Mask, std::uint8_t>;
  using V = typename L::V;
  const SoftmaxArgs& f = t.scores;
  const auto scale = L::set1(f.scale), log2e = L::set1(kLog2E), lowest = L::set1(-kInfinity);
  const auto cap = L::set1(f.softcap), factor = L::set1(t.factor), ds_scale = L::set1(t.scale);
  const bool dropout = f.dropout.threshold != 0, capped = f.softcap > 0;

  for (int i = 0; i < t.rows; i += R) {
    for (int r = i; r < i + R && r < t.rows; ++r) start_products(f.ahead, r, t.rows);
    i64 first[R], last[R];
    V lse[R], rest[R], delta[R];
    std::uint64_t key[R];
    for (int r = 0; r < R; ++r) {
      const i64 row = i + r;
      const bool dead = row >= f.m || t.lse[2 * row] == -kInfinity;
      first[r] = dead ? 0 : clamped(f.see_begin + row, f.begin, f.end);
      last[r] = dead ? 0 : clamped(f.see_end + row, first[r], f.end);
      lse[r] = L::set1(dead ? 0.0f : t.lse[2 * row]);
      rest[r] = L::set1(dead ? 0.0f : -kLog2E * t.lse[2 * row + 1]);
      delta[r] = L::set1(dead || !t.g ? 0.0f : t.delta[row]);
      key[r] = dropout ? dropout_row_key(f.dropout.seed, f.dropout.batch, f.dropout.head, f.dropout.row + row) : 0;
    }
    for (i64 j = 0; j < t.stop; j += W) {
      V p[R], ds[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const i64 row = i + r;
        p[r] = ds[r] = L::zero();
        if (j + W <= first[r] || j >= last[r]) continue;
        const auto s = L::load(f.s + row * f.s_row + j);
        auto slope = L::set1(1.0f);
        V x, y = L::zero();
        if (kMask || capped) {
          x = L::mul(s, scale);
          if (capped) {
            const auto h = tanh<L>(L::div(x, cap));
            x = L::mul(cap, h);
            slope = L::sub(slope, L::mul(h, h));
          }
          if constexpr (kMask) {
            const Mask* const mask = static_cast<const Mask*>(f.mask) + row * f.mask_row;
            y = load_mask<L>(mask + j * f.mask_col, f.mask_col, f.n - j);
            x = kBoolean ? L::select_le_zero(y, lowest, x) : L::add(x, y);
          }
          x = L::sub(x, lse[r]);
        } else {
          x = L::fma(s, scale, L::sub(L::zero(), lse[r]));
        }
        p[r] = exp2_falling<L>(L::fma(x, log2e, rest[r]));
        if (t.g) {
          auto g = L::load(t.g + row * f.s_row + j);
          if (dropout) g = L::mul(drop<L>(g, key[r], f.dropout.col + j, f.dropout.threshold), factor);
          ds[r] = L::mul(L::mul(p[r], L::sub(g, delta[r])), ds_scale);
          if (capped && t.capped) ds[r] = L::mul(ds[r], slope);
          if (kBoolean) ds[r] = L::select_le_zero(y, L::zero(), ds[r]);
        }
        if (dropout) p[r] = L::mul(drop<L>(p[r], key[r], f.dropout.col + j, f.dropout.threshold), factor);
        if (j < first[r] || j + W > last[r]) {
          p[r] = within<L>(p[r], j, first[r], last[r]);
          ds[r] = within<L>(ds[r], j, first[r], last[r]);
        }
      }
      if (t.p) Out::store_p(t, i, j, p);
      if (t.ds) Out::store_ds(t, i, j, ds);
    }
  }
}

// See DeltaArgs.
template <class L, class T>
void attention_delta(const DeltaArgs& t) {
  constexpr int W = L::width;
  for (i64 i = 0; i < t.m; ++i) {
    const T* const dout = static_cast<const T*>(t.dout) + i * t.dout_row;
    const T* const out = static_cast<const T*>(t.out) + i * t.out_row;
    auto sum = L::zero();
    for (int j = 0; j < t.dv; j += W) {
      const Lanes<L> lanes(t.dv - j);
      sum = L::fma(load_mask<L>(dout + j * t.dout_col, t.dout_col, t.dv - j), lanes.load(out + j), sum);
    }
    float sums[4];
    L::sum4(sum, sum, sum, sum, sums);
    t.delta[i] = sums[0];
  }
}

template <class L, class Out, class T>
constexpr AttentionGradOps attention_grad_ops() {
  using Rows = FloatGrads<L>;
  return {{softmax_grad<L, Out, NoMask>, softmax_grad<L, Out, std::uint8_t>, softmax_grad<L, Out, float>,
           softmax_grad<L, Out, T>},
          {nullptr, nullptr, softmax_grad<L, Rows, float>, softmax_grad<L, Rows, T>},
          attention_delta<L, T>,
          nullptr};
}

}  // namespace
}  // namespace fastdl
