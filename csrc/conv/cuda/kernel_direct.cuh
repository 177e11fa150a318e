// Any convolution, one thread a few results, by FMA in 64-bit positions: what no other row takes, and groups of few
// channels. Reads the weight where it lies.
#pragma once
#include "conv/cuda/kernel_gather.cuh"

namespace fastdl {

constexpr int kDirectColumns = 4;  // results of a thread: neighbours among the channels, that share what they read

template <class T>
struct ConvDirectArgs {
  ConvDesc desc;
  ConvTensor in, w;
  i64 columns, channels;    // of a group: results, and summed over
  i64 w_column, w_channel;  // steps in w
  i64 size[3], written[3];  // of what is read, and of what is written
  i64 total;                // threads that have work
  ConvEpilogue<T> out;
};

// The position that output o meets with tap t, or -1: outside, or between the steps of dgrad.
FASTDL_DEVICE i64 direct_position(const ConvDesc& d, const i64 (&size)[3], int dim, i64 o, i64 t) {
  i64 z = d.pass == ConvPass::dgrad ? o + d.pad[dim] - t * d.dilation[dim]
                                    : o * d.stride[dim] - d.pad[dim] + t * d.dilation[dim];
  if (d.pass == ConvPass::dgrad) {
    if (z < 0 || z % d.stride[dim] != 0) return -1;
    z /= d.stride[dim];
  }
  return z >= 0 && z < size[dim] ? z : -1;
}

template <class T>
FASTDL_GLOBAL(kConvThreads, 1)
conv_direct_kernel(FASTDL_PARAM ConvDirectArgs<T> args) {
  const ConvDesc& d = args.desc;
  const T* const in = static_cast<const T*>(args.in.data);
  const T* const w = static_cast<const T*>(args.w.data);
  const i64 of_group = (args.columns + kDirectColumns - 1) / kDirectColumns,
            blocks = of_group * d.groups;  // of a pixel
  const i64 pixels = args.written[0] * args.written[1] * args.written[2];
  const i64 stride = static_cast<i64>(grid_x()) * kConvThreads;
  for (i64 i = static_cast<i64>(block_x()) * kConvThreads + thread_x(); i < args.total; i += stride) {
    i64 n, pixel, block;
    if (args.out.channels_last) {
      block = i % blocks, pixel = i / blocks % pixels, n = i / blocks / pixels;
    } else {
      pixel = i % pixels, block = i / pixels % blocks, n = i / pixels / blocks;
    }
    const i64 group = block / of_group, column = block % of_group * kDirectColumns;
    const int count = static_cast<int>(args.columns - column < kDirectColumns ? args.columns - column : kDirectColumns);
    const i64 o[3] = {pixel / args.written[2] / args.written[1], pixel / args.written[2] % args.written[1],
                      pixel % args.written[2]};
    const i64 from = n * args.in.n_step + group * args.channels * args.in.c_step;
    const i64 weights = group * (d.K / d.groups) * args.w.n_step + column * args.w_column;
    float sum[kDirectColumns] = {};
    for (i64 t0 = 0; t0 < d.kernel[0]; ++t0) {
      const i64 z0 = direct_position(d, args.size, 0, o[0], t0);
      if (z0 < 0) continue;
      for (i64 t1 = 0; t1 < d.kernel[1]; ++t1) {
        const i64 z1 = direct_position(d, args.size, 1, o[1], t1);
        if (z1 < 0) continue;
        for (i64 t2 = 0; t2 < d.kernel[2]; ++t2) {
          const i64 z2 = direct_position(d, args.size, 2, o[2], t2);
          if (z2 < 0) continue;
          const T* x = in + from + z0 * args.in.step[0] + z1 * args.in.step[1] + z2 * args.in.step[2];
          const T* v = w + weights + t0 * args.w.step[0] + t1 * args.w.step[1] + t2 * args.w.step[2];
          float tap[kDirectColumns] = {};  // of its own: sums of long windows stay accurate
          for (i64 c = 0; c < args.channels; ++c, x += args.in.c_step, v += args.w_channel) {
            const float a = to_float(*x);
#pragma unroll
            for (int j = 0; j < kDirectColumns; ++j)
              if (j < count) tap[j] = fma_rn(a, to_float(v[j * args.w_column]), tap[j]);
          }
#pragma unroll
          for (int j = 0; j < kDirectColumns; ++j) sum[j] += tap[j];
        }
      }
    }
    const ConvEpilogue<T>& out = args.out;
    const i64 to = n * out.n_step + o[0] * out.step[0] + o[1] * out.step[1] + o[2] * out.step[2];
#pragma unroll
    for (int j = 0; j < kDirectColumns; ++j)
      if (j < count) {
        const i64 c = group * args.columns + column + j;
        conv_finish(out, sum[j], c, to + c * out.c_step);
      }
  }
}

// dw, one element a warp; behind them dbias, one channel a warp.
template <class T>
struct ConvDirectWgradArgs {
  ConvDesc desc;
  ConvTensor x, dy, dw;
  T* dbias;
  i64 dbias_step;
};

template <class T>
FASTDL_GLOBAL(kConvThreads, 1)
conv_direct_wgrad_kernel(FASTDL_PARAM ConvDirectWgradArgs<T> args) {
  const ConvDesc& d = args.desc;
  const T* const x = static_cast<const T*>(args.x.data);
  const T* const dy = static_cast<const T*>(args.dy.data);
  const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2], channels = d.C / d.groups;
  const i64 weights = d.K * channels * taps, total = weights + (args.dbias ? d.K : 0);
  const i64 image = d.out[0] * d.out[1] * d.out[2], pixels = d.N * image;
  constexpr int warps = kConvThreads / kWarp;
  for (i64 e = static_cast<i64>(block_x()) * warps + warp(); e < total; e += static_cast<i64>(grid_x()) * warps) {
    const bool bias = e >= weights;
    const i64 k = bias ? e - weights : e / taps / channels, c = bias ? 0 : e / taps % channels,
              tap = bias ? 0 : e % taps;
    const i64 t[3] = {tap / d.kernel[2] / d.kernel[1], tap / d.kernel[2] % d.kernel[1], tap % d.kernel[2]};
    const T* const from = bias ? nullptr : x + (k / (d.K / d.groups) * channels + c) * args.x.c_step;
    float sum = 0;
    for (i64 m = lane(); m < pixels; m += kWarp) {
      const i64 n = m / image, o[3] = {m % image / d.out[2] / d.out[1], m / d.out[2] % d.out[1], m % d.out[2]};
      i64 y = n * args.dy.n_step + k * args.dy.c_step, at = n * args.x.n_step;
      bool there = true;
      for (int i = 0; i < 3; ++i) {
        const i64 z = bias ? 0 : direct_position(d, d.in, i, o[i], t[i]);
        there = there && z >= 0;
        y += o[i] * args.dy.step[i], at += z * args.x.step[i];
      }
      if (there) sum = fma_rn(to_float(dy[y]), bias ? 1.0f : to_float(from[at]), sum);
    }
    sum = warp_sum(sum);
    if (lane() != 0) continue;
    if (bias)
      args.dbias[k * args.dbias_step] = from_float<T>(sum);
    else
      static_cast<T*>(args.dw.data)[k * args.dw.n_step + c * args.dw.c_step + t[0] * args.dw.step[0] +
                                    t[1] * args.dw.step[1] + t[2] * args.dw.step[2]] = from_float<T>(sum);
  }
}

}  // namespace fastdl
