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
// 1, 3, 5... `registers` of them a step.
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
  for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// Of the next call's new rows of x those columns that lie as the strip's do, to L2: rows to come would evict those at
// work from L1 (stride 2: 1.15 times the time). Between the products of a row of taps it costs registers.
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
FASTDL_INLINE void slide(const SlideArgs& a, i64 j0, i64 cols, unsigned inside, i64 c0) {
  using T = typename Lanes::T;
  constexpr int R = Lanes::registers;
  const Lanes lanes(a.channels - c0);
  typename L::V acc[COLS][R];
#pragma GCC unroll 7
  for (int j = 0; j < COLS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < R; ++v) acc[j][v] = L::zero();

  const i64 first = j0 * STRIDE;
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
FASTDL_INLINE void slide(const SlideGradArgs& a, i64 j0, i64 cols, unsigned inside, i64 c0) {
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

// A row of outputs in strips of at most COLS, cut evenly; of a strip all channels, whole steps of Whole, the rest as
// Last: pixels are read side by side, as prefetchers want it. Tried: all of a row for one step of channels, then the
// next: up to 1.3 times the time, for blocks of 128 channels 1.05 times; strips that are inside the image without the
// tests of columns: 1.5 times (GCC 12).
template <class L, class Whole, class Last, int COLS, int WIDTH, int STRIDE, class Args>
void slide_row(const Args& a) {
  const i64 strips = (a.cols + COLS - 1) / COLS, least = a.cols / strips, longer = a.cols % strips;
  for (i64 s = 0, j = 0, cols; s < strips; ++s, j += cols) {
    cols = least + (s < longer);
    const unsigned inside = columns_inside(a.lo - j * STRIDE, a.hi - j * STRIDE, (cols - 1) * STRIDE + WIDTH);
    i64 c = 0;
    for (; c + Whole::channels <= a.channels; c += Whole::channels)
      slide<L, Whole, COLS, WIDTH, STRIDE>(a, j, cols, inside, c);
    for (; c < a.channels; c += Last::channels) slide<L, Last, COLS, WIDTH, STRIDE>(a, j, cols, inside, c);
  }
}

template <class L, class Whole, class Last, int COLS, class Args>
FASTDL_INLINE void slide_all(const Args& a) {
  constexpr void (*table[2][kSlideWidth])(const Args&) = {
      {slide_row<L, Whole, Last, COLS, 1, 1, Args>, slide_row<L, Whole, Last, COLS, 2, 1, Args>,
       slide_row<L, Whole, Last, COLS, 3, 1, Args>, nullptr, slide_row<L, Whole, Last, COLS, 5, 1, Args>, nullptr,
       slide_row<L, Whole, Last, COLS, 7, 1, Args>},
      {nullptr, nullptr, slide_row<L, Whole, Last, COLS, 3, 2, Args>, nullptr,
       slide_row<L, Whole, Last, COLS, 5, 2, Args>, nullptr, nullptr},
  };
  table[a.stride - 1][a.width - 1](a);
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
