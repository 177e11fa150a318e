// Which element is read where: the index arithmetic of convolution on a GPU. Plain constexpr, called by the kernels
// and, on the host, by tests.
//
// Forward and dgrad are a gather (conv/desc.h, ConvAxis), dgrad of stride s one for each phase. As a product of
// matrices its rows are output pixels m = ((n * J0 + j0) * J1 + j1) * J2 + j2, its depth is k = tap * channels + c,
// tap = (t0 * T1 + t1) * T2 + t2. wgrad gathers with the rows and columns of the same matrix.
#pragma once
#include <cstdint>

#include "base/types.h"

namespace fastdl {

// n / divisor for 0 <= n < 2^31 by a multiplication. With p = 31 + l, 2^(l-1) < divisor <= 2^l, multiplier =
// ceil(2^p / divisor) = (2^p + e) / divisor, 0 <= e < divisor, is below 2^32, and n * multiplier / 2^p exceeds n /
// divisor by n * e / (divisor * 2^p) < 1 / divisor, since n * e < 2^31 * 2^l: the integer part is the same.
struct FastDiv {
  std::uint32_t multiplier;
  int shift, divisor;

  constexpr int quotient(int n) const {
    return static_cast<int>(static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * multiplier >> shift);
  }
};
constexpr FastDiv fast_div(int divisor) {
  int l = 0;
  while ((i64{1} << l) < divisor) ++l;
  const std::uint64_t power = std::uint64_t{1} << (31 + l), d = static_cast<std::uint64_t>(divisor);
  return {static_cast<std::uint32_t>((power + d - 1) / d), 31 + l, divisor};
}
// *n becomes the remainder.
constexpr int divide(int* n, const FastDiv& by) {
  const int q = by.quotient(*n);
  *n -= q * by.divisor;
  return q;
}

// Positions and steps of taps stay below this, so that sums of two of them are exact; problems beyond it run the direct
// kernels, in 64 bits.
constexpr int kMostPosition = 1 << 29;
constexpr int kNowhere = -(1 << 30);  // as a position or a step: outside, whatever is added

constexpr int kMostPhases = 16;  // of dgrad, that come in one launch
constexpr int kPackUnit = 8;     // packed rows of weights are whole multiples of it: 16 bytes of any dtype

struct GatherAxis {
  int count, in_step, first, taps, tap_step, out_step, out_first, tap_first, tap_inc;
};

struct GatherPhase {
  GatherAxis axis[3];
  FastDiv by_count[3], by_taps[3];
  int pixels, depth;  // rows, and products of a sum
  int first_pixel;    // of those of all phases
  int first_tile, tiles_m;
  int pack_row;  // depth, up to whole kPackUnit
  i64 pack;      // where its weights begin, in elements: [groups][columns][pack_row]
};

// What is read, from a group's first channel on.
struct GatherSource {
  int size[3];
  i64 n_step, c_step, step[3];
  FastDiv by_channels;  // of a group
};

// What is read for a row and a column lies at the sum of both.
struct GatherPlace {
  i64 offset;
  int z[3];
};
using GatherRow = GatherPlace;  // an output pixel: where its tap 0 lies, and that position
using GatherCol = GatherPlace;  // a tap and a channel, seen from there

constexpr bool inside(const GatherSource& x, const GatherPlace& a, const GatherPlace& b) {
  bool in = true;
  for (int i = 0; i < 3; ++i)
    in = in && static_cast<std::uint32_t>(a.z[i] + b.z[i]) < static_cast<std::uint32_t>(x.size[i]);
  return in;
}

// Groups of few channels that tiles take as one: weights from one to another of them are zeros.
struct GatherGroups {
  int count;                        // that are one
  FastDiv by_channels, by_columns;  // of each
};
// Whether a channel and a column of the groups that are one belong to the same.
constexpr bool same_group(const GatherGroups& g, int channel, int column) {
  return g.count == 1 || g.by_channels.quotient(channel) == g.by_columns.quotient(column);
}

// Pixel m as (n, j).
struct GatherPixel {
  int n, j[3];
};
constexpr GatherPixel gather_pixel(const GatherPhase& p, int m) {
  GatherPixel at = {};
  at.n = m;
  for (int i = 2; i >= 0; --i) {
    const int q = p.by_count[i].quotient(at.n);
    at.j[i] = at.n - q * p.by_count[i].divisor;
    at.n = q;
  }
  return at;
}

constexpr GatherRow gather_row(const GatherPhase& p, const GatherSource& x, int m) {
  GatherRow row = {0, {kNowhere, kNowhere, kNowhere}};
  if (m >= p.pixels) return row;
  const GatherPixel at = gather_pixel(p, m);
  row.offset = at.n * x.n_step;
  for (int i = 0; i < 3; ++i) {
    row.z[i] = at.j[i] * p.axis[i].in_step + p.axis[i].first;
    row.offset += row.z[i] * x.step[i];
  }
  return row;
}

// Tap k of a window, as its index along each dimension.
struct GatherTap {
  int t[3];
};
constexpr GatherTap gather_tap(const GatherPhase& p, int tap) {
  GatherTap at = {};
  for (int i = 2; i >= 0; --i) {
    const int q = p.by_taps[i].quotient(tap);
    at.t[i] = tap - q * p.by_taps[i].divisor;
    tap = q;
  }
  return at;
}

constexpr GatherCol gather_col(const GatherPhase& p, const GatherSource& x, int k) {
  GatherCol col = {0, {kNowhere, kNowhere, kNowhere}};
  if (k >= p.depth) return col;
  const int tap = x.by_channels.quotient(k);
  col.offset = (k - tap * x.by_channels.divisor) * x.c_step;
  const GatherTap at = gather_tap(p, tap);
  for (int i = 0; i < 3; ++i) {
    col.z[i] = at.t[i] * p.axis[i].tap_step;
    col.offset += col.z[i] * x.step[i];
  }
  return col;
}

// Where pixel m is written, from a group's first channel on.
constexpr i64 written_offset(const GatherPhase& p, const i64 (&step)[3], i64 n_step, int m) {
  const GatherPixel at = gather_pixel(p, m);
  i64 offset = at.n * n_step;
  for (int i = 0; i < 3; ++i) offset += static_cast<i64>(at.j[i] * p.axis[i].out_step + p.axis[i].out_first) * step[i];
  return offset;
}

// Where the weight of (tap of the phase) lies, from the element of its channel and column on.
constexpr i64 weight_offset(const GatherPhase& p, const i64 (&step)[3], int tap) {
  const GatherTap at = gather_tap(p, tap);
  i64 offset = 0;
  for (int i = 0; i < 3; ++i) offset += static_cast<i64>(p.axis[i].tap_first + at.t[i] * p.axis[i].tap_inc) * step[i];
  return offset;
}

// Tile `tile` of a grid over all phases: columns change fastest, so that blocks that run together read the same pixels.
struct GatherTile {
  int phase, m, n;  // m and n count tiles
};
constexpr GatherTile gather_tile(const GatherPhase* phases, int count, int tiles_n, int tile) {
  int phase = 0;
  while (phase + 1 < count && tile >= phases[phase + 1].first_tile) ++phase;
  tile -= phases[phase].first_tile;
  return {phase, tile / tiles_n, tile % tiles_n};
}

}  // namespace fastdl
