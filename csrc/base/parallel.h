// Parallel regions on the process's one OpenMP runtime (torch's). A region is serial or the caller's full team:
// libgomp rebuilds its team when the size changes, at 80 us a region against 0.7 us for a hot one.
#pragma once
#include <atomic>

namespace fastdl {

struct Team {
  int threads;
  const char* why;
};

// The team that a region entered now would get. requested > 0 is taken as it is; 0 means torch.get_num_threads(),
// cut to one thread where a team would not run side by side or could not run at all. operations: the multiplies and
// adds of the call; where these take far longer than forming a team of another size, torch's threads are more than
// there are CPUs, and CPUs are more than one, the team has a thread a CPU.
Team current_team(int requested = 0, double operations = 0);

// body(context, thread, threads) on every thread of the team; the caller's floating-point state (rounding, flushing
// of denormals) holds in all of them. body must not throw.
void parallel(int threads, void (*body)(void*, int, int), void* context);

template <class Body>
void parallel(int threads, Body&& body) {
  parallel(threads, [](void* b, int thread, int n) { (*static_cast<Body*>(b))(thread, n); }, &body);
}

// As parallel, for bodies that wait for each other: each of the n <= threads that the runtime grants gets one call,
// body(context, thread, n), and all of them run at once.
void parallel_together(int threads, void (*body)(void*, int, int), void* context);

template <class Body>
void parallel_together(int threads, Body&& body) {
  parallel_together(threads, [](void* b, int thread, int n) { (*static_cast<Body*>(b))(thread, n); }, &body);
}

// Where the threads of parallel_together meet. Waiting spins for some tens of microseconds, then sleeps, so that a team
// with more threads than CPUs does not burn the time of those it waits for. What was written before is seen behind it.
class Barrier {
 public:
  void wait(int threads);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};  // the word that sleepers watch
  std::atomic<int> sleepers_{0};
};

}  // namespace fastdl
