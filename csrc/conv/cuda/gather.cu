// Launches of forward and dgrad on tensor cores: pack the weight, the tiles, and, where sums are cut, their sum.
#include "conv/cuda/launch.h"

namespace fastdl {
namespace {

struct Gather {
  static constexpr CudaConvKind kind = CudaConvKind::kTile;
  template <class T>
  using Args = ConvGatherArgs<T>;
  template <class T, int... numbers>
  using Tile = ConvGatherTile<T, numbers...>;
  template <class T, int... numbers>
  static auto kernel() {
    return conv_gather_kernel<T, numbers...>;
  }
};

// Whether a channels_last weight of forward already is what packing would make of it.
template <class T>
bool lies_packed(const ConvDesc& d, const CudaConvPlan& p, const ConvTensor& w) {
  if (d.pass != ConvPass::forward || p.merged > 1 || p.phase[0].pack_row != p.phase[0].depth) return false;
  if (reinterpret_cast<std::uintptr_t>(w.data) % 16 != 0 || (w.c_step != 1 && p.channels > 1)) return false;
  i64 step = p.channels;
  for (int i = 2; i >= 0; --i) {
    if (d.kernel[i] > 1 && w.step[i] != step) return false;
    step *= d.kernel[i];
  }
  return w.n_step == step || d.K == 1;
}

// Whether packs of results lie aligned in what is written, and in what is read and written along with it.
template <class T>
bool writes_packs(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args) {
  const bool dgrad = d.pass == ConvPass::dgrad;
  const ConvTensor& out = dgrad ? args.x : args.y;
  constexpr int kBytes = kConvPack * static_cast<int>(sizeof(T));
  for (const void* q : {args.residual, static_cast<const void*>(args.pre)})
    if (reinterpret_cast<std::uintptr_t>(q) % kBytes != 0) return false;
  return p.chunks == 1 && out.c_step == 1 && conv_aligned(out, p.columns, d.N, dgrad ? d.in : d.out, kConvPack, kBytes);
}

template <class T>
void run(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace, const Stream& stream) {
  if (p.tiles == 0) return;
  const bool dgrad = d.pass == ConvPass::dgrad;
  const ConvTensor& in = dgrad ? args.y : args.x;
  T* const pack = static_cast<T*>(workspace);
  const bool packed = lies_packed<T>(d, p, args.w);
  if (p.pack_bytes > 0 && !packed) {
    ConvPackWeights<T> a = {};
    std::copy_n(p.phase, p.phases, a.phase);
    a.phases = p.phases, a.rows = p.groups * p.columns, a.groups = gather_groups(p);
    a.by_channels = fast_div(std::max(1, p.channels));
    a.w = static_cast<const T*>(args.w.data), a.group_step = d.K / d.groups * args.w.n_step;
    a.channel_step = dgrad ? args.w.n_step : args.w.c_step, a.column_step = dgrad ? args.w.c_step : args.w.n_step;
    std::copy_n(args.w.step, 3, a.step);
    a.out = pack;
    i64 most = 0;
    for (int i = 0; i < p.phases; ++i) most = std::max(most, a.rows * p.phase[i].pack_row);
    LaunchShape shape = conv_elements(most, p);
    shape.grid[1] = p.phases;
    launch(conv_pack_kernel<T>, shape, stream, a);
  }
  ConvGatherArgs<T> a = {};
  std::copy_n(p.phase, p.phases, a.phase);
  a.phases = p.phases;
  const i64(&size)[3] = dgrad ? d.out : d.in;
  a.x = gather_source(in, size, d.N, p.channels);
  a.in = static_cast<const T*>(in.data), a.in_group = p.channels * in.c_step;
  a.w = packed ? static_cast<const T*>(args.w.data) : pack;
  a.groups = gather_groups(p), a.columns = p.columns, a.tiles_n = p.tiles_n;
  a.chunks = p.chunks, a.chunk = p.chunk;
  a.wide = conv_aligned(in, p.channels, d.N, size, 16 / static_cast<int>(sizeof(T)), 16);
  a.by_pixel = conv_by_pixel(in);
  a.out = conv_epilogue<T>(d, args), a.vector_out = writes_packs<T>(d, p, args);
  i64 pixels = 0;
  for (int i = 0; i < p.phases; ++i) pixels += p.phase[i].pixels;
  a.partial_row = p.groups * p.columns, a.partial_chunk = pixels * a.partial_row;
  a.partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + p.pack_bytes);
  launch_conv_tiles<Gather, T>(p, stream, a);
  if (p.chunks == 1) return;
  ConvFinishArgs<T> f = {};
  std::copy_n(p.phase, p.phases, f.phase);
  f.phases = p.phases, f.partial = a.partial, f.chunks = p.chunks, f.columns = static_cast<int>(a.partial_row);
  f.partial_chunk = f.total = a.partial_chunk, f.out = a.out;
  launch(conv_finish_kernel<T>, conv_elements(f.total, p), stream, f);
}

}  // namespace

void run_conv_gather(const ConvDesc& d, const CudaConvPlan& p, const ConvArgs& args, void* workspace,
                     const Stream& stream) {
  with_conv_dtype(d.dtype, [&](auto x) { run<decltype(x)>(d, p, args, workspace, stream); });
}

}  // namespace fastdl
