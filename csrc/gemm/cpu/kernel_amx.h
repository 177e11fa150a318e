// GEMM on tiles of bfloat16 parts (kernel_split.h): the products of parts that matter are summed.
#pragma once
#include "gemm/cpu/kernel_split.h"

namespace fastdl {
namespace {

// --- products ------------------------------------------------------------------------------------------------------
// Which parts are multiplied, in order: each step changes one operand, small products come before large ones.
struct Products1 {
  static constexpr int parts = 1, count = 1, a[] = {0}, b[] = {0};
};
struct Products3 {
  static constexpr int parts = 2, count = 3, a[] = {0, 0, 1}, b[] = {1, 0, 0};
};
struct Products4 {
  static constexpr int parts = 2, count = 4, a[] = {1, 1, 0, 0}, b[] = {1, 0, 0, 1};
};
struct Products6 {
  static constexpr int parts = 3, count = 6, a[] = {0, 0, 1, 1, 2, 0}, b[] = {2, 1, 1, 0, 0, 0};
};

// Where the tiles of an operand lie, in bytes: lines of a tile, tiles side by side in a panel, parts, steps of K.
struct TileLayout {
  const char* p;
  i64 line, tile, part, depth;
};

// A: packed where a_col is the panel's rows, else rows of bf16 a_row floats apart, [ceil(K/32)][part][32] each (a_col
// 1).
template <class P>
FASTDL_INLINE TileLayout layout_a(const TileArgs& t) {
  const char* const p = static_cast<const char*>(t.a);
  if (t.a_col == 1) return {p, t.a_row * 4, 16 * t.a_row * 4, kTileRowBytes, P::parts * kTileRowBytes};
  const i64 part = (t.a_col < kBlock ? 1 : 2) * kTileBytes;
  return {p, kTileRowBytes, kTileBytes, part, P::parts * part};
}
template <class P>
FASTDL_INLINE TileLayout layout_packed_b(const TileArgs& t) {
  return {static_cast<const char*>(t.b), kTileRowBytes, kTileBytes, 2 * kTileBytes, P::parts * 2 * kTileBytes};
}
// B: packed where b_row is the panel's columns, else rows of pairs b_row floats apart, [ceil(K/32)][part][16][b_row].
template <class P>
FASTDL_INLINE TileLayout layout_b(const TileArgs& t) {
  if (t.b_row == kBlock) return layout_packed_b<P>(t);
  const i64 row = t.b_row * 4;
  return {static_cast<const char*>(t.b), row, kTileRowBytes, 16 * row, P::parts * 16 * row};
}

// The operand that comes from L2 once for each block goes past L1, where the other one stays.
enum class Stream { none, a, b };
template <bool kPast, int T>
FASTDL_INLINE void load(const char* p, i64 line) {
  if constexpr (kPast) {
    tile_stream<T>(p, line);
  } else {
    tile_load<T>(p, line);
  }
}

// Rows of C: 16*kRows, columns 16*kCols, in tiles 0 to 3; A in 4 and 5, B in 6 and 7.
template <class P, Stream kStream, int kRows, int kCols, int I>
FASTDL_INLINE void multiply(const TileLayout& a, const char* at_a, const TileLayout& b, const char* at_b) {
  if constexpr (I < P::count) {
    constexpr int before = I == 0 ? 0 : I - 1;
    constexpr bool new_a = I == 0 || P::a[I] != P::a[before], new_b = I == 0 || P::b[I] != P::b[before];
    const char* const tile_a = at_a + P::a[I] * a.part;
    const char* const tile_b = at_b + P::b[I] * b.part;
    if constexpr (new_a) load<kStream == Stream::a, 4>(tile_a, a.line);
    if constexpr (new_b) load<kStream == Stream::b, 6>(tile_b, b.line);
    tile_dpbf16ps<0, 4, 6>();
    if constexpr (new_a && kRows > 1) load<kStream == Stream::a, 5>(tile_a + a.tile, a.line);
    if constexpr (kRows > 1) tile_dpbf16ps<2, 5, 6>();
    if constexpr (new_b && kCols > 1) load<kStream == Stream::b, 7>(tile_b + b.tile, b.line);
    if constexpr (kCols > 1) tile_dpbf16ps<1, 4, 7>();
    if constexpr (kRows > 1 && kCols > 1) tile_dpbf16ps<3, 5, 7>();
    multiply<P, kStream, kRows, kCols, I + 1>(a, at_a, b, at_b);
  }
}

// Asks for what TileArgs::ahead says, spread over the products, the second range from the block on that finds the first
// done. Where there is much of it and little to multiply, the processor's own prefetch is faster: software's holds its
// few buffers. (Granite Rapids, two threads, bfloat16, 16 x 4096 x 4096 with / without: 600 / 850 GFLOP/s; 512 x 3072 x
// 768 frozen: 2790 / 2510.)
struct Fetch {
  static constexpr i64 kMost = 8, kMostOfStrip = 128;  // lines a turn
  Ahead now = {}, next = {};
  i64 each = 0;

  Fetch() = default;
  Fetch(const Ahead (&ahead)[2], i64 turns, i64 most = kMost) {
    each = turns > 0 ? (ahead[0].left + ahead[1].left + turns - 1) / turns : 0;
    if (each > most) return;
    now = ahead[ahead[0].left == 0], next = ahead[1];
    if (ahead[0].left == 0) next = {};
  }
  FASTDL_INLINE void turn() {
    for (i64 i = each < now.left ? each : now.left; i > 0; --i, --now.left) {
      __builtin_prefetch(now.p + now.line * 64, 0, 2);
      if (++now.line == now.per_row) now.line = 0, now.p += now.step;
    }
  }
};

// The steps of 32 elements along K that are multiplied, from `begin` to `end` of all: those of A lie in runs of `each`,
// at[r] floats from the first; null: one behind the other.
struct Steps {
  i64 begin, end, each;
  const i64* at = nullptr;
};

// A block of C: m x n elements, rows `row` apart. (Scalars: TileArgs, copied as vectors just after its fields were set,
// waits for all stores before, those of the tiles, too: 28% of a 1x1 convolution of 64 channels.)
struct Sums {
  float* c;
  i64 row, m, n;
  bool accumulate;
};
FASTDL_INLINE Sums sums_of(const TileArgs& t) { return {t.c, t.c_row, t.m, t.n, t.accumulate}; }

// One that is not whole, zeros past its end.
template <int kRows, int kCols>
FASTDL_INLINE void copy_block(const Sums& t, float* out) {
  for (int i = 0; i < 16 * kRows; ++i) {
    for (int v = 0; v < kCols; ++v) {
      const int left = i < t.m ? static_cast<int>(t.n) - 16 * v : 0;
      const auto mask = L::first(left < 0 ? 0 : left < 16 ? left : 16);
      L::store(out + i * kBlock + 16 * v, L::load(t.c + (left > 0 ? i * t.row + 16 * v : 0), mask));
    }
  }
}

// kNear: C is in a near cache and goes on in the tiles where it stands, whole blocks and others alike: how C is cut
// among threads is not to be seen in its bits.
template <class P, bool kNear, Stream kStream, int kRows, int kCols>
void block(const Sums& t, const TileLayout& a_, const TileLayout& b_, const Steps& steps, Fetch* fetch) {
  const TileLayout a = a_, b = b_;
  Fetch local;  // tiles are loaded behind the compiler's back: what others may see would stay in memory
  if (fetch) local = *fetch;
  const bool whole = t.m == 16 * kRows && t.n == 16 * kCols, onto = kNear && t.accumulate;
  alignas(64) float sum[kBlock][kBlock];
  const bool direct = whole && (onto || !t.accumulate);
  float* const c = direct ? t.c : sum[0];
  const i64 row = direct ? t.row : kBlock;
  for (int i = 0; !kNear && i < t.m; ++i) {  // C comes from memory while the products run
    __builtin_prefetch(t.c + i * t.row, 1);
    __builtin_prefetch(t.c + i * t.row + t.n - 1, 1);
  }
  if (onto) {
    if (!whole) copy_block<kRows, kCols>(t, sum[0]);
    tile_load<0>(c, row * 4);
    if constexpr (kCols > 1) tile_load<1>(c + 16, row * 4);
    if constexpr (kRows > 1) tile_load<2>(c + 16 * row, row * 4);
    if constexpr (kRows > 1 && kCols > 1) tile_load<3>(c + 16 * row + 16, row * 4);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  const char* at_b = b.p + steps.begin * b.depth;
  i64 k = steps.begin;
  const auto run = [&](const char* at_a, i64 end) __attribute__((always_inline)) {
    for (; k < end; ++k, at_a += a.depth, at_b += b.depth) {
      local.turn();
      multiply<P, kStream, kRows, kCols, 0>(a, at_a, b, at_b);
    }
  };
  if (!steps.at) {
    run(a.p + k * a.depth, steps.end);
  } else {
    while (k < steps.end) {
      const i64 r = k / steps.each, next = (r + 1) * steps.each;
      run(a.p + steps.at[r] * 4 + (k - r * steps.each) * a.depth, next < steps.end ? next : steps.end);
    }
  }
  if (fetch) {
    fetch->now = local.now;
    if (local.now.left == 0) fetch->now = fetch->next, fetch->next = {};
  }

  tile_store<0>(c, row * 4);
  if constexpr (kCols > 1) tile_store<1>(c + 16, row * 4);
  if constexpr (kRows > 1) tile_store<2>(c + 16 * row, row * 4);
  if constexpr (kRows > 1 && kCols > 1) tile_store<3>(c + 16 * row + 16, row * 4);
  if (direct) return;
  for (int v = 0; v < kCols; ++v) {
    const auto mask = L::first(t.n - 16 * v < 16 ? static_cast<int>(t.n) - 16 * v : 16);
    for (int i = 0; i < t.m; ++i) {
      float* const to = t.c + i * t.row + 16 * v;
      auto x = L::load(sum[i] + 16 * v);
      if (t.accumulate && !onto) x = L::add(L::load(to, mask), x);
      L::store(to, x, mask);
    }
  }
}

template <class P, bool kNear = false, Stream kStream = Stream::none>
FASTDL_INLINE void run_block(const Sums& t, const TileLayout& a, const TileLayout& b, const Steps& steps,
                             Fetch* fetch = nullptr) {
  if (t.m > 16)
    return t.n > 16 ? block<P, kNear, kStream, 2, 2>(t, a, b, steps, fetch)
                    : block<P, kNear, kStream, 2, 1>(t, a, b, steps, fetch);
  return t.n > 16 ? block<P, kNear, kStream, 1, 2>(t, a, b, steps, fetch)
                  : block<P, kNear, kStream, 1, 1>(t, a, b, steps, fetch);
}
template <class P>
FASTDL_INLINE Steps all_steps(const TileArgs& t) {
  const i64 steps = t.k / (16 * P::parts);
  return {0, steps, steps};
}
template <class P, bool kNear = false>
void run_block(const TileArgs& t) {
  run_block<P, kNear>(sums_of(t), layout_a<P>(t), layout_b<P>(t), all_steps<P>(t));
}
// Panels of any depth: a chunk of B, as much as stays in L1, is multiplied with all of the rows before the next; the
// sums wait in L1 meanwhile. A comes from L2, past L1 where it is not used again soon.
template <class P, bool kNear, Stream kStream>
void run_panels(const TileArgs& t, const Steps& steps) {
  constexpr i64 kChunk = (P::parts == 1 ? 384 : 512) / kTileDepth;
  TileLayout a = layout_a<P>(t);
  const TileLayout b = layout_packed_b<P>(t);
  const char* const first = a.p;
  const i64 all = steps.end, chunks = all == 0 ? 1 : (all + kChunk - 1) / kChunk;
  const i64 a_block = t.a_col == 1 ? kBlock * a.line : all * a.depth;
  Fetch fetch(t.ahead, (t.m + kBlock - 1) / kBlock * all);
  for (i64 c = 0; c < chunks; ++c) {
    const Steps some = {all * c / chunks, all * (c + 1) / chunks, steps.each, steps.at};
    a.p = first;
    for (int i = 0; i < t.m; i += kBlock, a.p += a_block) {
      const Sums x = {t.c + i * t.c_row, t.c_row, t.m - i < kBlock ? t.m - i : kBlock, t.n, t.accumulate || c > 0};
      run_block<P, kNear, kStream>(x, a, b, some, &fetch);
    }
  }
}
// A as rows of bfloat16, a_row floats apart, a matrix for each part, a_col floats apart; B packed.
template <class P>
void run_rows(const TileArgs& t) {
  const i64 row = t.a_row * 4;
  run_block<P, P::parts == 1, Stream::b>(sums_of(t),
                                         {static_cast<const char*>(t.a), row, 16 * row, t.a_col * 4, kTileRowBytes},
                                         layout_packed_b<P>(t), all_steps<P>(t));
}

// --- what tiles get wrong ------------------------------------------------------------------------------------------
// See SuspectArgs. Magnitudes are compared as integers where NaN must count as large.
inline bool suspects(const SuspectArgs& s, unsigned rows[kBlock]) {
  const __m512i infinity = _mm512_set1_epi32(0x7f800000);
  const L::M lanes[2] = {L::first(s.n < 16 ? s.n : 16), L::first(s.n > 16 ? s.n - 16 : 0)};
  L::V b[2] = {L::zero(), L::zero()};
  L::M some[2] = {0, 0};  // columns that are not all zeros
  float b_least = 0;
  if (s.b_peak) {
    unsigned least = ~0u;
    for (int v = 0; v < 2; ++v) {
      b[v] = L::load(s.b_peak + 16 * v, lanes[v]);
      some[v] = _mm512_cmp_ps_mask(b[v], L::zero(), _CMP_GT_OQ);
      const unsigned x = _mm512_mask_reduce_min_epu32(some[v], bits(b[v]));
      least = x < least ? x : least;
    }
    b_least = float_of(least);  // NaN when all are zeros: compares as false
  }
  unsigned any = 0;
  for (int i = 0; i < s.m; ++i) {
    const float a = s.a_peak ? s.a_peak[i] : 0;
    const bool tiny = a > 0 && (a < kTinyPeak || b_least < kTinyPeak || a * b_least < kTinyProduct);
    rows[i] = 0;
    for (int v = 0; v < 2; ++v) {
      const auto x = L::load(s.sum + i * s.sum_row + 16 * v, lanes[v]);
      unsigned bad = _mm512_cmpge_epu32_mask(magnitude(x), infinity);
      if (tiny) {
        const unsigned small = _mm512_cmp_ps_mask(b[v], L::set1(kTinyPeak), _CMP_LT_OQ) |
                               _mm512_cmp_ps_mask(L::mul(L::set1(a), b[v]), L::set1(kTinyProduct), _CMP_LT_OQ);
        bad |= some[v] & (a < kTinyPeak ? 0xffffu : small);
      }
      rows[i] |= bad << (16 * v);
    }
    any |= rows[i];
  }
  return any != 0;
}

// See GemmHelpers::unpack_b: the sum of the parts is the element, and columns that were scaled are scaled back.
template <class S>
void unpack_tiles(const float* packed, i64 k_count, int n, int panel, const float* peak, float* dst) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const i64 part = panel / 16 * kTileFloats;
  for (int j = 0; j < panel; j += 16) {
    auto scale = L::set1(1);
    if (peak && j < n) {
      const auto p = L::load(peak + j, L::first(n - j < 16 ? n - j : 16));
      const auto tiny = _mm512_cmp_ps_mask(p, L::set1(kTinyPeak), _CMP_LT_OQ);
      scale = _mm512_mask_mov_ps(scale, tiny, L::set1(1 / kTinyScale));
    }
    for (i64 k = 0; k < k_count; ++k) {
      const float* p = packed + k / kTileDepth * S::parts * part + j / 16 * kTileFloats + k % kTileDepth / 2 * 16;
      auto x = L::zero();
      for (int i = S::parts - 1; i >= 0; --i) {
        const __m512i pair = bits(L::load(p + i * part));
        x = L::add(x, _mm512_castsi512_ps(k % 2 ? _mm512_and_si512(pair, high) : _mm512_slli_epi32(pair, 16)));
      }
      L::store(dst + k * panel + j, L::mul(x, scale));
    }
  }
}

// See GemmHelpers::turn.
inline void turn_block(const float* sum, float* out, i64 out_row) {
  for (int i = 0; i < kBlock; i += 16) {
    for (int j = 0; j < kBlock; j += 16) {
      L::V r[16];
      for (int x = 0; x < 16; ++x) r[x] = L::load(sum + (i + x) * kBlock + j);
      L::transpose(r);
      for (int x = 0; x < 16; ++x) L::store(out + (j + x) * out_row + i, r[x]);
    }
  }
}

inline void begin_tiles() { tile_configure(); }
inline void end_tiles() { tile_release(); }

template <class T, class S>
constexpr GemmHelpers tile_helpers() {
  return {pack_tiles<T, S, true>,
          pack_tiles<T, S, false>,
          finish<VecAvx512Rounding, T>,
          activation_grad<L, T>,
          sum_rows<L, T>,
          begin_tiles,
          end_tiles,
          S::limited ? suspects : nullptr,
          S::limited ? unpack_tiles<S> : nullptr,
          S::as_it_lies ? turn_block : nullptr,
          nullptr};
}

}  // namespace
}  // namespace fastdl
