// Barriers, and memory that blocks of one grid speak through.
#pragma once
#include "ptx/target.cuh"

namespace fastdl {

#if FASTDL_TWIN

FASTDL_DEVICE void barrier_sync(int id, int threads) { twin::barrier(id, threads); }
FASTDL_DEVICE void warp_sync() { twin::warp_collective("bar.warp.sync", nullptr, nullptr, nullptr); }
FASTDL_DEVICE void fence_grid() {}
FASTDL_DEVICE u32 load_acquire(const u32* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
FASTDL_DEVICE void store_release(u32* p, u32 value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
FASTDL_DEVICE u32 add_release(u32* p, u32 value) { return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL); }
FASTDL_DEVICE void spin_pause() { twin::spin(); }

#else

// bar.sync: `threads` threads, whole warps, of the block meet at barrier `id` (0 to 15).
FASTDL_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
FASTDL_DEVICE void warp_sync() { __syncwarp(); }
FASTDL_DEVICE void fence_grid() { __threadfence(); }
FASTDL_DEVICE u32 load_acquire(const u32* p) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
FASTDL_DEVICE void store_release(u32* p, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}
// The value before.
FASTDL_DEVICE u32 add_release(u32* p, u32 value) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
  return before;
}
FASTDL_DEVICE void spin_pause() { __nanosleep(20); }

#endif

// All threads of the block, `threads` in number.
FASTDL_DEVICE void block_sync(int threads) { barrier_sync(0, threads); }

// All blocks of a cooperative launch; `count` starts at 0 and is the grid's own. `round` counts the calls, from 1. What
// any thread wrote before it, all threads read behind it: the block's barrier orders the writes of its threads before
// thread 0's addition, which releases them to the GPU (release and acquire are cumulative), and the other way round
// behind the load that acquires.
FASTDL_DEVICE void grid_sync(u32* count, u32 round, u32 blocks, int threads) {
  block_sync(threads);
  if (thread_x() == 0) {
    add_release(count, 1);
    while (static_cast<std::int32_t>(load_acquire(count) - round * blocks) < 0) spin_pause();  // both wrap around
  }
  block_sync(threads);
}

}  // namespace fastdl
