// Depthwise along a row of short windows: y(j,c) = sum_{r,e} x(j*stride + e, c + off_r) w(e, c + w_off_r), e < width.
//
// Each input column is loaded once a row of taps and multiplied into all the outputs whose windows hold it, the row's
// weights being in registers: COLS*stride + width loads for COLS*width products, where one load a product (`strip`)
// would bound the loop. Columns outside the image are left out one by one, so edges need no copy and no zeros.
#pragma once
#include "conv/cpu/kernel_direct_args.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

// Vectors as they lie in memory: a register of floats, or one of bfloat16 taken apart into two, channels 0, 2, 4.. and
// 1, 3, 5... `vectors` of them a step.
template <class L, int NV, bool kMasked>
struct SlideFloats {
  using T = float;
  static constexpr int registers = NV, channels = NV * L::width;
  typename L::M mask;
  explicit SlideFloats(i64 left) : mask(L::first(!kMasked ? 0 : left < L::width ? static_cast<int>(left) : L::width)) {}
  FASTDL_INLINE void load(const float* p, typename L::V* to) const {
    for (int v = 0; v < NV; ++v) to[v] = kMasked ? L::load(p, mask) : L::load(p + v * L::width);
  }
  FASTDL_INLINE void store(float* p, const typename L::V* from) const {
    for (int v = 0; v < NV; ++v) {
      if (kMasked) {
        L::store(p, from[v], mask);
      } else {
        L::store(p + v * L::width, from[v]);
      }
    }
  }
  FASTDL_INLINE void load_sums(const float* p, typename L::V* to) const { load(p, to); }
  FASTDL_INLINE void store_sums(float* p, const typename L::V* from) const { store(p, from); }
};
template <class L, bool kMasked>
struct SlidePairs {
  using T = bf16;
  static constexpr int registers = 2, channels = 2 * L::width;
  typename L::M2 mask;
  explicit SlidePairs(i64 left) : mask(L::halves(!kMasked || left >= channels ? channels : static_cast<int>(left))) {}
  FASTDL_INLINE void load(const bf16* p, typename L::V* to) const {
    kMasked ? L::split(p, mask, to, to + 1) : L::split(p, to, to + 1);
  }
  FASTDL_INLINE void store(bf16* p, const typename L::V* from) const {
    kMasked ? L::join(p, mask, from[0], from[1]) : L::join(p, from[0], from[1]);
  }
  // Sums of floats stay taken apart, in whole vectors.
  FASTDL_INLINE void load_sums(const float* p, typename L::V* to) const {
    for (int v = 0; v < 2; ++v) to[v] = L::load(p + v * L::width);
  }
  FASTDL_INLINE void store_sums(float* p, const typename L::V* from) const {
    for (int v = 0; v < 2; ++v) L::store(p + v * L::width, from[v]);
  }
};

template <int N, class T>
FASTDL_INLINE void prefetch_lines(const T* p) {
#pragma GCC unroll 2
  for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i);
}

// Of the next call's new rows of x those columns that lie as the strip's do. Large images: 0.85 of the time; between
// the products of a row of taps it costs registers.
template <class Lanes, int N, class Args>
FASTDL_INLINE void fetch_ahead(const Args& a, i64 at) {
  for (i64 r = 0; r < a.ahead; ++r) {
    const auto* const next = static_cast<const typename Lanes::T*>(a.x) + (a.next[r] + at);
#pragma GCC unroll 14
    for (int i = 0; i < N; ++i) prefetch_lines<Lanes::channels>(next + i * a.x_col);
  }
}

// Bit i: whether column i of the first `count` is one of lo..hi-1.
FASTDL_INLINE unsigned columns_inside(i64 lo, i64 hi, i64 count) {
  lo = lo > 0 ? lo : 0, hi = hi < count ? hi : count;
  return hi > lo ? (1u << hi) - (1u << lo) : 0;
}

// Columns i of x that are inside, each loaded once and given to every product it has a part in: of output j and tap e.
template <class L, class Lanes, int COLS, int WIDTH, int STRIDE, class Load, class Multiply>
FASTDL_INLINE void each_product(unsigned inside, const Load& load, const Multiply& multiply) {
#pragma GCC unroll 20
  for (int i = 0; i < (COLS - 1) * STRIDE + WIDTH; ++i) {
    if (!(inside >> i & 1)) continue;
    typename L::V x[Lanes::registers];
    load(i, x);
#pragma GCC unroll 7
    for (int e = 0; e < WIDTH; ++e) {
      if ((i - e) % STRIDE != 0 || i < e || (i - e) / STRIDE >= COLS) continue;
#pragma GCC unroll 2
      for (int v = 0; v < Lanes::registers; ++v) multiply((i - e) / STRIDE, e, v, x[v]);
    }
  }
}

// avx512: 7x2 sums + width x 2 weights + 2 columns, at most 30 of 32; avx2, scalar: 7 + width + 1, at most 15 of 16;
// pairs of avx2: 3x2 + 3x2 + 2, more for windows above 3, whose weights the compiler keeps on the stack.
template <class L, class Lanes, int COLS, int WIDTH, int STRIDE>
void slide(const SlideArgs& a, i64 j0, i64 cols, i64 c0) {
  using T = typename Lanes::T;
  constexpr int R = Lanes::registers;
  const Lanes lanes(a.channels - c0);
  typename L::V acc[COLS][R];
#pragma GCC unroll 7
  for (int j = 0; j < COLS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < R; ++v) acc[j][v] = L::zero();

  const i64 first = j0 * STRIDE;
  const unsigned inside = columns_inside(a.lo - first, a.hi - first, (cols - 1) * STRIDE + WIDTH);
  for (i64 r = 0; r < a.rows; ++r) {
    const T* const w = static_cast<const T*>(a.w) + a.w_off[r] + c0;
    typename L::V wv[WIDTH][R];
#pragma GCC unroll 7
    for (int e = 0; e < WIDTH; ++e) lanes.load(w + e * a.w_col, wv[e]);
    const i64 at = a.off[r] + first * a.x_col + c0;
    each_product<L, Lanes, COLS, WIDTH, STRIDE>(
        inside,
        [&](int i, typename L::V* x)
            __attribute__((always_inline)) { lanes.load(static_cast<const T*>(a.x) + (at + i * a.x_col), x); },
        [&](int j, int e, int v, typename L::V x)
            __attribute__((always_inline)) { acc[j][v] = L::fma(x, wv[e][v], acc[j][v]); });
  }
  fetch_ahead<Lanes, COLS * STRIDE>(a, first * a.x_col + c0);
  if (a.bias) {
    typename L::V b[R];
    lanes.load(static_cast<const T*>(a.bias) + c0, b);
#pragma GCC unroll 7
    for (int j = 0; j < COLS; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < R; ++v) acc[j][v] = L::add(acc[j][v], b[v]);
  }
  T* const y = static_cast<T*>(a.y) + j0 * a.y_col + c0;
#pragma GCC unroll 7
  for (int j = 0; j < COLS; ++j)
    if (j < cols) lanes.store(y + j * a.y_col, acc[j]);
}

// Its weight gradient, the other way about: COLS columns of dy stay in registers while the sums of a row of taps pass.
template <class L, class Lanes, int COLS, int WIDTH, int STRIDE>
void slide(const SlideGradArgs& a, i64 j0, i64 cols, i64 c0) {
  using T = typename Lanes::T;
  constexpr int R = Lanes::registers;
  const Lanes lanes(a.channels - c0);
  typename L::V g[COLS][R];
  const T* const dy = static_cast<const T*>(a.dy) + j0 * a.dy_col + c0;
#pragma GCC unroll 7
  for (int j = 0; j < COLS; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < R; ++v) g[j][v] = L::zero();
    if (j < cols) lanes.load(dy + j * a.dy_col, g[j]);
  }
  const i64 first = j0 * STRIDE;
  const unsigned inside = columns_inside(a.lo - first, a.hi - first, (cols - 1) * STRIDE + WIDTH);
  for (i64 r = 0; r < a.rows; ++r) {
    float* const dw = a.dw + a.dw_off[r] + c0;
    typename L::V acc[WIDTH][R];
#pragma GCC unroll 7
    for (int e = 0; e < WIDTH; ++e) lanes.load_sums(dw + e * a.dw_col, acc[e]);
    const i64 at = a.off[r] + first * a.x_col + c0;
    each_product<L, Lanes, COLS, WIDTH, STRIDE>(
        inside,
        [&](int i, typename L::V* x)
            __attribute__((always_inline)) { lanes.load(static_cast<const T*>(a.x) + (at + i * a.x_col), x); },
        [&](int j, int e, int v, typename L::V x)
            __attribute__((always_inline)) { acc[e][v] = L::fma(x, g[j][v], acc[e][v]); });
#pragma GCC unroll 7
    for (int e = 0; e < WIDTH; ++e) lanes.store_sums(dw + e * a.dw_col, acc[e]);
  }
  fetch_ahead<Lanes, COLS * STRIDE>(a, first * a.x_col + c0);
}

template <class Args>
using SlideFunction = void(const Args&, i64, i64, i64);

template <class L, class Lanes, int COLS, class Args>
constexpr SlideFunction<Args>* slide_of(const Args& a) {
  constexpr SlideFunction<Args>* table[2][kSlideWidth] = {
      {slide<L, Lanes, COLS, 1, 1>, slide<L, Lanes, COLS, 2, 1>, slide<L, Lanes, COLS, 3, 1>, nullptr,
       slide<L, Lanes, COLS, 5, 1>, nullptr, slide<L, Lanes, COLS, 7, 1>},
      {nullptr, nullptr, slide<L, Lanes, COLS, 3, 2>, nullptr, slide<L, Lanes, COLS, 5, 2>, nullptr, nullptr},
  };
  return table[a.stride - 1][a.width - 1];
}

// Columns j0..j0+cols-1 of the channels from c on, below `end`, that whole steps of Lanes hold, or of the one step
// begun. Returns the rest's first.
template <class L, class Lanes, int COLS, bool kLast, class Args>
FASTDL_INLINE i64 slide_steps(const Args& a, i64 j0, i64 cols, i64 c, i64 end) {
  const auto run = slide_of<L, Lanes, COLS>(a);
  for (; kLast ? c < end : c + Lanes::channels <= end; c += Lanes::channels) run(a, j0, cols, c);
  return c;
}

// A block of channels goes along the whole row: wide enough that pixels are read side by side, as prefetchers want it
// (all of a row for one step of channels, then the next: 1.2 times the time at 64 channels, 112x112; blocks of 32 for
// 7x7 at 96 channels: 1.18 times), narrow enough that the columns which two strips share stay in L1.
constexpr i64 kSlideChannels = 128;
template <class L, class Whole, class Last, int COLS, class Args>
FASTDL_INLINE void slide_all(const Args& a) {
  const i64 strips = (a.cols + COLS - 1) / COLS;
  for (i64 c = 0; c < a.channels; c += kSlideChannels) {
    const i64 end = a.channels < c + kSlideChannels ? a.channels : c + kSlideChannels;
    for (i64 s = 0; s < strips; ++s) {  // cut evenly
      const i64 j = a.cols * s / strips, cols = a.cols * (s + 1) / strips - j;
      const i64 rest = slide_steps<L, Whole, COLS, false>(a, j, cols, c, end);
      slide_steps<L, Last, COLS, true>(a, j, cols, rest, end);
    }
  }
}

template <class L, class Args>
void run_slide(const Args& a) {
  constexpr int NV = L::width == 16 ? 2 : 1;
  slide_all<L, SlideFloats<L, NV, false>, SlideFloats<L, 1, true>, 7>(a);
}

// Of bfloat16, where a level takes such vectors apart.
template <class L, class T, class Args, class = void>
struct SlideSplit {
  static constexpr void (*run)(const Args&) = nullptr;
};
template <class L, class Args>
void run_slide_split(const Args& a) {
  slide_all<L, SlidePairs<L, false>, SlidePairs<L, true>, L::width == 16 ? 7 : 3>(a);
}
template <class L, class Args>
struct SlideSplit<L, bf16, Args, decltype(L::split(nullptr, nullptr, nullptr))> {
  static constexpr void (*run)(const Args&) = run_slide_split<L, Args>;
};

}  // namespace
}  // namespace fastdl
