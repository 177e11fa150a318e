// Tiles that come element by element, where chunks of 16 bytes do not lie together: few channels, pixels as neighbours
// in memory, odd strides or addresses.
//
// Floats are copied asynchronously, like chunks. Elements of 2 bytes no asynchronous copy takes: a thread reads a
// `round` of its share into registers, multiplies the step at hand, and only then stores them to the tile.
#pragma once
#include "gemm/cuda/kernel_tile.cuh"

namespace fastdl {

template <class T>
FASTDL_DEVICE T conv_zero() {
  return from_float<T>(0.0f);
}

// A thread's elements of a tile: number e is (r + e * dr, c + e * dc). One of the two stays, so that what is known of
// it is read once; neighbouring threads take neighbouring rows if `down`, else columns.
struct ElementWalk {
  int r, dr, c, dc;
};
template <int rows, int cols, int threads>
FASTDL_DEVICE ElementWalk element_walk(bool down) {
  static_assert(threads % rows == 0 && threads % cols == 0, "one row, or one column, is a thread's own");
  const int t = opaque(thread_x());  // worked out again each time: registers are for sums
  return down ? ElementWalk{t % rows, 0, t / rows, threads / rows} : ElementWalk{t / cols, threads / cols, t % cols, 0};
}

template <class Tile, int threads, int kRounds>
struct ElementLoader {
  using T = typename Tile::Element;
  static constexpr bool held = sizeof(T) < 4;  // in registers
  static constexpr int rounds = kRounds, all = Tile::rows * Tile::cols / threads, count = all / kRounds;
  static_assert(all % kRounds == 0, "whole rounds");

  T x[held ? count : 1] = {};

  static FASTDL_DEVICE ElementWalk walk(bool down) { return element_walk<Tile::rows, Tile::cols, threads>(down); }

  // source(e): where element e lies, or null for zero.
  template <class Source>
  FASTDL_DEVICE void fetch(int round, const Source& source) {
#pragma unroll
    for (int e = 0; e < count; ++e) {
      const T* const p = source(round * count + e);
      x[e] = p ? *p : conv_zero<T>();
    }
  }
  FASTDL_DEVICE void put(int round, const Tile& to, bool down) const {
    const ElementWalk at = walk(down);
#pragma unroll
    for (int e = 0; e < count; ++e) {
      const int i = round * count + e;
      *to.at(at.r + i * at.dr, at.c + i * at.dc) = x[e];
    }
  }
  // `any`: an address that could be read.
  template <class Source>
  static FASTDL_DEVICE void copy(const Tile& to, bool down, const T* any, const Source& source) {
    const ElementWalk at = walk(down);
#pragma unroll 4
    for (int i = 0; i < all; ++i) {
      const T* const p = source(i);
      copy_async<4>(to.at(at.r + i * at.dr, at.c + i * at.dc), p ? p : any, p ? 4 : 0);
    }
  }
};

}  // namespace fastdl
