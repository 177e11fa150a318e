// Element types and their conversions, rounded to nearest even, and the approximations of the special function unit.
#pragma once
#include "ptx/target.cuh"

#if FASTDL_TWIN
#include <cmath>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastdl {

FASTDL_DEVICE u32 float_bits(float x) {
  u32 bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
FASTDL_DEVICE float bits_float(u32 bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

#if FASTDL_TWIN

FASTDL_DEVICE std::uint16_t to_bf16_bits(float x) {
  const u32 bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
FASTDL_DEVICE std::uint16_t to_f16_bits(float x) {
  const u32 bits = float_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u)                                                      // below 2^-14: a multiple of 2^-24
    return static_cast<std::uint16_t>(sign | static_cast<u32>(std::nearbyint(std::fabs(x) * 16777216.0f)));
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}
FASTDL_DEVICE float from_f16_bits(std::uint16_t h) {
  const u32 sign = static_cast<u32>(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bits_float(float_bits(static_cast<float>(mantissa) / 16777216.0f) | sign);
  return bits_float(sign | ((exponent + 112) << 23) | mantissa << 13);
}
FASTDL_DEVICE float exp2_approx(float x) { return std::exp2(x); }
FASTDL_DEVICE float reciprocal_approx(float x) { return 1.0f / x; }
FASTDL_DEVICE float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
FASTDL_DEVICE float magnitude(float x) { return std::fabs(x); }
FASTDL_DEVICE float larger(float a, float b) { return std::fmax(a, b); }

#else

FASTDL_DEVICE std::uint16_t to_bf16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FASTDL_DEVICE std::uint16_t to_f16_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
FASTDL_DEVICE float from_f16_bits(std::uint16_t h) { return __half2float(__ushort_as_half(h)); }
// 2 units in the last place; subnormal operands and results are zeros.
FASTDL_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTDL_DEVICE float reciprocal_approx(float x) { return __frcp_rn(x); }
FASTDL_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTDL_DEVICE float magnitude(float x) {
  float y;
  asm("abs.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The other one where one is NaN.
FASTDL_DEVICE float larger(float a, float b) {
  float y;
  asm("max.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

#endif

template <class T>
FASTDL_DEVICE T from_float(float x);
template <>
FASTDL_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FASTDL_DEVICE bf16 from_float<bf16>(float x) {
  return {to_bf16_bits(x)};
}
template <>
FASTDL_DEVICE f16 from_float<f16>(float x) {
  return {to_f16_bits(x)};
}
FASTDL_DEVICE float to_float(float x) { return x; }
FASTDL_DEVICE float to_float(bf16 x) { return bits_float(static_cast<u32>(x.bits) << 16); }
FASTDL_DEVICE float to_float(f16 x) { return from_f16_bits(x.bits); }

// Two elements in a register, the first in the low half.
template <class T>
FASTDL_DEVICE u32 pack2(float low, float high) {
  return static_cast<u32>(from_float<T>(low).bits) | static_cast<u32>(from_float<T>(high).bits) << 16;
}

}  // namespace fastdl
