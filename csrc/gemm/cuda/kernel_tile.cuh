// The tile product on tensor cores: C += A * B, A [16s,16], B [16,8s], out of shared memory, one warp.
//
//   SharedTile<T, rows, cols>        a tile in shared memory, swizzled: no reader below meets bank conflicts
//   load_a, load_a_transposed        the 16x16 of A at (m, k) of a tile stored [M][K], [K][M]
//   load_b, load_b_transposed        the 16x16 of B at (k, n) of a tile stored [N][K], [K][N]
//   WarpTile<T, parts, kM, kN>       the sums of a warp, and the products that add to them
//
// float tiles become one, two or three bfloat16 parts in registers: each part is what the ones before leave, rounded,
// so that three hold a float32 exactly; float products are then sums of products of parts (Products1, 3, 6).
#pragma once
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"

namespace fastdl {

// --- shared memory -------------------------------------------------------------------------------------------------
// Which chunk of its row a chunk is stored at: chunk ^ tile_swizzle(row).
// 2-byte elements: the 8 rows that ldmatrix reads together lie in 8 different banks of 16 bytes; rows shorter than 128
// bytes share a line of them.
// float: whole pairs of chunks move, by two bits. What a half-warp (8-byte loads: rows g) or a warp (4-byte loads: rows
// 2t, 2t + 1 or those plus 8) touches differs in the row bits (0, 1) or (1, 2): each pair gives all four values.
template <int element_bytes, int cols>
constexpr int tile_swizzle(int row) {
  if (element_bytes == 4) return 2 * (((row >> 1 ^ row >> 3) & 1) | ((row ^ row >> 2) & 1) << 1);
  constexpr int chunks = cols / 8, rows_of_line = chunks < 8 ? 8 / chunks : 1;
  return row / rows_of_line % (chunks < 8 ? chunks : 8);
}

template <class T, int kRows, int kCols>
struct SharedTile {
  using Element = T;
  static constexpr int rows = kRows, cols = kCols;
  static constexpr int chunk = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int bytes = kRows * kCols * static_cast<int>(sizeof(T));
  static_assert(kCols % (sizeof(T) == 4 ? 32 : 16) == 0 && (kCols & (kCols - 1)) == 0, "whole, swizzled lines");

  T* data;  // 128-byte aligned

  static constexpr int offset(int row, int col) {
    return row * kCols + ((col / chunk ^ tile_swizzle<sizeof(T), kCols>(row)) * chunk | col % chunk);
  }
  FASTDL_DEVICE T* at(int row, int col) const { return data + offset(row, col); }
};

// --- parts ---------------------------------------------------------------------------------------------------------
// What a product is of: the type of mma's operands.
template <class T>
struct ProductOf {
  using Type = T;
};
template <>
struct ProductOf<float> {
  using Type = bf16;
};

// Which parts are multiplied, in order: small products come before large ones.
template <int parts>
struct Products;
template <>
struct Products<1> {
  static constexpr int count = 1;
  static constexpr int a(int) { return 0; }
  static constexpr int b(int) { return 0; }
};
template <>
struct Products<2> {  // 2^-16
  static constexpr int count = 3;
  static constexpr int a(int i) { return i == 2; }
  static constexpr int b(int i) { return i == 0; }
};
template <>
struct Products<3> {  // float32's own accuracy
  static constexpr int count = 6;
  static constexpr int a(int i) { return i == 4 ? 2 : i == 2 || i == 3; }
  static constexpr int b(int i) { return i == 0 ? 2 : i == 1 || i == 2; }
};

// Registers of a 16x16 operand. A: as mma takes it. B: x[.][0..1] of columns 0 to 7, x[.][2..3] of columns 8 to 15.
template <int kParts>
struct Fragment {
  static constexpr int parts = kParts;
  u32 x[kParts][4];
};

// Register r of the parts of the pair (low, high), neighbours along K.
template <int parts>
FASTDL_DEVICE void split_pair(Fragment<parts>* f, int r, float low, float high) {
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    const u32 pair = pack2<bf16>(low, high);
    f->x[p][r] = pair;
    low -= bits_float(pair << 16);
    high -= bits_float(pair & 0xffff0000u);
  }
}

// The largest magnitudes, of the elements that this lane has loaded: x[0] of its row g = lane / 4 of A (column of B),
// x[1] of g + 8. NaN is passed over: what comes of it shows in the sums.
struct Peak {
  float x[2] = {};
  FASTDL_DEVICE void see(int half, float a, float b) { x[half] = larger(larger(x[half], magnitude(a)), magnitude(b)); }
};

// --- fragments -----------------------------------------------------------------------------------------------------
namespace tile_detail {

// Line i of the operand (a row of A, a column of B) is a row of the tile. a: register r holds line r % 2 * 8 of k =
// r / 2 * 8; b: the other way round.
template <bool a, int parts, class Tile>
FASTDL_DEVICE void load_rows(Fragment<parts>* f, const Tile& tile, int line, int k, Peak* peak) {
  if constexpr (sizeof(typename Tile::Element) == 2) {
    static_assert(parts == 1, "16-bit elements are multiplied as they are");
    const int i = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    load_matrices<false>(f->x[0], tile.at(line + i + (a ? low : high), k + (a ? high : low)));
    (void)peak;
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int half = a ? r % 2 : r / 2, deep = a ? r / 2 : r % 2;
      const auto* p =
          reinterpret_cast<const Pack<float, 2>*>(tile.at(line + lane() / 4 + half * 8, k + lane() % 4 * 2 + deep * 8));
      const Pack<float, 2> x = *p;
      if (peak) peak->see(half, x.x[0], x.x[1]);
      split_pair(f, r, x.x[0], x.x[1]);
    }
  }
}

// Line i of the operand is a column of the tile.
template <bool a, int parts, class Tile>
FASTDL_DEVICE void load_columns(Fragment<parts>* f, const Tile& tile, int line, int k, Peak* peak) {
  if constexpr (sizeof(typename Tile::Element) == 2) {
    static_assert(parts == 1, "16-bit elements are multiplied as they are");
    const int i = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    load_matrices<true>(f->x[0], tile.at(k + i + (a ? high : low), line + (a ? low : high)));
    (void)peak;
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int half = a ? r % 2 : r / 2, row = k + lane() % 4 * 2 + (a ? r / 2 : r % 2) * 8;
      const int col = line + lane() / 4 + half * 8;
      const float low = *tile.at(row, col), high = *tile.at(row + 1, col);
      if (peak) peak->see(half, low, high);
      split_pair(f, r, low, high);
    }
  }
}

}  // namespace tile_detail

template <int parts, class Tile>
FASTDL_DEVICE void load_a(Fragment<parts>* f, const Tile& tile, int m, int k, Peak* peak = nullptr) {
  tile_detail::load_rows<true>(f, tile, m, k, peak);
}
template <int parts, class Tile>
FASTDL_DEVICE void load_a_transposed(Fragment<parts>* f, const Tile& tile, int m, int k, Peak* peak = nullptr) {
  tile_detail::load_columns<true>(f, tile, m, k, peak);
}
template <int parts, class Tile>
FASTDL_DEVICE void load_b(Fragment<parts>* f, const Tile& tile, int k, int n, Peak* peak = nullptr) {
  tile_detail::load_rows<false>(f, tile, n, k, peak);
}
template <int parts, class Tile>
FASTDL_DEVICE void load_b_transposed(Fragment<parts>* f, const Tile& tile, int k, int n, Peak* peak = nullptr) {
  tile_detail::load_columns<false>(f, tile, n, k, peak);
}

// --- products ------------------------------------------------------------------------------------------------------
// d[16,8c] += a * b: d[j] as mma has it, of 8 columns, b[j / 2] of 16. The columns take turns: products that follow
// each other do not wait for each other.
template <class T, int parts, int kCols>
FASTDL_DEVICE void multiply_parts(float (&d)[kCols][4], const Fragment<parts>& a, const Fragment<parts>* b) {
  using Of = typename ProductOf<T>::Type;
#pragma unroll
  for (int i = 0; i < Products<parts>::count; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const u32(&y)[4] = b[j / 2].x[Products<parts>::b(i)];
      mma_16x8x16<Of>(d[j], a.x[Products<parts>::a(i)], {y[j % 2 * 2], y[j % 2 * 2 + 1]});
    }
}

// The same. Tensor cores cut sums off instead of rounding them, at the size of what they add to: three parts start
// afresh at each step, so that but one of the six products meets sums of full size, and are added by ordinary
// additions. (The twin, K = 300, rms of the error over the sum of magnitudes, in 1e-8: carried on for 256 K 17, afresh
// 2, MKL 2.)
template <class T, int parts, int kCols>
FASTDL_DEVICE void multiply(float (&d)[kCols][4], const Fragment<parts>& a, const Fragment<parts>* b) {
  if constexpr (parts < 3) {
    multiply_parts<T>(d, a, b);
  } else {
    float step[kCols][4] = {};
    multiply_parts<T>(step, a, b);
#pragma unroll
    for (int j = 0; j < kCols; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) d[j][r] += step[j][r];
  }
}

// Of 16 columns, their halves d0 and d1; carried on: for callers whose sums start afresh by themselves.
template <class T, int parts>
FASTDL_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const Fragment<parts>& a, const Fragment<parts>& b) {
  using Of = typename ProductOf<T>::Type;
#pragma unroll
  for (int i = 0; i < Products<parts>::count; ++i) {
    const u32(&x)[4] = a.x[Products<parts>::a(i)];
    const u32(&y)[4] = b.x[Products<parts>::b(i)];
    mma_16x8x16<Of>(d0, x, {y[0], y[1]});
    mma_16x8x16<Of>(d1, x, {y[2], y[3]});
  }
}

// After how much of K sums start afresh, where they must be better than 16 bits: see mma.cuh. Three parts need nothing.
constexpr int kPromoteDepth = 256;

// Sums [kM,kN] of a warp. Element (i, j): d[i / 16][j / 8][i % 16 / 8 * 2 + j % 2] of lane i % 8 * 4 + j % 8 / 2.
template <class T, int kParts, int kM, int kN>
struct WarpTile {
  static_assert(kM % 16 == 0 && kN % 16 == 0, "whole fragments");
  static constexpr int parts = kParts, rows = kM, cols = kN;
  float d[kM / 16][kN / 8][4];

  FASTDL_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) d[i][j][r] = 0;
  }
  // Adds `part` to these sums, by ordinary additions, and clears it.
  FASTDL_DEVICE void promote(WarpTile* part) {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) d[i][j][r] += part->d[i][j][r];
    part->clear();
  }
  // One step of 16 along K: A(m.., k..) of a tile stored [M][K], or [K][M] if a_transposed; B(k.., n..) of one stored
  // [N][K], or [K][N] if b_transposed. Peaks: of the kM / 16 and kN / 16 fragments, or null.
  template <bool a_transposed, bool b_transposed, class TileA, class TileB>
  FASTDL_DEVICE void add(const TileA& a, const TileB& b, int m, int n, int k, Peak* a_peaks = nullptr,
                         Peak* b_peaks = nullptr) {
    Fragment<kParts> y[kN / 16];
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      Peak* const peak = b_peaks ? b_peaks + j : nullptr;
      if constexpr (b_transposed)
        load_b_transposed(&y[j], b, k, n + 16 * j, peak);
      else
        load_b(&y[j], b, k, n + 16 * j, peak);
    }
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      Fragment<kParts> x;
      Peak* const peak = a_peaks ? a_peaks + i : nullptr;
      if constexpr (a_transposed)
        load_a_transposed(&x, a, m + 16 * i, k, peak);
      else
        load_a(&x, a, m + 16 * i, k, peak);
      multiply<T>(d[i], x, y);
    }
  }
};
// Row and column of register r of d[0][0] in this lane.
FASTDL_DEVICE int sum_row(int r) { return lane() / 4 + r / 2 * 8; }
FASTDL_DEVICE int sum_col(int r) { return lane() % 4 * 2 + r % 2; }

// --- checked by the compiler ---------------------------------------------------------------------------------------
namespace tile_detail {

// Whether the lanes that share a pass (4-byte loads: 32, 8-byte: 16) touch each of the 32 banks at most once.
template <int cols, bool transposed>
constexpr bool float_loads_conflict_free() {
  using Tile = SharedTile<float, 32, cols>;
  for (int base = 0; base < 32; base += transposed ? 1 : 16)
    for (int row0 = 0; row0 < 32; row0 += transposed ? 16 : 8)
      for (int part = 0; part < 2; ++part) {  // halves of the warp; rows and the ones 8 further
        unsigned banks = 0;
        int count = 0;
        for (int l = transposed ? 0 : 16 * part; l < (transposed ? 32 : 16 * part + 16); ++l) {
          const int g = l / 4, t = l % 4;
          const int at = transposed ? Tile::offset(row0 + 2 * t + 8 * part + base % 2, base / 8 * 8 + g)
                                    : Tile::offset(row0 + g, base + 2 * t);
          banks |= 1u << at % 32, ++count;
          if (!transposed) banks |= 1u << (at + 1) % 32, ++count;
        }
        unsigned found = 0;
        for (unsigned x = banks; x; x &= x - 1) ++found;
        if (found != static_cast<unsigned>(count)) return false;
      }
  return true;
}
static_assert(float_loads_conflict_free<32, false>() && float_loads_conflict_free<32, true>());
static_assert(float_loads_conflict_free<64, false>() && float_loads_conflict_free<64, true>());
static_assert(float_loads_conflict_free<128, false>() && float_loads_conflict_free<128, true>());

}  // namespace tile_detail

}  // namespace fastdl
