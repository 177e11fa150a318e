// Which elements dropout keeps: a counter-based generator, a function of (seed, batch, head, row, column) alone.
#pragma once
#include "simd/vec.h"

namespace fastdl {
namespace {

// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
FASTDL_INLINE std::uint64_t dropout_mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

FASTDL_INLINE std::uint64_t dropout_row_key(std::uint64_t seed, i64 batch, i64 head, i64 row) {
  std::uint64_t x = dropout_mix(seed);
  x = dropout_mix(x ^ static_cast<std::uint64_t>(batch));
  x = dropout_mix(x ^ static_cast<std::uint64_t>(head));
  return dropout_mix(x ^ static_cast<std::uint64_t>(row));
}

// One 32-bit lane, or a vector of them.
template <int kLanes>
struct Lanes32 {
  typedef unsigned V __attribute__((vector_size(4 * kLanes)));
};
template <>
struct Lanes32<1> {
  using V = unsigned;
};

// 32 bits of columns j in a row of this key. Two rounds of a 32-bit mixer (xor-shift and multiply; constants of C.
// Wellons' hash prospector, public domain), each keyed with one half of the key, so that rows whose first halves are
// neighbours do not share a shifted sequence.
template <int kLanes>
FASTDL_INLINE typename Lanes32<kLanes>::V dropout_bits(std::uint64_t key, typename Lanes32<kLanes>::V j) {
  auto x = j ^ static_cast<unsigned>(key);
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  x += static_cast<unsigned>(key >> 32);
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

}  // namespace
}  // namespace fastdl
