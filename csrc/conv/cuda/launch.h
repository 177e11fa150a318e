// What the launching files of convolution share.
#pragma once
#include <algorithm>
#include <string>

#include "base/check.h"
#include "conv/cuda/kernel_gather.cuh"
#include "conv/cuda/plan.h"
#include "ptx/launch.h"

namespace fastdl {

void run_conv_gather(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                     const Stream& stream);
void run_conv_wgrad(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                    const Stream& stream);
void run_conv_depthwise(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                        const Stream& stream);
void run_conv_direct(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const Stream& stream);
// dbias of dense and depthwise wgrad: partial sums in `sums`, then their sum.
void run_conv_bias_sums(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* sums,
                        const Stream& stream);
// dw from the partial sums of [K] rows of `phase`.depth; channels: of a group.
void run_conv_reduce(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, const float* partial, int channels,
                     const Stream& stream);

template <class T>
constexpr DType kConvDType = DType::f32;
template <>
inline constexpr DType kConvDType<bf16> = DType::bf16;
template <>
inline constexpr DType kConvDType<f16> = DType::f16;

// run(element): of the dtype.
template <class Run>
void with_conv_dtype(DType dtype, const Run& run) {
  if (dtype == DType::bf16) return run(bf16{});
  if (dtype == DType::f16) return run(f16{});
  run(float{});
}

// --- rows of the table ------------------------------------------------------------------------------------------
// A family of kernels with tiles: `kind`, Args<T>, Tile<T, parts, M, N, warp M, warp N, stages> and kernel<the same>().
template <class Family, class T, int... numbers>
void launch_conv_row(const CudaConvPlan& p, const Stream& stream, const typename Family::template Args<T>& args) {
  using Tile = typename Family::template Tile<T, numbers...>;
  LaunchShape shape;
  std::copy_n(p.grid, 3, shape.grid);
  shape.threads = Tile::threads, shape.shared_bytes = Tile::shared_bytes;
  launch(Family::template kernel<T, numbers...>(), shape, stream, args);
}

// Launches the plan's row, which is one of the family, with elements of type T.
template <class Family, class T>
void launch_conv_tiles(const CudaConvPlan& p, const Stream& stream, const typename Family::template Args<T>& args) {
  static_assert(sizeof(args) <= 4096, "what every driver passes to a kernel");
  const std::string name = p.kernel->name;
#define CUDA_CONV_TILE(row, type, row_kind, precision, parts, M, N, warp_m, warp_n, stages) \
  if constexpr (DType::type == kConvDType<T> && CudaConvKind::row_kind == Family::kind)     \
    if (name == #row) return launch_conv_row<Family, T, parts, M, N, warp_m, warp_n, stages>(p, stream, args);
#define CUDA_CONV_ROW(name, type, kind)
#include "conv/cuda/kernels.inc"
#undef CUDA_CONV_TILE
#undef CUDA_CONV_ROW
  fail("fastdl.conv: no kernel '", name, "' of this dtype and pass");
}

// --- arguments of kernels ---------------------------------------------------------------------------------------
// Threads that each take several elements.
inline LaunchShape conv_elements(i64 total, const CudaConvPlan& p, int threads = kConvThreads) {
  LaunchShape shape;
  shape.threads = threads;
  shape.grid[0] = static_cast<int>(std::clamp<i64>(ceil_div(total, threads), 1, 16 * p.multiprocessors));
  return shape;
}

// Whether vectors of `elements` neighbours along the channels lie aligned in t, `channels` of a group, of these sizes.
inline bool conv_aligned(const ConvTensor& t, i64 channels, i64 N, const i64 (&size)[3], int elements, int bytes) {
  if (channels % elements != 0 || (channels > 1 && t.c_step != 1)) return false;
  if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<unsigned>(bytes) != 0) return false;
  if (N > 1 && t.n_step % elements != 0) return false;
  for (int i = 0; i < 3; ++i)
    if (size[i] > 1 && t.step[i] % elements != 0) return false;
  return true;
}
// Whether neighbours in memory are pixels.
inline bool conv_by_pixel(const ConvTensor& t) { return t.c_step > t.step[2]; }

inline GatherSource gather_source(const ConvTensor& t, const i64 (&size)[3], i64 N, int channels) {
  GatherSource x = {};
  for (int i = 0; i < 3; ++i) x.size[i] = static_cast<int>(size[i]), x.step[i] = size[i] > 1 ? t.step[i] : 0;
  x.n_step = N > 1 ? t.n_step : 0, x.c_step = t.c_step;
  x.by_channels = fast_div(std::max(1, channels));
  return x;
}

// Of the plan's gather, with `channels` and `columns` of those that are one.
inline GatherGroups gather_groups(const CudaConvPlan& p) {
  return {p.merged, fast_div(std::max(1, p.channels / p.merged)), fast_div(std::max(1, p.columns / p.merged))};
}

template <class T>
ConvEpilogue<T> conv_epilogue(const ConvDesc& d, const ConvArgs& args) {
  const ConvTensor& t = d.pass == ConvPass::dgrad ? args.x : args.y;
  ConvEpilogue<T> e = {};
  e.out = static_cast<T*>(t.data), e.n_step = t.n_step, e.c_step = t.c_step;
  for (int i = 0; i < 3; ++i) e.step[i] = t.step[i];
  e.bias = static_cast<const T*>(args.bias), e.bias_step = args.bias_step;
  e.residual = static_cast<const T*>(args.residual), e.pre = static_cast<T*>(args.pre);
  e.activation = args.activation, e.channels_last = d.channels_last;
  return e;
}

}  // namespace fastdl
