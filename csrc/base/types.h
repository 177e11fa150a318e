// Plain types shared by every layer, instruction-set units included: no inline code here that a linker could pick
// from a unit built for a newer instruction set than the machine has.
#pragma once
#include <cstdint>

namespace fastdl {

using i64 = std::int64_t;

enum class DType : std::uint8_t { f32, bf16, f16 };

// How exact products of float32 operands are, in falling order; a kernel at least as exact as asked may run.
enum class Precision : std::uint8_t {
  fma,   // rounded float32 operands as they are
  ieee,  // three bfloat16 parts of each operand, six products: within float32's own error
  tf32,  // two parts, three products: 2^-16
  bf16,  // rounded to bfloat16: 2^-8
};

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
