// Plain types shared by every layer, instruction-set units included: no inline code here that a linker could pick
// from a unit built for a newer instruction set than the machine has.
#pragma once
#include <cstdint>

namespace fastdl {

using i64 = std::int64_t;

enum class DType : std::uint8_t { f32, bf16, f16 };
constexpr int kItemSize[] = {4, 2, 2};  // bytes, by DType

// Storage only; vector levels convert them (simd/vec.h).
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// Instruction-set levels in rising order; a level implies those below it.
enum class Isa : std::uint8_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr int kIsaLevels = 5;

}  // namespace fastdl
