// Values that move between the lanes of a whole warp.
#pragma once
#include "ptx/target.cuh"

namespace fastdl {

#if FASTDL_TWIN

struct ShuffleIn {
  u32 value;
  int source;
};
FASTDL_DEVICE u32 shuffle_bits(u32 value, int source) {
  const ShuffleIn in = {value, source % kWarp};
  u32 out;
  twin::warp_collective("shfl.sync", &in, &out, [](const void* const* all, void* const* results) {
    for (int i = 0; i < kWarp; ++i) {
      const int from = static_cast<const ShuffleIn*>(all[i])->source;
      *static_cast<u32*>(results[i]) = static_cast<const ShuffleIn*>(all[from])->value;
    }
  });
  return out;
}
FASTDL_DEVICE u32 ballot(bool predicate) {
  const u32 in = predicate;
  u32 out;
  twin::warp_collective("vote.sync", &in, &out, [](const void* const* all, void* const* results) {
    u32 bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= *static_cast<const u32*>(all[i]) << i;
    for (int i = 0; i < kWarp; ++i) *static_cast<u32*>(results[i]) = bits;
  });
  return out;
}

#else

FASTDL_DEVICE u32 shuffle_bits(u32 value, int source) { return __shfl_sync(0xffffffffu, value, source); }
FASTDL_DEVICE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

#endif

// value as lane `source` has it; 4-byte types.
template <class T>
FASTDL_DEVICE T shuffle(T value, int source) {
  static_assert(sizeof(T) == 4, "a register");
  u32 bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = shuffle_bits(bits, source);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
template <class T>
FASTDL_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, lane() ^ mask);
}
// Over `lanes` neighbours (a power of two), the same in all of them, in an order fixed by the lanes.
template <int lanes = kWarp>
FASTDL_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
// NaN stays in its lane and is passed over by the others.
template <int lanes = kWarp>
FASTDL_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const float y = shuffle_xor(x, mask);
    x = y > x ? y : x;
  }
  return x;
}

template <int half, int mask, int n>
FASTDL_DEVICE void warp_sums_step(float (&x)[n]) {
  if constexpr (half > 0) {
    const bool upper = lane() & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float low = x[i], high = x[i + half];
      x[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, mask);
    }
    warp_sums_step<half / 2, mask / 2>(x);
  }
}
// x[0] of lane l becomes the sum over all lanes of x[l / (32 / n)], n a power of two up to 32: each step hands half of
// the sums to the other half of the lanes. The rest of x is lost.
template <int n>
FASTDL_DEVICE void warp_sums(float (&x)[n]) {
  static_assert(n > 0 && n <= kWarp && (n & (n - 1)) == 0, "a power of two");
  warp_sums_step<n / 2, kWarp / 2>(x);
  x[0] = warp_sum<kWarp / n>(x[0]);
}

}  // namespace fastdl
