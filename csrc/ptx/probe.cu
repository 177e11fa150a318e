#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/launch.h"
#include "ptx/mma.cuh"
#include "ptx/probe.h"
#include "ptx/shuffle.cuh"

namespace fastdl {
namespace {

template <class T>
struct ProbeArgs {
  const T* a;  // [16,K]
  const T* b;  // [8,K]
  float* out;  // [16,8]
  int K;
};

template <class T>
FASTDL_GLOBAL(kWarp, 1)
mma_probe_kernel(FASTDL_PARAM ProbeArgs<T> args) {
  T* a = shared_memory<T>();  // [16][16]
  T* b = a + 16 * 16;         // [16][16]: rows 8 to 15 are zeros
  float d[4] = {};
  for (int k = 0; k < args.K; k += 16) {
    const int row = lane() / 2, col = lane() % 2 * 8;
    copy_async<16>(a + row * 16 + col, args.a + row * args.K + k + col);
    copy_async<16>(b + row * 16 + col, args.b + (row % 8) * args.K + k + col, row < 8 ? 16 : 0);
    copy_commit();
    copy_wait<0>();
    warp_sync();
    u32 af[4], bf[4];
    load_matrices<false>(af, a + lane() % 16 * 16 + lane() / 16 * 8);
    load_matrices<false>(bf, b + (lane() % 8 + lane() / 16 * 8) * 16 + lane() / 8 % 2 * 8);
    mma_16x8x16<T>(d, af, {bf[0], bf[1]});
    warp_sync();
  }
  for (int r = 0; r < 4; ++r) args.out[(lane() / 4 + r / 2 * 8) * 8 + lane() % 4 * 2 + r % 2] = d[r];
}

template <class T>
void run(const void* a, const void* b, float* out, int K, const Stream& stream) {
  LaunchShape shape;
  shape.shared_bytes = 2 * 16 * 16 * sizeof(T);
  launch(mma_probe_kernel<T>, shape, stream, {static_cast<const T*>(a), static_cast<const T*>(b), out, K});
}

struct LaneArgs {
  const void* a;
  const void* b;
  void* out;
  bool transposed;
};

template <class T>
FASTDL_GLOBAL(kWarp, 1)
fragment_probe_kernel(FASTDL_PARAM LaneArgs args) {
  const auto a = static_cast<const Pack<u32, 4>*>(args.a)[lane()];
  const auto b = static_cast<const Pack<u32, 2>*>(args.b)[lane()];
  auto* out = static_cast<Pack<float, 4>*>(args.out) + lane();
  Pack<float, 4> d = *out;
  mma_16x8x16<T>(d.x, a.x, b.x);
  *out = d;
}

FASTDL_GLOBAL(kWarp, 1)
matrix_probe_kernel(FASTDL_PARAM LaneArgs args) {
  auto* x = shared_memory<Pack<u32, 4>>();
  x[lane()] = static_cast<const Pack<u32, 4>*>(args.a)[lane()];
  warp_sync();
  Pack<u32, 4> r;
  load_matrices(r.x, x + lane(), args.transposed);
  static_cast<Pack<u32, 4>*>(args.out)[lane()] = r;
}

template <int n>
FASTDL_GLOBAL(kWarp, 1)
sums_probe_kernel(FASTDL_PARAM LaneArgs args) {
  float x[n];
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = static_cast<const float*>(args.a)[lane() * n + i];
  warp_sums(x);
  static_cast<float*>(args.out)[lane()] = x[0];
}

}  // namespace

void fragment_probe_run(const void* a, const void* b, float* d, DType dtype, const Stream& stream) {
  const LaneArgs args = {a, b, d, false};
  dtype == DType::bf16 ? launch(fragment_probe_kernel<bf16>, {}, stream, args)
                       : launch(fragment_probe_kernel<f16>, {}, stream, args);
}

void matrix_probe_run(const void* x, void* out, bool transposed, const Stream& stream) {
  LaunchShape shape;
  shape.shared_bytes = kWarp * 16;
  launch(matrix_probe_kernel, shape, stream, LaneArgs{x, nullptr, out, transposed});
}

void sums_probe_run(const float* x, int n, float* out, const Stream& stream) {
  const LaneArgs args = {x, nullptr, out, false};
  if (n == 1) return launch(sums_probe_kernel<1>, {}, stream, args);
  if (n == 8) return launch(sums_probe_kernel<8>, {}, stream, args);
  if (n == 32) return launch(sums_probe_kernel<32>, {}, stream, args);
  fail("sums_probe: expected 1, 8 or 32 sums, got ", n);
}

void mma_probe_run(const void* a, const void* b, float* out, int K, DType dtype, const Stream& stream) {
  dtype == DType::bf16 ? run<bf16>(a, b, out, K, stream) : run<f16>(a, b, out, K, stream);
}

}  // namespace fastdl
