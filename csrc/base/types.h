// Plain types shared by every layer, instruction-set units included: no inline code here that a linker could pick
// from a unit built for a newer instruction set than the machine has.
#pragma once
#include <cstdint>

namespace fastdl {

using i64 = std::int64_t;

enum class DType : std::uint8_t { kFloat32 };

// Instruction-set levels in rising order; a level implies those below it.
enum class Isa : std::uint8_t { kScalar, kAvx2, kAvx512, kAmx };
constexpr int kIsaLevels = 4;

}  // namespace fastdl
