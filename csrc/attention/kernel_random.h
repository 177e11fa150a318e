// The counter-based generator behind dropout: plain arithmetic, the same on a CPU and on a GPU. Which elements are kept
// is a function of (seed, batch, head, row, column) alone.
#pragma once
#include "base/types.h"

namespace fastdl {
namespace {

#define FASTDL_RANDOM __attribute__((always_inline)) inline constexpr

// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
FASTDL_RANDOM std::uint64_t dropout_mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Of all rows of a head; dropout_mix(this ^ row) is the row's key.
FASTDL_RANDOM std::uint64_t dropout_head_key(std::uint64_t seed, i64 batch, i64 head) {
  const std::uint64_t x = dropout_mix(dropout_mix(seed) ^ static_cast<std::uint64_t>(batch));
  return dropout_mix(x ^ static_cast<std::uint64_t>(head));
}
FASTDL_RANDOM std::uint64_t dropout_row_key(std::uint64_t seed, i64 batch, i64 head, i64 row) {
  return dropout_mix(dropout_head_key(seed, batch, head) ^ static_cast<std::uint64_t>(row));
}

// 32 bits of columns j, a number or a vector of them, in a row of this key. Two rounds of a 32-bit mixer (xor-shift and
// multiply; constants of C. Wellons' hash prospector, public domain), each keyed with one half of the key, so that rows
// whose first halves are neighbours do not share a shifted sequence.
template <class Bits>
FASTDL_RANDOM Bits dropout_hash(std::uint64_t key, Bits j) {
  Bits x = j ^ static_cast<unsigned>(key);
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

#undef FASTDL_RANDOM

}  // namespace
}  // namespace fastdl
