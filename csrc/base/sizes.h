// Arithmetic of sizes and addresses, for schedules: instruction-set units include none of it (see types.h).
#pragma once
#include "base/types.h"

namespace fastdl {

constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
constexpr i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

constexpr i64 pages(i64 bytes) { return round_up(bytes, 4096); }  // so many bytes, in whole pages

constexpr int item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }  // bytes
inline const void* at(const void* p, i64 elements, DType dtype) {
  return static_cast<const char*>(p) + elements * item_size(dtype);
}
inline void* at(void* p, i64 elements, DType dtype) { return static_cast<char*>(p) + elements * item_size(dtype); }

}  // namespace fastdl
