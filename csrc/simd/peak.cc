#include "simd/peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "base/arena.h"
#include "base/check.h"
#include "base/cpu_info.h"
#include "base/parallel.h"

namespace fastdl {

#define FASTDL_DECLARE_PEAK(level)                           \
  namespace level {                                          \
  double peak_fma(i64 turns, float* sink);                   \
  void peak_read(const float* data, i64 count, float* sink); \
  }
FASTDL_DECLARE_PEAK(scalar)
#if FASTDL_HAVE_AVX2
FASTDL_DECLARE_PEAK(avx2)
#endif
#if FASTDL_HAVE_AVX512
FASTDL_DECLARE_PEAK(avx512)
#endif
#undef FASTDL_DECLARE_PEAK
#if FASTDL_HAVE_AMX
namespace amx {
double peak_products(i64 turns, float* sink);
}
#endif

namespace {

const PeakLoops kLoops[] = {
#if FASTDL_HAVE_AVX512
    {Isa::kAvx512, avx512::peak_fma, avx512::peak_read},
#endif
#if FASTDL_HAVE_AVX2
    {Isa::kAvx2, avx2::peak_fma, avx2::peak_read},
#endif
    {Isa::kScalar, scalar::peak_fma, scalar::peak_read},
};

// The rows of kLoops at or below a level, best first.
const PeakLoops& loops_for(Isa isa) {
  for (const PeakLoops& l : kLoops)
    if (l.isa <= isa) return l;
  fail("fastdl.measure: no loops");
}

void require(Isa isa) {
  if (!isa_supported(isa)) fail("fastdl.measure: argument 'isa': this machine or build lacks ", isa_name(isa));
}

// Runs turn(thread) on every thread until `seconds` are over, and returns the summed amounts per second. Each thread
// is timed by itself, so that a late start costs nothing.
template <class Turn>
double rate(int threads, double seconds, const Turn& turn) {
  using Clock = std::chrono::steady_clock;
  threads = current_team(threads).threads;
  std::vector<double> rates(static_cast<std::size_t>(threads));
  parallel(threads, [&](int thread, int) {
    turn(thread);
    double amount = 0;
    const auto start = Clock::now();
    std::chrono::duration<double> spent{0};
    do {
      amount += turn(thread);
      spent = Clock::now() - start;
    } while (spent.count() < seconds);
    rates[static_cast<std::size_t>(thread)] = amount / spent.count();
  });
  double sum = 0;
  for (double r : rates) sum += r;
  return sum;
}

}  // namespace

double measure_fma(Isa isa, int threads, double seconds) {
  require(isa);
  const PeakLoops& loops = loops_for(isa);
  return rate(threads, seconds, [&](int) {
    float sink[64];
    return loops.fma(10000, sink);
  });
}

double measure_amx(int threads, double seconds) {
  require(Isa::kAmx);
#if FASTDL_HAVE_AMX
  return rate(threads, seconds, [&](int) {
    float sink;
    return amx::peak_products(10000, &sink);
  });
#else
  (void)threads, (void)seconds;
  return 0;
#endif
}

double measure_read(i64 bytes_per_thread, int threads, double seconds) {
  if (bytes_per_thread < 1024)
    fail("fastdl.measure: argument 'bytes_per_thread': expected at least 1024, got ", bytes_per_thread);
  const i64 count = bytes_per_thread / 1024 * 256;
  const PeakLoops& loops = loops_for(cpu_info().isa);
  threads = current_team(threads).threads;
  ArenaLease memory(threads * count * 4);
  float* const data = reinterpret_cast<float*>(memory.data());
  parallel(threads, [&](int thread, int) {
    for (i64 i = 0; i < count; ++i) data[thread * count + i] = 1.0f;
  });
  return rate(threads, seconds, [&](int thread) {
    float sink[64];
    const i64 repeats = std::max<i64>(1, (1 << 20) / (count * 4));
    for (i64 r = 0; r < repeats; ++r) loops.read(data + thread * count, count, sink);
    return static_cast<double>(repeats * count * 4);
  });
}

}  // namespace fastdl
