// Launches of the kernels without tiles: direct, depthwise, sums for dbias. And the one door to all kernels.
#include "conv/cuda/kernel_depthwise.cuh"
#include "conv/cuda/kernel_direct.cuh"
#include "conv/cuda/kernel_wgrad.cuh"
#include "conv/cuda/launch.h"

namespace fastdl {
namespace {

template <class T>
void direct(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const Stream& stream) {
  if (d.pass == ConvPass::wgrad) {
    ConvDirectWgradArgs<T> a = {d, args.x, args.y, args.w, static_cast<T*>(args.dbias), args.dbias_step};
    const i64 taps = d.kernel[0] * d.kernel[1] * d.kernel[2];
    const i64 total = d.K * (d.C / d.groups) * taps + (a.dbias ? d.K : 0);
    if (total == 0) return;
    return launch(conv_direct_wgrad_kernel<T>, conv_elements(total * kWarp, p), stream, a);
  }
  const bool dgrad = d.pass == ConvPass::dgrad;
  ConvDirectArgs<T> a = {};
  a.desc = d, a.in = dgrad ? args.y : args.x, a.w = args.w;
  a.columns = (dgrad ? d.C : d.K) / d.groups, a.channels = (dgrad ? d.K : d.C) / d.groups;
  a.w_column = dgrad ? args.w.c_step : args.w.n_step, a.w_channel = dgrad ? args.w.n_step : args.w.c_step;
  std::copy_n(dgrad ? d.out : d.in, 3, a.size);
  std::copy_n(dgrad ? d.in : d.out, 3, a.written);
  a.out = conv_epilogue<T>(d, args);
  const i64 blocks = ceil_div(a.columns, kDirectColumns) * d.groups;
  a.total = d.N * a.written[0] * a.written[1] * a.written[2] * blocks;
  if (a.total > 0) launch(conv_direct_kernel<T>, conv_elements(a.total, p), stream, a);
}

template <class T, int V>
void depthwise_gather(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const ConvTensor& in,
                      const i64 (&size)[3], const float* w, const Stream& stream) {
  ConvDepthwiseArgs<T> a = {};
  std::copy_n(p.phase, p.phases, a.phase);
  a.phases = p.phases, a.x = gather_source(in, size, d.N, 1), a.in = static_cast<const T*>(in.data), a.w = w;
  a.channels = static_cast<int>(d.C), a.vectors = a.channels / V;
  a.by_pixel = V == 1 && conv_by_pixel(in), a.out = conv_epilogue<T>(d, args);
  i64 most = 0;
  for (int i = 0; i < p.phases; ++i) {
    const GatherPhase& x = p.phase[i];
    const i64 blocks = ceil_div(x.axis[2].count, kStrip);
    most = std::max(most, d.N * x.axis[0].count * x.axis[1].count * blocks * a.vectors);
  }
  LaunchShape shape = conv_elements(most, p);
  shape.grid[1] = p.phases;
  if (most > 0) launch(conv_depthwise_kernel<T, V>, shape, stream, a);
}

// taps = 0: sums of dy.
template <class T, int V>
void channel_sums(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, int taps, int chunk, int chunks,
                  float* partial, const Stream& stream) {
  ConvDepthwiseWgradArgs<T> a = {};
  a.phase = p.phase[0], a.x = gather_source(args.x, d.in, d.N, 1);
  a.in = static_cast<const T*>(args.x.data);
  a.dy = static_cast<const T*>(args.y.data), a.dy_n_step = args.y.n_step, a.dy_c_step = args.y.c_step;
  std::copy_n(args.y.step, 3, a.dy_step);
  a.channels = static_cast<int>(d.K), a.taps = taps, a.chunk = chunk, a.partial = partial;
  // Lines of 128 bytes along the channels, or along the pixels.
  a.lanes = V > 1 ? 8 : conv_by_pixel(args.y) ? 1 : 32;
  LaunchShape shape;
  shape.threads = kDepthwiseThreads;
  shape.shared_bytes = kDepthwiseThreads * V * 4 + kDepthwiseTaps * static_cast<int>(sizeof(GatherCol));
  shape.grid[0] = (a.channels / V + a.lanes - 1) / a.lanes;
  shape.grid[1] = std::max(1, (taps + kDepthwiseTaps - 1) / kDepthwiseTaps), shape.grid[2] = chunks;
  if (d.K > 0) launch(conv_depthwise_wgrad_kernel<T, V>, shape, stream, a);
}

template <class T>
void depthwise(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace, const Stream& stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  float* const memory = static_cast<float*>(workspace);
  const bool x_aligned = conv_aligned(args.x, d.C, d.N, d.in, kVector, 16);
  const bool wide = x_aligned && conv_aligned(args.y, d.K, d.N, d.out, kVector, 16);
  if (d.pass == ConvPass::wgrad) {
    const int taps = p.phase[0].depth;
    wide ? channel_sums<T, kVector>(d, p, args, taps, p.chunk, p.chunks, memory, stream)
         : channel_sums<T, 1>(d, p, args, taps, p.chunk, p.chunks, memory, stream);
    run_conv_reduce(d, p, args, memory, 1, stream);
    return run_conv_bias_sums(d, p, args, static_cast<char*>(workspace) + p.partial_bytes, stream);
  }
  ConvDepthwisePack<T> pack = {};
  std::copy_n(p.phase, p.phases, pack.phase);
  pack.phases = p.phases, pack.channels = static_cast<int>(d.C), pack.w = static_cast<const T*>(args.w.data);
  pack.channel_step = args.w.n_step, pack.out = memory;
  std::copy_n(args.w.step, 3, pack.step);
  i64 most = 0;
  for (int i = 0; i < p.phases; ++i) most = std::max(most, p.phase[i].depth * d.C);
  LaunchShape shape = conv_elements(most, p);
  shape.grid[1] = p.phases;
  if (most > 0) launch(conv_depthwise_pack_kernel<T>, shape, stream, pack);
  const bool dgrad = d.pass == ConvPass::dgrad;
  const ConvTensor& in = dgrad ? args.y : args.x;
  const i64(&size)[3] = dgrad ? d.out : d.in;
  const auto aligned = [](const void* q) { return reinterpret_cast<std::uintptr_t>(q) % 16 == 0; };
  wide&& aligned(args.residual) && aligned(args.pre)
      ? depthwise_gather<T, kVector>(d, p, args, in, size, memory, stream)
      : depthwise_gather<T, 1>(d, p, args, in, size, memory, stream);
}

template <class T>
void bias_sums(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, float* sums, const Stream& stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  conv_aligned(args.y, d.K, d.N, d.out, kVector, 16)
      ? channel_sums<T, kVector>(d, p, args, 0, p.bias_chunk, p.bias_chunks, sums, stream)
      : channel_sums<T, 1>(d, p, args, 0, p.bias_chunk, p.bias_chunks, sums, stream);
  ConvReduceArgs<T> a = {};
  a.phase = p.phase[0], a.by_channels = fast_div(1);
  a.partial = sums, a.chunks = p.bias_chunks, a.rows = d.K, a.depth = 1, a.row_step = args.dbias_step;
  a.out = static_cast<T*>(args.dbias);
  if (d.K > 0) launch(conv_reduce_kernel<T>, conv_elements(d.K, p), stream, a);
}

}  // namespace

void run_conv_bias_sums(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                        const Stream& stream) {
  if (!args.dbias) return;
  float* const sums = static_cast<float*>(workspace);
  with_conv_dtype(d.dtype, [&](auto x) { bias_sums<decltype(x)>(d, p, args, sums, stream); });
}

void run_conv_depthwise(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                        const Stream& stream) {
  with_conv_dtype(d.dtype, [&](auto x) { depthwise<decltype(x)>(d, p, args, workspace, stream); });
}

void run_conv_direct(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const Stream& stream) {
  with_conv_dtype(d.dtype, [&](auto x) { direct<decltype(x)>(d, p, args, stream); });
}

void cuda_conv_run(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                   const Stream& stream) {
  switch (p.kernel->kind) {
    case CudaConvKind::kTile:
      return run_conv_gather(d, p, args, workspace, stream);
    case CudaConvKind::kWgrad:
      return run_conv_wgrad(d, p, args, workspace, stream);
    case CudaConvKind::kDepthwise:
      return run_conv_depthwise(d, p, args, workspace, stream);
    case CudaConvKind::kDirect:
      return run_conv_direct(d, p, args, stream);
  }
}

}  // namespace fastdl
