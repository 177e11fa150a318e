// Launches of wgrad on tensor cores: the tiles of each chunk of pixels, then the sums of all chunks.
#include "conv/cuda/kernel_wgrad.cuh"
#include "conv/cuda/launch.h"

namespace fastdl {
namespace {

template <class T, int parts, int M, int N, int warp_m, int warp_n, int stages>
void tiles(const LaunchShape& grid, const Stream& stream, const ConvWgradCuda<T>& args) {
  using Tile = ConvWgradTile<T, parts, M, N, warp_m, warp_n, stages>;
  LaunchShape shape = grid;
  shape.threads = Tile::threads, shape.shared_bytes = Tile::shared_bytes;
  launch(conv_wgrad_kernel<T, parts, M, N, warp_m, warp_n, stages>, shape, stream, args);
}

template <class T>
using Launcher = void(const LaunchShape&, const Stream&, const ConvWgradCuda<T>&);

template <class T, bool mine, int parts, int M, int N, int warp_m, int warp_n, int stages>
constexpr Launcher<T>* row() {
  if constexpr (mine)
    return tiles<T, parts, M, N, warp_m, warp_n, stages>;
  else
    return nullptr;
}

template <class T>
Launcher<T>* launcher(const std::string& name) {
#define CUDA_CONV_TILE(row_name, type, kind, precision, parts, M, N, warp_m, warp_n, stages)                       \
  if (name == #row_name)                                                                                           \
    return row<T, DType::type == kConvDType<T> && CudaConvKind::kind == CudaConvKind::kWgrad, parts, M, N, warp_m, \
               warp_n, stages>();
#define CUDA_CONV_ROW(name, type, kind)
#include "conv/cuda/kernels.inc"
#undef CUDA_CONV_TILE
#undef CUDA_CONV_ROW
  return nullptr;
}

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
    a.columns = p.columns, a.tiles_n = p.tiles_n, a.chunk = p.chunk;
    a.wide_x = conv_aligned(args.x, p.channels, d.N, d.in, kVector, 16);
    a.wide_dy = conv_aligned(args.y, p.columns, d.N, d.out, kVector, 16);
    a.by_pixel_x = conv_by_pixel(args.x), a.by_pixel_dy = conv_by_pixel(args.y);
    a.partial = reinterpret_cast<float*>(memory), a.partial_chunk = d.K * p.phase[0].depth;
    LaunchShape shape;
    shape.grid[0] = p.tiles, shape.grid[1] = static_cast<int>(d.groups), shape.grid[2] = p.chunks;
    launcher<T>(p.kernel->name)(shape, stream, a);
    run_conv_reduce(d, p, args, a.partial, p.channels, stream);
  }
  run_conv_bias_sums(d, p, args, memory + p.partial_bytes, stream);
}

template <class T>
void reduce(const CudaConvPlan& p, const ConvReduceArgs<T>& args, const Stream& stream) {
  if (args.rows * args.depth > 0) launch(conv_reduce_kernel<T>, conv_elements(args.rows * args.depth, p), stream, args);
}

template <class T>
void reduce_weights(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const float* partial, int channels,
                    const Stream& stream) {
  ConvReduceArgs<T> a = {};
  a.phase = p.phase[0], a.by_channels = fast_div(std::max(1, channels));
  a.partial = partial, a.chunks = p.chunks, a.rows = d.K, a.depth = p.phase[0].depth;
  a.row_step = args.w.n_step, a.channel_step = args.w.c_step;
  std::copy_n(args.w.step, 3, a.step);
  a.out = static_cast<T*>(args.w.data);
  reduce(p, a, stream);
}

}  // namespace

void run_conv_wgrad(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                    const Stream& stream) {
  if (d.dtype == DType::bf16) return run<bf16>(d, p, args, workspace, stream);
  if (d.dtype == DType::f16) return run<f16>(d, p, args, workspace, stream);
  run<float>(d, p, args, workspace, stream);
}

void run_conv_reduce(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const float* partial, int channels,
                     const Stream& stream) {
  if (d.dtype == DType::bf16) return reduce_weights<bf16>(d, p, args, partial, channels, stream);
  if (d.dtype == DType::f16) return reduce_weights<f16>(d, p, args, partial, channels, stream);
  reduce_weights<float>(d, p, args, partial, channels, stream);
}

}  // namespace fastdl
