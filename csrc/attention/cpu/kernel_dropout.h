// Which elements dropout keeps: attention/kernel_random.h, a vector of columns at a time.
#pragma once
#include "attention/kernel_random.h"
#include "simd/vec.h"

namespace fastdl {
namespace {

// One 32-bit lane, or a vector of them.
template <int kLanes>
struct Lanes32 {
  typedef unsigned V __attribute__((vector_size(4 * kLanes)));
};
template <>
struct Lanes32<1> {
  using V = unsigned;
};

template <int kLanes>
FASTDL_INLINE typename Lanes32<kLanes>::V dropout_bits(std::uint64_t key, typename Lanes32<kLanes>::V j) {
  return dropout_hash(key, j);
}

}  // namespace
}  // namespace fastdl
