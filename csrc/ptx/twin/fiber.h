// The host twin of a GPU: the threads of a block run as fibers of one host thread, blocks one after the other (all
// together in a cooperative launch). A seeded scheduler switches at every barrier, warp instruction and spin, in any
// order that a GPU may: code that needs one order fails. Shared memory starts as NaN bytes; a block's is an allocation
// of its own, so that AddressSanitizer sees its end. Where no fiber can go on, the launch throws and says what waits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace fastdl::twin {

struct Fiber;

// Of the running fiber.
struct Thread {
  int thread;  // of the block
  int block[3], grid[3];
  void* shared;
  std::size_t shared_bytes;
  Fiber* fiber;
};
const Thread& current();

// blocks x threads calls of `body`. Throws what a fiber throws.
void run(const int (&grid)[3], int threads, std::size_t shared_bytes, bool cooperative,
         const std::function<void()>& body);

// The order of the fibers; 0: each runs until it waits, in turn. Else random, from this seed; from
// 1000 on, warps run far ahead of each other.
void set_seed(std::uint64_t seed);

// Waits until `threads` threads of the block have come to barrier `id`.
void barrier(int id, int threads);
// Gives the others a turn: what a thread that spins on memory calls. Throws when nobody else can ever run.
void spin();

// One warp instruction: each lane hands in the address of its operands and of its results; the last to come carries it
// out for all. `name` must be the same in all 32 lanes.
using WarpBody = void (*)(const void* const* in, void* const* out);
void warp_collective(const char* name, const void* in, void* out, WarpBody body);

// cp.async: the destination is NaN bytes until the thread has waited for the group; the source is read then.
void copy_async(void* dst, const void* src, int bytes, int valid);
void copy_commit();
void copy_wait(int groups_in_flight);

// For ThreadSanitizer: what a warp instruction, which one lane carries out for all, touches on behalf of this thread.
void will_read(const void* p, std::size_t bytes);
void will_write(void* p, std::size_t bytes);

[[noreturn]] void fail(const char* what);

// Counted since the last reset: extra shared-memory passes of ldmatrix for bank conflicts, and warp instructions.
struct Counts {
  long long conflicts = 0, collectives = 0;
};
Counts& counts();

}  // namespace fastdl::twin
