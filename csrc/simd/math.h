// Elementwise functions over a vector level: exp, tanh, the logistic and normal distribution functions, activations.
// NaN goes through, and -Inf * 0 is NaN as in torch. Errors against float64 are asserted in the tests.
#pragma once
#include "simd/activation.h"
#include "simd/tables.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

// f(t) of a table (tables.h), t >= 0 or of either sign, as the table has it; NaN for NaN. Adding 1.5 * 2^23 leaves the
// interval's number in the lowest bits. (Granite Rapids, ns for 64 vectors of 16: GELU 375 by exp and a division, 180
// so; linear with it, bfloat16, 512 x 3072 x 768: 1.71 -> 1.45 ms.)
template <class L, class Table>
FASTDL_INLINE typename L::V piecewise(typename L::V t) {
  constexpr float kRound = 0x1.8p23f;
  constexpr float kEnd = Table::last * Table::step;
  t = L::min(L::set1(kEnd), t);
  if constexpr (Table::is_signed) t = L::max(L::set1(-kEnd), t);
  const auto at = L::fma(t, L::set1(1 / Table::step), L::set1(kRound));
  const auto u = L::fma(L::sub(at, L::set1(kRound)), L::set1(-Table::step), t);
  auto p = L::lookup(Table::coefficient[Table::degree], at);
#pragma GCC unroll 8
  for (int d = Table::degree - 1; d >= 0; --d) p = L::fma(p, u, L::lookup(Table::coefficient[d], at));
  return p;
}
template <class L>
FASTDL_INLINE typename L::V absolute(typename L::V x) {
  return L::max(L::sub(L::zero(), x), x);
}
// f(x) where f(x) + f(-x) = 1, from the table of f(-t).
template <class L, class Table>
FASTDL_INLINE typename L::V from_tail(typename L::V x) {
  const auto tail = piecewise<L, Table>(absolute<L>(x));
  return L::select_le_zero(x, tail, L::sub(L::set1(1.0f), tail));
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2: polynomial of degree 6 (minimax by Lawson's iteration,
// relative error 3e-9), reduction in two parts (Cody and Waite, 1980). Clamped where the result is Inf or 0 anyway.
template <class L>
FASTDL_INLINE typename L::V exp(typename L::V x) {
  x = L::min(L::set1(89.0f), L::max(L::set1(-104.0f), x));
  const auto n = L::round(L::mul(x, L::set1(1.44269504f)));
  auto r = L::fma(n, L::set1(-0.693359375f), x);
  r = L::fma(n, L::set1(2.12194440e-4f), r);
  auto p = L::set1(0.001381461275741458f);
  p = L::fma(p, r, L::set1(0.008368710055947304f));
  p = L::fma(p, r, L::set1(0.04166838899254799f));
  p = L::fma(p, r, L::set1(0.1666652113199234f));
  p = L::fma(p, r, L::set1(0.4999999403953552f));
  p = L::fma(p, r, L::set1(1.0f));
  p = L::fma(p, r, L::set1(1.0f));
  return L::scale(p, n);
}

// Whether results are bfloat16, which shows no relative error below 2^-9: coarser tables do.
constexpr bool is_coarse(bf16) { return true; }
constexpr bool is_coarse(f16) { return false; }
constexpr bool is_coarse(float) { return false; }

// 1 / (1 + exp(-x)), for results in T
template <class L, class T = float>
FASTDL_INLINE typename L::V logistic(typename L::V x) {
  if constexpr (L::looks_up && is_coarse(T{})) {
    return from_tail<L, NarrowLogisticTail>(x);
  } else if constexpr (L::looks_up) {
    return from_tail<L, LogisticTail>(x);
  } else {
    const auto one = L::set1(1.0f);
    return L::div(one, L::add(one, exp<L>(L::sub(L::zero(), x))));
  }
}

// tanh(x) = m / (m + 2), m = exp(2x) - 1 = 2^n p + (2^n - 1), p = exp(r) - 1 = r + r^2 q(r): nothing cancels, so the
// relative error stays below 3 * 2^-24 down to the smallest x. q has degree 4 (minimax by Lawson's iteration, 1.4e-8).
// Clamped where the result is 1 or -1 anyway.
template <class L>
FASTDL_INLINE typename L::V tanh_by_exp(typename L::V x) {
  x = L::min(L::set1(44.0f), L::max(L::set1(-44.0f), L::add(x, x)));
  const auto n = L::round(L::mul(x, L::set1(1.44269504f)));
  auto r = L::fma(n, L::set1(-0.693359375f), x);
  r = L::fma(n, L::set1(2.12194440e-4f), r);
  auto q = L::set1(0.0013882509665563703f);
  q = L::fma(q, r, L::set1(0.008366580121219158f));
  q = L::fma(q, r, L::set1(0.04166720062494278f));
  q = L::fma(q, r, L::set1(0.1666654348373413f));
  q = L::fma(q, r, L::set1(0.4999999701976776f));
  const auto p = L::fma(L::mul(r, r), q, r);
  const auto power = L::scale(L::set1(1.0f), n);
  const auto m = L::fma(power, p, L::sub(power, L::set1(1.0f)));
  return L::div(m, L::add(m, L::set1(2.0f)));
}

// For results in T; by the table of tanh(t) / t the relative error is below 3 * 2^-24, too; 1 at the end is rounded up.
template <class L, class T = float>
FASTDL_INLINE typename L::V tanh(typename L::V x) {
  if constexpr (L::looks_up && is_coarse(T{})) {
    return piecewise<L, NarrowTanh>(x);
  } else if constexpr (L::looks_up) {
    const auto y = L::mul(x, piecewise<L, TanhRatio>(absolute<L>(x)));
    return L::max(L::set1(-1.0f), L::min(L::set1(1.0f), y));
  } else {
    return tanh_by_exp<L>(x);
  }
}

// exp(-x^2 / 2), and Phi(x), the normal distribution function: Phi(-s) = t Q(t) exp(-s^2/2) with t = 1 / (1 + s/4) and
// Q of degree 8 (the form of Abramowitz and Stegun 7.1.26, refitted: relative error 6e-8).
template <class L>
FASTDL_INLINE void normal(typename L::V x, typename L::V* density, typename L::V* phi) {
  const auto one = L::set1(1.0f);
  const auto s = L::max(L::sub(L::zero(), x), x);
  const auto t = L::div(one, L::fma(s, L::set1(0.25f), one));
  auto q = L::set1(0.025723371654748917f);
  q = L::fma(q, t, L::set1(-0.1528088003396988f));
  q = L::fma(q, t, L::set1(0.29612088203430176f));
  q = L::fma(q, t, L::set1(-0.20578229427337646f));
  q = L::fma(q, t, L::set1(0.20175780355930328f));
  q = L::fma(q, t, L::set1(0.03292803093791008f));
  q = L::fma(q, t, L::set1(0.1037466749548912f));
  q = L::fma(q, t, L::set1(0.09851684421300888f));
  q = L::fma(q, t, L::set1(0.09979747980833054f));
  *density = exp<L>(L::mul(L::mul(s, s), L::set1(-0.5f)));
  const auto tail = L::mul(L::mul(q, t), *density);
  *phi = L::select_le_zero(x, tail, L::sub(one, tail));
}

constexpr float kGeluScale = 0.7978845608f, kGeluCube = 0.044715f;  // sqrt(2/pi); Hendrycks and Gimpel, 2016

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

template <class L, Activation kActivation>
FASTDL_INLINE typename L::V activate(typename L::V x) {
  if constexpr (kActivation == Activation::relu) {
    return L::max(L::zero(), x);
  } else if constexpr (kActivation == Activation::silu) {
    return L::mul(x, logistic<L>(x));
  } else if constexpr (kActivation == Activation::gelu) {
    if constexpr (L::looks_up) {
      return L::mul(x, from_tail<L, NormalTail>(x));
    } else {
      typename L::V density, phi;
      normal<L>(x, &density, &phi);
      return L::mul(x, phi);
    }
  } else if constexpr (kActivation == Activation::gelu_tanh) {  // (1 + tanh u) / 2 = logistic(2u)
    const auto cube = L::fma(L::mul(x, x), L::set1(kGeluCube), L::set1(1.0f));
    return L::mul(x, logistic<L>(L::mul(L::mul(x, cube), L::set1(2 * kGeluScale))));
  } else {
    return x;
  }
}

// d activate(x) / dx
template <class L, Activation kActivation>
FASTDL_INLINE typename L::V activate_grad(typename L::V x) {
  const auto zero = L::zero(), one = L::set1(1.0f);
  if constexpr (kActivation == Activation::relu) {
    return L::select_le_zero(x, zero, one);  // as torch has it: 0 at 0, 1 at NaN
  } else if constexpr (kActivation == Activation::silu) {
    const auto s = logistic<L>(x);
    return L::fma(L::mul(x, s), L::sub(one, s), s);
  } else if constexpr (kActivation == Activation::gelu) {
    if constexpr (L::looks_up) {
      return from_tail<L, GeluSlopeTail>(x);
    } else {
      typename L::V density, phi;
      normal<L>(x, &density, &phi);
      return L::fma(L::mul(x, density), L::set1(0.3989422804f), phi);  // 1 / sqrt(2 pi)
    }
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    const auto square = L::mul(x, x);
    const auto u = L::mul(L::mul(x, L::fma(square, L::set1(kGeluCube), one)), L::set1(2 * kGeluScale));
    const auto slope = L::mul(L::fma(square, L::set1(3 * kGeluCube), one), L::set1(2 * kGeluScale));
    const auto s = logistic<L>(u);
    return L::fma(L::mul(x, L::mul(s, L::sub(one, s))), slope, s);
  } else {
    return one;
  }
}

}  // namespace
}  // namespace fastdl
