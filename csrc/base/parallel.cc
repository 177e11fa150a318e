#include "base/parallel.h"

#include <atomic>

#include "base/cpu_info.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastdl {
namespace {

#if !defined(_OPENMP)
#elif defined(__x86_64__)
using FloatState = unsigned;
FloatState float_state() { return _mm_getcsr(); }
void set_float_state(FloatState s) { _mm_setcsr(s); }
#else
using FloatState = int;
FloatState float_state() { return 0; }
void set_float_state(FloatState) {}
#endif

// libgomp's workers do not survive fork: a child that opens a team waits for threads that are not there.
std::atomic<bool> g_forked{false};
[[maybe_unused]] const int g_fork_handler = [] {
#if defined(__unix__) || defined(__APPLE__)
  return pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });
#else
  return 0;
#endif
}();

}  // namespace

Team current_team(int requested, [[maybe_unused]] double operations) {
#if defined(_OPENMP)
  if (g_forked.load(std::memory_order_relaxed)) return {1, "serial in a forked child"};
  if (omp_in_parallel()) return {1, "serial inside a parallel region"};
  if (requested > 0) return {requested, "as requested"};
  const int threads = omp_get_max_threads();
  constexpr double kWorthTeam = 2e8;  // some 2 ms of one thread: forming the team, and torch's own again, takes 0.2
  if (const int cpus = threads > 1 ? usable_cpus() : 1; cpus < threads) {
    if (cpus > 1 && operations > kWorthTeam) return {cpus, "a thread a CPU: fewer CPUs than torch.get_num_threads()"};
    return {1, "serial: fewer CPUs than threads"};
  }
  return {threads, "torch.get_num_threads()"};
#else
  (void)requested;
  return {1, "serial: " FASTDL_OPENMP_REASON};
#endif
}

Machine this_machine(int threads, double operations) {
  const CpuInfo& cpu = cpu_info();
  return {cpu.isa, current_team(threads, operations).threads, cpu.l1d, cpu.l2, cpu.l3};
}

void parallel_together(int threads, void (*body)(void*, int, int), void* context) {
#if defined(_OPENMP)
  if (threads > 1) {
    const FloatState state = float_state();
#pragma omp parallel num_threads(threads)
    {
      const FloatState own = float_state();
      set_float_state(state);
      body(context, omp_get_thread_num(), omp_get_num_threads());
      set_float_state(own);
    }
    return;
  }
#endif
  body(context, 0, 1);
}

void parallel(int threads, void (*body)(void*, int, int), void* context) {
  // The runtime may grant fewer threads (OMP_THREAD_LIMIT, nesting): then each takes several shares.
  parallel_together(threads, [&](int thread, int granted) {
    for (int t = thread; t < threads; t += granted) body(context, t, threads);
  });
}

namespace {

void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Until *word differs from `seen`, or for no reason.
void sleep_while(std::atomic<int>* word, int seen) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  if (word->load() == seen) std::this_thread::yield();
#endif
}
void wake_all([[maybe_unused]] std::atomic<int>* word) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
}

// Pauses of some 40 cycles: about 50 us, as long as a sleeper takes to be back on a virtual machine. Shorter, one late
// arrival is followed by others: who was woken is late in turn, and the rest sleep (2000 steps of 21 us, two threads,
// 200 / 4000 pauses: 97..150 / 90 ms for two layers). Unless asked for, no team has more threads than there are CPUs.
constexpr int kSpins = 4000;

}  // namespace

void Barrier::wait(int threads) {
  if (threads <= 1) return;
  const int round = round_.load(std::memory_order_relaxed);  // cannot move on before this thread has arrived
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1);  // sequentially consistent with sleepers_: a sleeper sees it, or is seen
    if (sleepers_.load() > 0) wake_all(&round_);
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (round_.load(std::memory_order_acquire) != round) return;
    spin_pause();
  }
  sleepers_.fetch_add(1);
  while (round_.load() == round) sleep_while(&round_, round);
  sleepers_.fetch_sub(1);
}

}  // namespace fastdl
