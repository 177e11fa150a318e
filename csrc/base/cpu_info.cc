#include "base/cpu_info.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "base/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdl {
namespace {

constexpr const char* kNames[kIsaLevels] = {"scalar", "avx2", "avx512", "avx512bf16", "amx"};
constexpr bool kCompiled[kIsaLevels] = {true, FASTDL_HAVE_AVX2 != 0, FASTDL_HAVE_AVX512 != 0,
                                        FASTDL_HAVE_AVX512BF16 != 0, FASTDL_HAVE_AMX != 0};

#if defined(__x86_64__)
struct Regs {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Regs cpuid(unsigned leaf, unsigned sub = 0) {
  Regs r;
  if (static_cast<unsigned>(__get_cpuid_max(leaf & 0x80000000u, nullptr)) >= leaf)
    __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
  return r;
}

unsigned enabled_state() {  // XCR0: register files that the operating system saves
  if (!(cpuid(1).c >> 27 & 1)) return 0;
  unsigned lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return lo;
}

// Linux hands out the 8 KB of tile data only to processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM, tile data = 18).
bool request_amx() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool processor_has(Isa isa) {
  const Regs basic = cpuid(1), ext = cpuid(7);
  const unsigned state = enabled_state();
  const auto bit = [](unsigned reg, int n) { return (reg >> n & 1) != 0; };
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:  // AVX2, FMA, F16C and saved YMM state
      return bit(ext.b, 5) && bit(basic.c, 12) && bit(basic.c, 29) && (state & 0x6) == 0x6;
    case Isa::kAvx512:  // F, DQ, BW, VL and saved ZMM and mask state
      return processor_has(Isa::kAvx2) && bit(ext.b, 16) && bit(ext.b, 17) && bit(ext.b, 30) && bit(ext.b, 31) &&
             (state & 0xe6) == 0xe6;
    case Isa::kAvx512Bf16:
      return processor_has(Isa::kAvx512) && bit(cpuid(7, 1).a, 5);
    case Isa::kAmx:  // AMX-TILE, AMX-BF16, and the kernel's permission
      if (amx_emulated()) return processor_has(Isa::kAvx512Bf16);
      return processor_has(Isa::kAvx512Bf16) && bit(ext.d, 24) && bit(ext.d, 22) && (state & 0x60000) == 0x60000 &&
             request_amx();
  }
  return false;
}

std::string vendor() {
  const Regs r = cpuid(0);
  char name[13] = {};
  std::memcpy(name, &r.b, 4);
  std::memcpy(name + 4, &r.d, 4);
  std::memcpy(name + 8, &r.c, 4);
  return name;
}

std::string brand() {
  char name[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Regs r = cpuid(0x80000002u + i);
    std::memcpy(name + 16 * i, &r, 16);
  }
  const std::string s = name;
  const auto begin = s.find_first_not_of(' '), end = s.find_last_not_of(' ');
  return begin == std::string::npos ? "" : s.substr(begin, end - begin + 1);
}
#else
bool processor_has(Isa isa) { return isa == Isa::kScalar; }
std::string vendor() { return "unknown"; }
std::string brand() { return "unknown"; }
#endif

// Bytes of a data cache of CPU 0. sysfs before sysconf: glibc adds up the L3 slices of a virtual machine's host.
i64 cache_bytes(int level, i64 otherwise) {
  for (int index = 0; index < 8; ++index) {
    const std::string dir = concat("/sys/devices/system/cpu/cpu0/cache/index", index, "/");
    int found = 0;
    std::string type;
    i64 kib = 0;
    std::ifstream(dir + "level") >> found;
    std::ifstream(dir + "type") >> type;
    std::ifstream(dir + "size") >> kib;  // "1024K"
    if (found == level && type != "Instruction" && kib > 0) return kib << 10;
  }
  return otherwise;
}

CpuInfo detect() {
  CpuInfo info;
  info.vendor = vendor();
  info.brand = brand();
  for (int i = 0; i < kIsaLevels; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (kCompiled[i] && processor_has(isa)) info.supported.push_back(isa);
  }
  Isa cap = Isa::kAmx;
  if (const char* env = std::getenv("FASTDL_ISA")) {
    info.cap = env;
    if (!info.cap.empty() && !parse_isa(info.cap, &cap))
      fail("fastdl: FASTDL_ISA: expected scalar, avx2, avx512, avx512bf16 or amx, got '", info.cap, "'");
  }
  const char* float32 = std::getenv("FASTDL_FLOAT32");
  info.float32_fma = float32 && std::string(float32) == "ieee";
  if (float32 && *float32 && !info.float32_fma) fail("fastdl: FASTDL_FLOAT32: expected ieee, got '", float32, "'");
  info.isa = Isa::kScalar;
  for (Isa isa : info.supported)
    if (isa <= cap) info.isa = isa;
  info.l1d = cache_bytes(1, 32 << 10);
  info.l2 = cache_bytes(2, 1 << 20);
  info.l3 = cache_bytes(3, 8 << 20);
  return info;
}

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// CPUs that the cgroup's quota pays for, rounded up; a large number where there is no quota.
int quota_cpus() {
  double quota = -1, period = 0;
  std::string word;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> word >> period) {
    if (word != "max") quota = std::atof(word.c_str());
  } else {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota <= 0 || period <= 0) return 1 << 20;
  return std::max(1, static_cast<int>((quota + period - 1) / period));
}

}  // namespace

const CpuInfo& cpu_info() {
  static const CpuInfo info = detect();
  return info;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool parse_isa(const std::string& name, Isa* isa) {
  for (int i = 0; i < kIsaLevels; ++i) {
    if (name == kNames[i]) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

bool amx_emulated() { return FASTDL_EMULATE_AMX != 0; }

bool isa_compiled(Isa isa) { return kCompiled[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
  const auto& s = cpu_info().supported;
  return std::find(s.begin(), s.end(), isa) != s.end();
}

int usable_cpus() {
  using Clock = std::chrono::steady_clock;
  static std::atomic<i64> expires{0};
  static std::atomic<int> cpus{1};
  const i64 now = Clock::now().time_since_epoch().count();
  if (now >= expires.load(std::memory_order_acquire)) {
    cpus.store(std::min(affinity_cpus(), quota_cpus()), std::memory_order_relaxed);
    expires.store(now + Clock::duration(std::chrono::seconds(1)).count(), std::memory_order_release);
  }
  return cpus.load(std::memory_order_relaxed);
}

}  // namespace fastdl
