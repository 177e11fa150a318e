// What the machine can do at best: loops of nothing but FMA, tile products or loads, for "% of peak" in benchmarks.
#pragma once
#include <string>

#include "base/types.h"

namespace fastdl {

// All three return a rate per second over `threads` threads (0: the current team) and throw Error where this machine
// or build lacks the level.
double measure_fma(Isa isa, int threads, double seconds);                // float32 operations
double measure_amx(int threads, double seconds);                         // bfloat16 operations
double measure_read(i64 bytes_per_thread, int threads, double seconds);  // bytes

// One turn of each loop, for the instruction-set units that implement them (peak_<level>.cc).
struct PeakLoops {
  Isa isa;
  double (*fma)(i64 turns, float* sink);                    // returns operations done
  void (*read)(const float* data, i64 count, float* sink);  // count is a multiple of 256
};

}  // namespace fastdl
