// One channel a group: every pixel of a channel meets its own few weights. Bound by memory, so vectors of 16 bytes
// along the channels where they lie side by side, else neighbouring pixels; float32 sums by FMA.
#pragma once
#include "conv/cuda/kernel_gather.cuh"

namespace fastdl {

constexpr int kStrip = 4;  // pixels of a thread along the width: a weight is read once for all of them

template <class T>
struct ConvDepthwiseArgs {
  GatherPhase phase[kMostPhases];
  int phases;
  GatherSource x;
  const T* in;
  const float* w;  // [phase.pack + tap * channels + c]
  int channels, vectors;
  bool by_pixel;
  ConvEpilogue<T> out;
};

template <class T, int V>
FASTDL_GLOBAL(kConvThreads, 1)
conv_depthwise_kernel(FASTDL_PARAM ConvDepthwiseArgs<T> args) {
  const GatherPhase& p = args.phase[block_y()];
  const int width = p.axis[2].count, blocks = (width + kStrip - 1) / kStrip;
  const int rows = p.axis[0].count * p.axis[1].count, strips = rows * blocks;  // of an image
  if (strips == 0) return;
  const int images = p.pixels / (rows * width);
  const i64 total = static_cast<i64>(images) * strips * args.vectors;
  const i64 stride = static_cast<i64>(grid_x()) * kConvThreads;
  for (i64 i = static_cast<i64>(block_x()) * kConvThreads + thread_x(); i < total; i += stride) {
    const i64 line = args.by_pixel ? i / strips : i / args.vectors;
    const int strip = static_cast<int>(args.by_pixel ? i % strips : line % strips);
    const int n = static_cast<int>(args.by_pixel ? line / args.vectors : line / strips);
    const int c = static_cast<int>(args.by_pixel ? line % args.vectors : i % args.vectors) * V;
    const int row = strip / blocks, first = strip % blocks * (args.by_pixel ? 1 : kStrip);
    const int step = args.by_pixel ? blocks : 1, m0 = (n * rows + row) * width + first;
    float sum[kStrip][V] = {};
    GatherRow pixel[kStrip];
#pragma unroll
    for (int s = 0; s < kStrip; ++s)
      pixel[s] = gather_row(p, args.x, first + s * step < width ? m0 + s * step : p.pixels);
    for (int tap = 0; tap < p.depth; ++tap) {
      const GatherCol col = gather_col(p, args.x, tap);
      const float* const from = args.w + p.pack + static_cast<i64>(tap) * args.channels + c;
      float w[V];
      constexpr int part = V < 4 ? V : 4;  // 16 bytes
#pragma unroll
      for (int v = 0; v < V; v += part) {
        const Pack<float, part> few = *reinterpret_cast<const Pack<float, part>*>(from + v);
#pragma unroll
        for (int e = 0; e < part; ++e) w[v + e] = few.x[e];
      }
#pragma unroll
      for (int s = 0; s < kStrip; ++s) {
        if (!inside(args.x, pixel[s], col)) continue;
        const Pack<T, V> x =
            *reinterpret_cast<const Pack<T, V>*>(args.in + pixel[s].offset + col.offset + c * args.x.c_step);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[s][v] = fma_rn(to_float(x.x[v]), w[v], sum[s][v]);
      }
    }
#pragma unroll
    for (int s = 0; s < kStrip; ++s) {
      if (first + s * step >= width) continue;
      const i64 to = written_offset(p, args.out.step, args.out.n_step, m0 + s * step) + c * args.out.c_step;
      conv_finish_pack(args.out, sum[s], c, to);
    }
  }
}

// out[phase.pack + tap * channels + c], float32.
template <class T>
struct ConvDepthwisePack {
  GatherPhase phase[kMostPhases];
  int phases, channels;
  const T* w;
  i64 channel_step, step[3];
  float* out;
};

template <class T>
FASTDL_GLOBAL(kConvThreads, 1)
conv_depthwise_pack_kernel(FASTDL_PARAM ConvDepthwisePack<T> args) {
  const GatherPhase& p = args.phase[block_y()];
  const i64 total = static_cast<i64>(p.depth) * args.channels, stride = static_cast<i64>(grid_x()) * kConvThreads;
  for (i64 i = static_cast<i64>(block_x()) * kConvThreads + thread_x(); i < total; i += stride) {
    const int tap = static_cast<int>(i / args.channels);
    args.out[p.pack + i] = to_float(args.w[i % args.channels * args.channel_step + weight_offset(p, args.step, tap)]);
  }
}

// dw(c, tap) = sum_m dy(m, c) x(m, tap, c), and without taps the sums of dy alone (dbias of every convolution). A
// block: `lanes` vectors of channels, kTaps taps, a chunk of pixels that its other threads share.
constexpr int kDepthwiseTaps = 9, kDepthwiseThreads = 128;

template <class T>
struct ConvDepthwiseWgradArgs {
  GatherPhase phase;
  GatherSource x;
  const T* in;
  const T* dy;
  i64 dy_n_step, dy_c_step, dy_step[3];
  int channels, taps, lanes, chunk;  // taps = 0: sums of dy
  float* partial;                    // [chunks][channels][taps], or [chunks][channels]
};

template <class T, int V>
FASTDL_GLOBAL(kDepthwiseThreads, 1)
conv_depthwise_wgrad_kernel(FASTDL_PARAM ConvDepthwiseWgradArgs<T> args) {
  float* const sums = shared_memory<float>();  // [threads][V]
  GatherCol* const cols = reinterpret_cast<GatherCol*>(sums + kDepthwiseThreads * V);
  const GatherPhase& p = args.phase;
  const int lane_c = thread_x() % args.lanes, lane_p = thread_x() / args.lanes,
            lanes_p = kDepthwiseThreads / args.lanes;
  const int c = (block_x() * args.lanes + lane_c) * V, tap0 = block_y() * kDepthwiseTaps;
  const bool only_sums = args.taps == 0;
  const int count = only_sums ? 1 : args.taps - tap0 < kDepthwiseTaps ? args.taps - tap0 : kDepthwiseTaps;
  if (!only_sums && thread_x() < kDepthwiseTaps) cols[thread_x()] = gather_col(p, args.x, tap0 + thread_x());
  block_sync(kDepthwiseThreads);  // the table
  float sum[kDepthwiseTaps][V] = {};
  const int begin = block_z() * args.chunk, end = begin + args.chunk < p.pixels ? begin + args.chunk : p.pixels;
  if (c < args.channels) {
    for (int m = begin + lane_p; m < end; m += lanes_p) {
      const Pack<T, V> y = *reinterpret_cast<const Pack<T, V>*>(
          args.dy + written_offset(p, args.dy_step, args.dy_n_step, m) + c * args.dy_c_step);
      if (only_sums) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[0][v] += to_float(y.x[v]);
        continue;
      }
      const GatherRow row = gather_row(p, args.x, m);
#pragma unroll
      for (int t = 0; t < kDepthwiseTaps; ++t) {
        if (t >= count || !inside(args.x, row, cols[t])) continue;
        const Pack<T, V> x =
            *reinterpret_cast<const Pack<T, V>*>(args.in + row.offset + cols[t].offset + c * args.x.c_step);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[t][v] = fma_rn(to_float(y.x[v]), to_float(x.x[v]), sum[t][v]);
      }
    }
  }
  const int taps = only_sums ? 1 : args.taps;
#pragma unroll
  for (int t = 0; t < kDepthwiseTaps; ++t) {
    if (t < count) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[thread_x() * V + v] = sum[t][v];
    }
    block_sync(kDepthwiseThreads);  // of all threads
    if (t < count && thread_x() < args.lanes * V) {
      float all = 0;
      for (int l = 0; l < lanes_p; ++l) all += sums[l * args.lanes * V + thread_x()];
      const int channel = block_x() * args.lanes * V + thread_x();
      if (channel < args.channels)
        args.partial[(static_cast<i64>(block_z()) * args.channels + channel) * taps + tap0 + t] = all;
    }
    block_sync(kDepthwiseThreads);  // before the next tap's
  }
}

}  // namespace fastdl
