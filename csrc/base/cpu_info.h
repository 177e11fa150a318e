// What this machine is, and which instruction-set level to use on it.
#pragma once
#include <string>
#include <vector>

#include "base/types.h"

namespace fastdl {

// What a plan needs to know of a machine. Pure data, so that plans for other machines can be made and tested here.
struct Machine {
  Isa isa;
  int threads;
  i64 l1d, l2, l3;  // bytes; l3 is the whole shared cache
};

struct CpuInfo {
  std::string vendor, brand;
  std::vector<Isa> supported;  // by the processor, the operating system and this build
  Isa isa;                     // the highest of them within FASTDL_ISA
  std::string cap;             // FASTDL_ISA, or ""
  bool float32_fma;            // FASTDL_FLOAT32=ieee: float32 products by FMA only
  i64 l1d, l2, l3;
};

const CpuInfo& cpu_info();  // detected once; throws Error for values that FASTDL_ISA or FASTDL_FLOAT32 cannot have
const char* isa_name(Isa isa);
bool parse_isa(const std::string& name, Isa* isa);
bool isa_compiled(Isa isa);
bool isa_supported(Isa isa);
bool amx_emulated();  // the level amx runs on a model of the tile unit (CMake option FASTDL_EMULATE_AMX)

// This machine, with the threads of the team that a region entered now would get: see current_team.
Machine this_machine(int threads = 0, double operations = 0);

// CPUs that this process may use: the affinity mask, cut by the cgroup's quota. Re-read at most once a second.
int usable_cpus();

}  // namespace fastdl
