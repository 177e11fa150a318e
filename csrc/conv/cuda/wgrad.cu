// Launches of wgrad on tensor cores: the tiles of each chunk of pixels, then the sums of all chunks.
#include "conv/cuda/kernel_wgrad.cuh"
#include "conv/cuda/launch.h"

namespace fastdl {
namespace {

struct Wgrad {
  static constexpr CudaConvKind kind = CudaConvKind::kWgrad;
  template <class T>
  using Args = ConvWgradCuda<T>;
  template <class T, int... numbers>
  using Tile = ConvWgradTile<T, numbers...>;
  template <class T, int... numbers>
  static auto kernel() {
    return conv_wgrad_kernel<T, numbers...>;
  }
};

template <class T>
void run(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace, const Stream& stream) {
  char* const memory = static_cast<char*>(workspace);
  if (p.tiles > 0) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    ConvWgradCuda<T> a = {};
    a.phase = p.phase[0];
    a.x = gather_source(args.x, d.in, d.N, p.channels);
    a.in = static_cast<const T*>(args.x.data), a.in_group = p.channels * args.x.c_step;
    a.dy = static_cast<const T*>(args.y.data), a.dy_n_step = args.y.n_step, a.dy_c_step = args.y.c_step;
    std::copy_n(args.y.step, 3, a.dy_step);
    a.columns = p.columns, a.groups = gather_groups(p), a.own_depth = p.phase[0].depth / p.merged;
    a.tiles_n = p.tiles_n, a.chunk = p.chunk;
    a.wide_x = conv_aligned(args.x, p.channels, d.N, d.in, kVector, 16);
    a.wide_dy = conv_aligned(args.y, p.columns, d.N, d.out, kVector, 16);
    a.by_pixel_x = conv_by_pixel(args.x), a.by_pixel_dy = conv_by_pixel(args.y);
    a.partial = reinterpret_cast<float*>(memory), a.partial_chunk = d.K * a.own_depth;
    launch_conv_tiles<Wgrad, T>(p, stream, a);
    run_conv_reduce(d, p, args, a.partial, p.channels / p.merged, stream);
  }
  run_conv_bias_sums(d, p, args, memory + p.partial_bytes, stream);
}

template <class T>
void reduce_weights(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const float* partial, int channels,
                    const Stream& stream) {
  ConvReduceArgs<T> a = {};
  a.phase = p.phase[0], a.by_channels = fast_div(std::max(1, channels));
  a.partial = partial, a.chunks = p.chunks, a.rows = d.K, a.depth = p.phase[0].depth / p.merged;
  a.row_step = args.w.n_step, a.channel_step = args.w.c_step;
  std::copy_n(args.w.step, 3, a.step);
  a.out = static_cast<T*>(args.w.data);
  if (a.rows * a.depth > 0) launch(conv_reduce_kernel<T>, conv_elements(a.rows * a.depth, p), stream, a);
}

}  // namespace

void run_conv_wgrad(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                    const Stream& stream) {
  with_conv_dtype(d.dtype, [&](auto x) { run<decltype(x)>(d, p, args, workspace, stream); });
}

void run_conv_reduce(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const float* partial, int channels,
                     const Stream& stream) {
  with_conv_dtype(d.dtype, [&](auto x) { reduce_weights<decltype(x)>(d, p, args, partial, channels, stream); });
}

}  // namespace fastdl
