#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/launch.h"
#include "ptx/mma.cuh"
#include "ptx/probe.h"

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

}  // namespace

void mma_probe_run(const void* a, const void* b, float* out, int K, DType dtype, const Stream& stream) {
  dtype == DType::bf16 ? run<bf16>(a, b, out, K, stream) : run<f16>(a, b, out, K, stream);
}

}  // namespace fastdl
