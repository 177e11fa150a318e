#include "ptx/twin/faults.h"

#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/launch.h"
#include "ptx/shuffle.cuh"

namespace fastdl {
namespace {

constexpr int kThreads = 64;

struct Args {
  const float* in;
  float* out;
  u32* count;
  bool planted;
};

// Every kernel reverses 64 floats by way of shared memory.
void missing_barrier(const Args args) {
  float* s = shared_memory<float>();
  s[thread_x()] = args.in[thread_x()];
  if (!args.planted) block_sync(kThreads);
  args.out[thread_x()] = s[kThreads - 1 - thread_x()];
}

void missing_wait(const Args args) {
  float* s = shared_memory<float>();
  copy_async<4>(s + thread_x(), args.in + thread_x());
  copy_commit();
  if (!args.planted) copy_wait<0>();
  block_sync(kThreads);
  args.out[thread_x()] = s[kThreads - 1 - thread_x()];
  copy_wait<0>();
}

void wait_for_one_group_too_few(const Args args) {
  float* s = shared_memory<float>();
  copy_async<4>(s + thread_x(), args.in + thread_x());
  copy_commit();
  if (args.planted) copy_wait<1>();
  if (!args.planted) copy_wait<0>();
  block_sync(kThreads);
  args.out[thread_x()] = s[kThreads - 1 - thread_x()];
  copy_wait<0>();
}

// The second copy may land before the other warp has read the first.
void buffer_reused_too_early(const Args args) {
  float* s = shared_memory<float>();
  for (int round = 0; round < 2; ++round) {
    copy_async<4>(s + thread_x(), args.in + thread_x());
    copy_commit();
    copy_wait<0>();
    block_sync(kThreads);
    if (round == 0) args.out[thread_x()] = s[kThreads - 1 - thread_x()];
    if (!args.planted) block_sync(kThreads);
  }
}

void lanes_apart(const Args args) {
  float* s = shared_memory<float>();
  const float x = args.in[thread_x()];
  if (args.planted && lane() == 3) ballot(true);
  s[warp() * kWarp + kWarp - 1 - lane()] = shuffle(x, lane());
  block_sync(kThreads);
  args.out[thread_x()] = s[(1 - warp()) * kWarp + lane()];
}

void not_all_at_the_barrier(const Args args) {
  float* s = shared_memory<float>();
  s[thread_x()] = args.in[thread_x()];
  if (!args.planted || thread_x() != 40) block_sync(kThreads);
  args.out[thread_x()] = s[kThreads - 1 - thread_x()];
}

void spins_for_ever(const Args args) {
  missing_barrier({args.in, args.out, args.count, false});
  if (thread_x() == 0 && block_x() == 0) add_release(args.count, 1);
  while (load_acquire(args.count) < (args.planted ? 2u : 1u)) spin_pause();
}

void unaligned_matrix_row(const Args args) {
  float* s = shared_memory<float>();
  s[thread_x()] = args.in[thread_x()];
  block_sync(kThreads);
  u32 r[4];
  load_matrices<false>(r, reinterpret_cast<const char*>(s) + (args.planted ? 8 : 0));
  args.out[thread_x()] = s[kThreads - 1 - thread_x()];
}

void copy_past_shared_memory(const Args args) {
  float* s = shared_memory<float>();
  copy_async<4>(s + thread_x() + (args.planted ? 1 : 0), args.in + thread_x());
  copy_commit();
  copy_wait<0>();
  block_sync(kThreads);
  args.out[thread_x()] = s[kThreads - 1 - thread_x()];
}

struct Fault {
  const char* name;
  void (*kernel)(const Args);
};
constexpr Fault kFaults[] = {
    {"missing_barrier", missing_barrier},
    {"missing_wait", missing_wait},
    {"wait_for_one_group_too_few", wait_for_one_group_too_few},
    {"buffer_reused_too_early", buffer_reused_too_early},
    {"lanes_apart", lanes_apart},
    {"not_all_at_the_barrier", not_all_at_the_barrier},
    {"spins_for_ever", spins_for_ever},
    {"unaligned_matrix_row", unaligned_matrix_row},
    {"copy_past_shared_memory", copy_past_shared_memory},
};

}  // namespace

namespace twin {

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const Fault& fault : kFaults) names.push_back(fault.name);
  return names;
}

void run_fault(const std::string& name, bool planted, const float* in, float* out) {
  u32 count = 0;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = kThreads * static_cast<int>(sizeof(float));
  for (const Fault& fault : kFaults)
    if (name == fault.name) return launch(fault.kernel, shape, {}, Args{in, out, &count, planted});
  fastdl::fail("run_fault: argument 'name': no fault '", name, "'");
}

}  // namespace twin
}  // namespace fastdl
