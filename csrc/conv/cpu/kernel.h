// The microkernels of dense convolution, written once over a vector level L (simd/vec.h).
#pragma once
#include "conv/cpu/kernel_args.h"
#include "gemm/cpu/kernel.h"

namespace fastdl {
namespace {

// MR rows against NV vectors of a panel that is kPanel vectors wide. kTail: the last vector of C is partial.
template <class L, int MR, int NV, int kPanel, bool kTail>
void conv_tile(const ConvTileArgs& t) {
  constexpr int W = L::width;
  typename L::V acc[MR][NV];
  const float* a[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    a[i] = t.rows[i];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) __builtin_prefetch(t.c + i * t.c_row + v * W, 1), acc[i][v] = L::zero();
  }
  const float* b = t.b;
  for (i64 r = 0; r < t.run_count; ++r) {
    const i64 begin = t.runs[r], end = begin + t.run;
    for (i64 k = begin; k < end; ++k) {
      typename L::V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = L::load(b + v * W);
      b += kPanel * W;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const auto x = L::set1(a[i][k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = L::fma(x, bv[v], acc[i][v]);
      }
    }
  }
  const auto mask = L::first(kTail ? t.n - (NV - 1) * W : W);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    float* c = t.c + i * t.c_row;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      auto x = acc[i][v];
      if (kTail && v == NV - 1) {
        if (t.accumulate) x = L::add(L::load(c + v * W, mask), x);
        L::store(c + v * W, x, mask);
      } else {
        if (t.accumulate) x = L::add(L::load(c + v * W), x);
        L::store(c + v * W, x);
      }
    }
  }
}

// Rows of a tile of C of the panel's NV vectors: no more sums than MR x NV, no more pointers than registers.
template <int MR, int NV>
constexpr int conv_rows(int C) {
  constexpr int kPointers = 14;
  return MR * NV / C < kPointers ? MR * NV / C : kPointers;
}

// Every tile up to MR x NV vectors, or of as many sums: fn[rows - 1][vectors - 1][kTail].
template <class L, int MR, int NV>
struct ConvTiles {
  void (*fn[conv_rows<MR, NV>(1)][NV][2])(const ConvTileArgs&) = {};

  constexpr ConvTiles() { columns<NV>(); }
  template <int C>
  constexpr void columns() {
    rows<conv_rows<MR, NV>(C), C>();
    if constexpr (C > 1) columns<C - 1>();
  }
  template <int M, int C>
  constexpr void rows() {
    fn[M - 1][C - 1][0] = conv_tile<L, M, C, NV, false>;
    fn[M - 1][C - 1][1] = conv_tile<L, M, C, NV, true>;
    if constexpr (M > 1) rows<M - 1, C>();
  }
};

template <class L, int MR, int NV>
int conv_rows_of(i64 n) {
  return conv_rows<MR, NV>(static_cast<int>((n + L::width - 1) / L::width));
}

template <class L, int MR, int NV>
void conv_run_tile(const ConvTileArgs& t) {
  static constexpr ConvTiles<L, MR, NV> table;
  table.fn[t.m - 1][(t.n + L::width - 1) / L::width - 1][t.n % L::width != 0](t);
}

// Pixels that lie side by side and are to lie so are one. unit: elements in a float of dst.
FASTDL_INLINE ConvBandArgs in_one_line(ConvBandArgs t, int unit) {
  if (t.c_step == 1 && t.pixel_step == t.channels && t.row * unit == t.channels) t.channels *= t.pixels, t.pixels = 1;
  return t;
}

// See ConvBandArgs: widened.
template <class L, class T>
void conv_band(const ConvBandArgs& args) {
  constexpr int W = L::width;
  const ConvBandArgs t = in_one_line(args, 1);
  const T* const src = static_cast<const T*>(t.src);
  if (t.c_step == 1) {
    for (i64 p = 0; p < t.pixels; ++p) {
      const T* s = src + p * t.pixel_step;
      float* d = t.dst + p * t.row;
      for (i64 c = 0; c < t.channels; c += W) {
        const Lanes<L> lanes(t.channels - c);
        lanes.store(d + c, lanes.load(s + c));
      }
    }
  } else if (t.pixel_step == 1) {  // transpose blocks of W channels x W pixels
    for (i64 c = 0; c < t.channels; c += W) {
      const Lanes<L> channels(t.channels - c);
      for (i64 p = 0; p < t.pixels; p += W) {
        const Lanes<L> pixels(t.pixels - p);
        typename L::V r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = i < channels.n ? pixels.load(src + (c + i) * t.c_step + p) : L::zero();
        L::transpose(r);
        for (int i = 0; i < pixels.n; ++i) channels.store(t.dst + (p + i) * t.row + c, r[i]);
      }
    }
  } else {
    for (i64 p = 0; p < t.pixels; ++p)
      for (i64 c = 0; c < t.channels; ++c) t.dst[p * t.row + c] = widen(src[p * t.pixel_step + c * t.c_step]);
  }
}

// See ConvPackArgs. Blocks of W columns x W weights are transposed; a pair gets its second half in a second visit.
template <class L, class T, int NV, bool kPairs>
void conv_pack_panel(const ConvPackArgs& t) {
  constexpr int W = L::width, NR = NV * W;
  const T* const src = static_cast<const T*>(t.src);
  const i64 units = kPairs ? (t.channels + 1) / 2 : t.channels, count = t.channels * t.taps;
  for (int j = 0; j < NR; j += W) {
    i64 c = 0, tap = 0;
    for (i64 e = 0; e < count; e += W) {
      const Lanes<L> lanes(count - e);
      typename L::V r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = j + i < t.n ? lanes.load(src + (j + i) * t.j_step + e) : L::zero();
      L::transpose(r);
      for (int i = 0; i < lanes.n; ++i) {
        float* const d = t.dst + (tap * units + (kPairs ? c / 2 : c)) * NR + j;
        if constexpr (kPairs) {
          L::store(d, c % 2 ? L::join(L::load(d), r[i]) : L::low(r[i]));
        } else {
          L::store(d, r[i]);
        }
        if (++tap == t.taps) tap = 0, ++c;
      }
    }
  }
}

// See ConvScatterArgs.
template <class L, class T, Activation kActivation>
void conv_scatter_with(const ConvScatterArgs& t) {
  constexpr int W = L::width;
  const T* const bias = static_cast<const T*>(t.bias);
  for (i64 i0 = 0; i0 < t.m; i0 += W) {
    const Lanes<L> rows(t.m - i0);
    for (i64 j0 = 0; j0 < t.n; j0 += W) {
      const Lanes<L> columns(t.n - j0);
      typename L::V r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = i < rows.n ? columns.load(t.sum + (i0 + i) * t.sum_row + j0) : L::zero();
      L::transpose(r);
      for (int j = 0; j < columns.n; ++j) {
        auto x = r[j];
        if (bias) x = L::add(x, L::set1(widen(bias[(j0 + j) * t.bias_step])));
        const i64 at = i0 * t.i_step + (j0 + j) * t.j_step;
        const T* const residual = t.residual ? static_cast<const T*>(t.residual) + at : nullptr;
        T* const pre = t.pre ? static_cast<T*>(t.pre) + at : nullptr;
        T* const c = static_cast<T*>(t.c) + at;
        if (t.i_step == 1) {
          if (pre) rows.store(pre, x);
          x = activate<L, kActivation>(x);
          if (residual) x = L::add(x, rows.load(residual));
          rows.store(c, x);
          continue;
        }
        T out[W];
        if (pre) {
          L::store(out, x);
          for (int i = 0; i < rows.n; ++i) pre[i * t.i_step] = out[i];
        }
        x = activate<L, kActivation>(x);
        if (residual) {
          float add[W] = {};
          for (int i = 0; i < rows.n; ++i) add[i] = widen(residual[i * t.i_step]);
          x = L::add(x, L::load(add));
        }
        L::store(out, x);
        for (int i = 0; i < rows.n; ++i) c[i * t.i_step] = out[i];
      }
    }
  }
}

template <class L, class T>
void conv_scatter(const ConvScatterArgs& t) {
  with_activation(t.activation, [&](auto tag) { conv_scatter_with<L, T, decltype(tag)::value>(t); });
}

template <class L, class T, int MR, int NV>
constexpr ConvFunctions dense_functions() {
  return {conv_run_tile<L, MR, NV>, conv_rows_of<L, MR, NV>, conv_band<L, T>, conv_scatter<L, T>,
          conv_pack_panel<L, T, NV, false>};
}

}  // namespace
}  // namespace fastdl
