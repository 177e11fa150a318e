#include "gemm/cuda/kernel_tile.cuh"
#include "gemm/cuda/tile_probe.h"
#include "ptx/barrier.cuh"
#include "ptx/launch.h"

namespace fastdl {
namespace {

constexpr int kA = 16 * 32, kB = 32 * 32;

template <class T, class Tile>
FASTDL_DEVICE void fill(const Tile& tile, const void* src, int rows, int cols) {
  for (int i = lane() * Tile::chunk; i < rows * cols; i += kWarp * Tile::chunk)
    copy_async<16>(tile.at(i / cols, i % cols), static_cast<const T*>(src) + i);
}

template <class T, int parts>
FASTDL_GLOBAL(kWarp, 1)
tile_probe_kernel(FASTDL_PARAM TileProbe p) {
  T* memory = shared_memory<T>();
  constexpr int M = sizeof(T) == 4 ? 32 : 16;  // columns of A stored transposed: floats come in lines of 32
  const SharedTile<T, 16, 32> a = {memory};
  const SharedTile<T, 32, M> at = {memory};
  const SharedTile<T, 32, 32> b = {memory + 32 * M};
  p.a_transposed ? fill<T>(at, p.a, 32, 16) : fill<T>(a, p.a, 16, 32);
  fill<T>(b, p.b, 32, 32);
  copy_commit();
  copy_wait<0>();
  warp_sync();
  WarpTile<T, parts, 16, 32> sum, part;
  sum.clear();
  part.clear();
  Peak a_peak[1], b_peak[2];
  for (int k = 0; k < 32; k += 16) {
    if (p.a_transposed) {
      p.b_transposed ? part.template add<true, true>(at, b, 0, 0, k, a_peak, b_peak)
                     : part.template add<true, false>(at, b, 0, 0, k, a_peak, b_peak);
    } else {
      p.b_transposed ? part.template add<false, true>(a, b, 0, 0, k, a_peak, b_peak)
                     : part.template add<false, false>(a, b, 0, 0, k, a_peak, b_peak);
    }
    sum.promote(&part);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) p.out[sum_row(r) * 32 + j * 8 + sum_col(r)] = sum.d[0][j][r];
  float* peaks = p.out + kA;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float rows = warp_max<4>(a_peak[0].x[half]);
    const float cols0 = warp_max<4>(b_peak[0].x[half]), cols1 = warp_max<4>(b_peak[1].x[half]);
    if (lane() % 4 == 0) {
      const int i = lane() / 4 + 8 * half;
      peaks[i] = rows, peaks[16 + i] = cols0, peaks[32 + i] = cols1;
    }
  }
}

template <class T, int parts>
void run(const TileProbe& p, const Stream& stream) {
  LaunchShape shape;
  shape.shared_bytes = 2 * kB * static_cast<int>(sizeof(T));
  launch(tile_probe_kernel<T, parts>, shape, stream, p);
}

}  // namespace

void tile_probe_run(const TileProbe& p, DType dtype, Precision precision, const Stream& stream) {
  if (dtype == DType::bf16) return run<bf16, 1>(p, stream);
  if (dtype == DType::f16) return run<f16, 1>(p, stream);
  if (precision == Precision::bf16) return run<float, 1>(p, stream);
  if (precision == Precision::tf32) return run<float, 2>(p, stream);
  run<float, 3>(p, stream);
}

}  // namespace fastdl
