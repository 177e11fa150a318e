// What a kernel is written in: CUDA C++ under nvcc; plain C++ in the host twin (FASTDL_TWIN=1), where the threads of a
// block are fibers (twin/fiber.h), so that the same source runs, and is tested, where there is no GPU.
//
//   FASTDL_GLOBAL(threads, blocks) name(FASTDL_PARAM Args args)   a kernel; blocks: per multiprocessor, at least
//   FASTDL_DEVICE                                                 a function that kernels call
//   thread_x() block_x() block_y() block_z() grid_x()             indices; lane() and warp() of a thread
//   shared_memory<T>()                                            the block's dynamic shared memory, 1024-byte aligned
//
// Index arithmetic (swizzles, fragment maps, schedulers) is plain constexpr: both sides and the tests call it.
// The instructions of this folder are the only ones that kernels use by name; each has its twin beside it.
#pragma once
#include <cstdint>

#include "base/types.h"

#if FASTDL_TWIN
#include "ptx/twin/fiber.h"
#define FASTDL_GLOBAL(threads, blocks) void
#define FASTDL_PARAM const
#define FASTDL_DEVICE inline
#else
#define FASTDL_GLOBAL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTDL_PARAM const __grid_constant__
#define FASTDL_DEVICE __device__ __forceinline__
#endif

namespace fastdl {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr int kWarp = 32;

#if FASTDL_TWIN
FASTDL_DEVICE int thread_x() { return twin::current().thread; }
FASTDL_DEVICE int block_x() { return twin::current().block[0]; }
FASTDL_DEVICE int block_y() { return twin::current().block[1]; }
FASTDL_DEVICE int block_z() { return twin::current().block[2]; }
FASTDL_DEVICE int grid_x() { return twin::current().grid[0]; }
template <class T>
FASTDL_DEVICE T* shared_memory() {
  return static_cast<T*>(twin::current().shared);
}
#else
FASTDL_DEVICE int thread_x() { return static_cast<int>(threadIdx.x); }
FASTDL_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FASTDL_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FASTDL_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
FASTDL_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
extern __shared__ __align__(1024) unsigned char g_shared_memory[];
template <class T>
FASTDL_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(g_shared_memory);
}
#endif

FASTDL_DEVICE int lane() { return thread_x() % kWarp; }
FASTDL_DEVICE int warp() { return thread_x() / kWarp; }

// x, of which the compiler knows nothing: what is computed from it stays where it is written, not ahead of a loop in
// registers of its own.
#if FASTDL_TWIN
FASTDL_DEVICE int opaque(int x) { return x; }
#else
FASTDL_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
#endif

// N values that move as one: 16 bytes at most, aligned to their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

}  // namespace fastdl
