#include "ptx/twin/fiber.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "ptx/twin/races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastdl::twin {

#if defined(__SANITIZE_THREAD__)
void will_read(const void* p, std::size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
void will_write(void* p, std::size_t bytes) { __tsan_write_range(p, bytes); }
#else
void will_read(const void*, std::size_t) {}
void will_write(void*, std::size_t) {}
#endif

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;

struct Copy {
  void* dst;
  const void* src;
  int bytes, valid, group;
};

struct Barrier {
  int expected = 0;
  char meeting[2];  // addresses for ThreadSanitizer, of every other round
  int round = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  const char* name = nullptr;
  WarpBody body = nullptr;
  int arrived = 0;
  char meeting[2];
  int round = 0;
  const void* in[kWarp];
  void* out[kWarp];
  std::vector<Fiber*> waiting;
};

struct Block {
  int index[3];
  void* shared = nullptr;
  std::map<int, Barrier> barriers;
  std::vector<Warp> warps;
};

}  // namespace

struct Fiber {
  Thread thread;
  Block* block;
  char* stack = nullptr;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false, spinning = false;
  int group = 0;  // of copies, that is being filled
  void* thread_sanitizer = nullptr;
  std::vector<Copy> copies;
  const char* waits_for = "";
};

namespace {

struct Scheduler {
  std::uint64_t seed = 0, state = 0;
  std::vector<Fiber*> ready;
  Fiber* running = nullptr;
  const Warp* ahead = nullptr;  // the warp that ran last, unless it only spins
  jmp_buf home;
  std::exception_ptr error;
  const std::function<void()>* body = nullptr;
  std::vector<char*> stacks;  // free ones
  bool stop = false;
  long long spins = 0;  // since somebody last did something else
  void* thread_sanitizer = nullptr;
  char finished;  // the address is ThreadSanitizer's
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
#endif
};
thread_local Scheduler g;
thread_local Counts g_counts;

std::uint64_t random_bits() {  // xorshift64 (Marsaglia 2003)
  g.state ^= g.state << 13;
  g.state ^= g.state >> 7;
  g.state ^= g.state << 17;
  return g.state;
}

// Leaves the running fiber for the scheduler.
void leave() {
  Fiber* self = g.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self->done ? nullptr : &fake, g.bottom, g.size);
#endif
#if defined(__SANITIZE_THREAD__)
  if (self->done || _setjmp(self->resume) == 0) {
    __tsan_switch_to_fiber(g.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
    _longjmp(g.home, 1);
  }
#else
  if (self->done || _setjmp(self->resume) == 0) _longjmp(g.home, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &g.bottom, &g.size);
#endif
  if (g.stop) throw Error("twin: stopped");
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g.bottom, &g.size);
#endif
  try {
    (*g.body)();
    const Unseen unseen;
    for (const Copy& copy : g.running->copies)
      if (copy.valid >= 0) fail("a thread ended with copies in flight");
  } catch (...) {
    const Unseen unseen;
    if (!g.error) g.error = std::current_exception();
    g.stop = true;
  }
  g.running->done = true;
  come(&g.finished);
  leave();
}

void switch_to(Fiber* fiber) {
  g.running = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&g.fake, fiber->stack, kStackBytes);
#endif
  if (_setjmp(g.home) == 0) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber->thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    setcontext(&fiber->start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(g.fake, nullptr, nullptr);
#endif
  g.running = nullptr;
}

char* take_stack() {
  if (!g.stacks.empty()) {
    char* stack = g.stacks.back();
    g.stacks.pop_back();
    return stack;
  }
  void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw Error("twin: no memory for a fiber");
  mprotect(p, 4096, PROT_NONE);  // an overflow faults
  return static_cast<char*>(p);
}

void start(Fiber* fiber) {
  fiber->stack = take_stack();
#if defined(__SANITIZE_THREAD__)
  fiber->thread_sanitizer = __tsan_create_fiber(0);
#endif
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack;
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, enter, 0);
}

Warp& warp_of(const Fiber& fiber) { return fiber.block->warps[static_cast<std::size_t>(fiber.thread.thread / kWarp)]; }

Fiber* next_ready() {
  std::size_t i = g.seed ? random_bits() % g.ready.size() : 0;
  // Seeds from 1000 on: mostly the warp that ran last, as long as it can go on, else the thread woken last: a warp runs
  // far ahead of those that it has not met yet.
  if (g.seed >= 1000 && random_bits() % 16 != 0) {
    i = g.ready.size() - 1;
    for (std::size_t j = i + 1; j-- > 0;)
      if (&warp_of(*g.ready[j]) == g.ahead) {
        i = j;
        break;
      }
    g.ahead = &warp_of(*g.ready[i]);
  }
  Fiber* fiber = g.ready[i];
  g.ready.erase(g.ready.begin() + static_cast<std::ptrdiff_t>(i));
  return fiber;
}

// Runs blocks [begin, end) of the grid together.
void run_blocks(const int (&grid)[3], const std::vector<int>& blocks, int threads, std::size_t shared_bytes) {
  std::vector<std::unique_ptr<Block>> live;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int number : blocks) {
    auto block = std::make_unique<Block>();
    block->index[0] = number % grid[0];
    block->index[1] = number / grid[0] % grid[1];
    block->index[2] = number / grid[0] / grid[1];
    block->warps.resize(static_cast<std::size_t>((threads + kWarp - 1) / kWarp));
    if (shared_bytes > 0) {
      block->shared = std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024);
      if (!block->shared) throw Error("twin: no memory for shared memory");
      std::memset(block->shared, 0xff, (shared_bytes + 1023) / 1024 * 1024);
    }
    for (int t = 0; t < threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread.thread = t;
      for (int d = 0; d < 3; ++d) fiber->thread.block[d] = block->index[d], fiber->thread.grid[d] = grid[d];
      fiber->thread.shared = block->shared;
      fiber->thread.shared_bytes = shared_bytes;
      fiber->thread.fiber = fiber.get();
      fiber->block = block.get();
      start(fiber.get());
      g.ready.push_back(fiber.get());
      fibers.push_back(std::move(fiber));
    }
    live.push_back(std::move(block));
  }
  g.spins = 0;
  g.ahead = nullptr;
  while (!g.ready.empty()) switch_to(next_ready());

  std::string stuck;
  if (!g.stop) {
    for (const auto& fiber : fibers)
      if (!fiber->done && stuck.empty())
        stuck = concat("twin: deadlock: thread ", fiber->thread.thread, " of block (", fiber->thread.block[0], ", ",
                       fiber->thread.block[1], ", ", fiber->thread.block[2], ") waits for ever at ", fiber->waits_for);
  }
  if (!stuck.empty()) g.error = std::make_exception_ptr(Error(stuck));
  g.stop = true;  // the fibers that still wait unwind their stacks
  for (const auto& fiber : fibers)
    while (!fiber->done && fiber->started) switch_to(fiber.get());
  g.stop = false;
  g.ready.clear();
#if defined(__SANITIZE_THREAD__)
  for (const auto& fiber : fibers) {
    __tsan_destroy_fiber(fiber->thread_sanitizer);
    munmap(fiber->stack, kStackBytes);  // nothing orders the next block behind this one, who would write there
  }
#else
  for (const auto& fiber : fibers) g.stacks.push_back(fiber->stack);
#endif
  for (const auto& block : live) std::free(block->shared);
  if (g.error) std::rethrow_exception(std::exchange(g.error, nullptr));
}

void wake(std::vector<Fiber*>* waiting) {
  for (Fiber* fiber : *waiting) g.ready.push_back(fiber);
  waiting->clear();
}

}  // namespace

const Thread& current() { return g.running->thread; }
Counts& counts() { return g_counts; }

void set_seed(std::uint64_t seed) { g.seed = seed; }

void fail(const char* what) {
  const Thread& t = current();
  fastdl::fail("twin: ", what, ": thread ", t.thread, " of block (", t.block[0], ", ", t.block[1], ", ", t.block[2],
               ")");
}

void run(const int (&grid)[3], int threads, std::size_t shared_bytes, bool cooperative,
         const std::function<void()>& body) {
  const Unseen unseen;
#if defined(__SANITIZE_THREAD__)
  g.thread_sanitizer = __tsan_get_current_fiber();
#endif
  if (threads % kWarp != 0) fastdl::fail("twin: expected whole warps, got ", threads, " threads");
  g.state = g.seed * 0x9e3779b97f4a7c15u + 1;
  g.body = &body;
  std::vector<int> order(static_cast<std::size_t>(grid[0]) * static_cast<std::size_t>(grid[1]) *
                         static_cast<std::size_t>(grid[2]));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  if (g.seed)
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  if (cooperative) {
    run_blocks(grid, order, threads, shared_bytes);
  } else {
    for (int block : order) run_blocks(grid, {block}, threads, shared_bytes);
  }
  go(&g.finished);
}

void barrier(int id, int threads) {
  const Unseen unseen;
  Fiber* self = g.running;
  Barrier& b = self->block->barriers[id];
  char* const meeting = b.meeting + b.round % 2;
  if (b.waiting.empty()) b.expected = threads;
  if (b.expected != threads) fail("threads disagree on the size of a barrier");
  g.spins = 0;
  b.waiting.push_back(self);
  self->waits_for = "a barrier";
  come(meeting);
  if (static_cast<int>(b.waiting.size()) == threads) ++b.round, wake(&b.waiting);
  leave();
  go(meeting);
}

void spin() {
  const Unseen unseen;
  if (g.ready.empty()) fail("deadlock: spins with nobody left to run");
  if (++g.spins > 2000000) fail("livelock: nothing but spinning");
  g.ready.push_back(g.running);
  if (g.seed >= 1000) std::swap(g.ready.back(), g.ready[random_bits() % g.ready.size()]);
  g.ahead = nullptr;
  leave();
}

void warp_collective(const char* name, const void* in, void* out, WarpBody body) {
  const Unseen unseen;
  Fiber* self = g.running;
  Warp& w = warp_of(*self);
  const int lane = self->thread.thread % kWarp;
  if (w.arrived == 0) w.name = name, w.body = body;
  if (std::strcmp(w.name, name) != 0) fail("lanes of a warp are at different instructions");
  g.spins = 0;
  w.in[lane] = in;
  w.out[lane] = out;
  self->waits_for = name;
  w.waiting.push_back(self);
  char* const meeting = w.meeting + w.round % 2;
  if (!body) come(meeting);  // bar.warp.sync alone
  if (++w.arrived == kWarp) {
    ++g_counts.collectives;
    w.arrived = 0;
    ++w.round;
    if (body) body(w.in, w.out);
    wake(&w.waiting);
  }
  leave();
  if (!body) go(meeting);
}

void copy_async(void* dst, const void* src, int bytes, int valid) {
  will_write(dst, static_cast<std::size_t>(bytes)), will_read(src, static_cast<std::size_t>(std::max(valid, 0)));
  const Unseen unseen;
  const Thread& t = current();
  const char* begin = static_cast<const char*>(t.shared);
  if (reinterpret_cast<std::uintptr_t>(dst) % static_cast<unsigned>(bytes) != 0)
    fail("cp.async: unaligned destination");
  if (valid > 0 && reinterpret_cast<std::uintptr_t>(src) % static_cast<unsigned>(bytes) != 0)
    fail("cp.async: unaligned source");
  if (static_cast<char*>(dst) < begin || static_cast<char*>(dst) + bytes > begin + t.shared_bytes)
    fail("cp.async: the destination is not in shared memory");
  std::memset(dst, 0xff, static_cast<std::size_t>(bytes));
  t.fiber->copies.push_back({dst, src, bytes, valid, t.fiber->group});
}

void copy_commit() {
  const Unseen unseen;
  ++current().fiber->group;
}

void copy_wait(int groups_in_flight) {
  Fiber* self = current().fiber;
  for (const Copy& c : self->copies)
    if (c.group < self->group - groups_in_flight) will_write(c.dst, static_cast<std::size_t>(c.bytes));
  const Unseen unseen;
  g.ready.push_back(self);  // while the others may see what is not there yet
  leave();
  const int done = self->group - groups_in_flight;
  auto& copies = self->copies;
  for (const Copy& c : copies) {
    if (c.group >= done) continue;
    std::memcpy(c.dst, c.src, static_cast<std::size_t>(c.valid));
    std::memset(static_cast<char*>(c.dst) + c.valid, 0, static_cast<std::size_t>(c.bytes - c.valid));
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), [done](const Copy& c) { return c.group < done; }),
               copies.end());
}

}  // namespace fastdl::twin
