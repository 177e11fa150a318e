// The product of the recurrent schedule: rows of states, as scratch holds them, with packed weights; what tiles of
// parts get wrong is computed again.
#pragma once
#include <algorithm>

#include "rnn/rnn.h"

namespace fastdl::recurrent {

// A matrix in scratch in the form that products read: rows of `row` floats, each `unit` elements; or rows of float32
// with their bf16 parts behind them, from `parts` on, `part` floats apart (RnnKernel::split).
struct Operand {
  float* data;
  i64 row;
  int unit;
  i64 parts, part;
  float* peaks;  // [team][B]: the largest magnitude of the columns of a row that a thread wrote; or null

  void* at(i64 i, i64 j) const { return reinterpret_cast<char*>(data + i * row) + j * (unit == 1 ? 4 : 2); }
};

inline Operand operand_of(const RnnKernel& kernel, i64 K, float* data, float* peaks) {
  return {data, rnn_padded(kernel.row_steps(K)), kernel.state_unit(), kernel.parts_at(K), kernel.part_steps(K), peaks};
}
inline i64 operand_floats(const RnnKernel& kernel, i64 K, i64 B) {
  return (is_tiled(kernel) ? round_up(B, 16) : B) * rnn_padded(kernel.row_steps(K));
}

// A line that another core has read since this one wrote it: written to, it costs the whole way between the two, and
// stores wait for each other. Asked for while the products run, it is there when the cell is done. (Compilers emit this
// instruction only above the base level; processors that lack it take it for a no-op.)
inline void own_line(void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}
inline void own_lines(const Operand& x, int planes, i64 m, i64 begin, i64 end) {
  constexpr i64 kLine = 64;
  for (i64 i = 0; i < m; ++i) {
    for (char* p = static_cast<char*>(x.at(i, begin)); p < x.at(i, end); p += kLine) own_line(p);
    for (int part = 0; x.parts && part < planes; ++part) {
      char* const row = reinterpret_cast<char*>(x.data + i * x.row + x.parts + part * x.part);
      for (i64 j = 2 * begin; j < 2 * end; j += kLine) own_line(row + j);
    }
  }
}

struct States {  // float32
  float* data;
  i64 row;
  float* at(i64 i, i64 j) const { return data + i * row + j; }
};

// The microkernel of a product with packed weights: the recurrent row's own, or a GEMM row's.
struct Product {
  void (*tile)(const TileArgs&);
  int mr, nr;
  i64 kc, a_kc;  // floats of a packed column, and of a row (of one part of it), in a K block
  bool tiled;

  Product(const RnnKernel& k) : tile(k.fn->tile), mr(k.mr), nr(k.nr), tiled(is_tiled(k)) {
    a_kc = k.kc / k.k_unit, kc = a_kc * k.planes;
  }
  // Backward and projections: panels are the GEMM row's. Its tiles of A are packed, those of the recurrent row lie in
  // h.
  Product(const RnnKernel& k, const GemmKernel& g) : tile(g.tile), mr(g.mr), nr(g.nr), tiled(is_tiled(k)) {
    if (tiled) tile = k.fn->tile, mr = k.mr;
    a_kc = g.kc / g.k_unit, kc = a_kc * g.planes;
  }
  // Tile rows of m, cut evenly where tiles are not 16 rows each: tile i is [begin(i), begin(i + 1)).
  i64 tiles(i64 m) const { return ceil_div(m, mr); }
  i64 begin(i64 m, i64 count, i64 i) const { return tiled ? std::min(m, i * mr) : m * i / count; }
};

// Panels [n/nr][steps][nr], or float32 rows as they lie in memory.
struct Panels {
  const float* data;
  i64 panel, row;
};

// c[m, nr] (+)= a[m, K] * one panel, rows of c c_row apart; steps: floats of a packed column of K elements.
inline void run_panel(const Product& x, const Operand& a, i64 first, i64 m, i64 steps, const float* panel, i64 b_row,
                      int n, float* c, i64 c_row, bool accumulate) {
  const i64 tiles = x.tiles(m);
  TileArgs t = {};
  t.a_row = a.row, t.a_col = x.tiled ? a.part : 1, t.b_row = b_row, t.b_col = 1, t.c_row = c_row, t.n = n;
  const float* from = a.data + first * a.row + a.parts;
  for (i64 k = 0; k < steps; k += x.kc, from += x.a_kc) {
    t.k = std::min(x.kc, steps - k);
    t.b = panel + k * b_row;
    t.accumulate = accumulate || k > 0;
    for (i64 i = 0; i < tiles; ++i) {
      const i64 row = x.begin(m, tiles, i);
      t.m = static_cast<int>(x.begin(m, tiles, i + 1) - row);
      t.a = from + row * a.row;
      t.c = c + row * c_row;
      x.tile(t);
    }
  }
}

// The columns of packed weights, as they lie in memory: element k of the first one and from column to column. Blocks
// of W_hh hold [gates][units].
struct Weights {
  const void* data;
  i64 k_step, j_step, K, count;  // count: of columns, of one gate where there are gates
  i64 gates = 0, units = 0;

  struct Group {
    i64 first;
    int n;
  };
  // 16 columns from packed column j on, a multiple of 16.
  Group group(i64 j) const {
    const i64 within = gates ? j % (gates * units) : 0;
    const i64 first = gates ? j / (gates * units) * units + within % units : j;
    const i64 left = std::clamp<i64>(count - first, 0, 16);
    return {left ? (gates ? within / units * count : 0) + first : 0, static_cast<int>(left)};
  }
};

// What tiles of bf16 parts get wrong, by FMA: see GemmHelpers::suspects.
struct Repair {
  const RnnPlan& p;
  float *sums = nullptr, *packed = nullptr, *row_peaks = nullptr;  // a thread's own

  Repair(const RnnPlan& plan, float* memory, i64 B) : p(plan) {
    if (!p.repair) return;
    sums = memory, packed = sums + i64{p.kernel->mr} * 16, row_peaks = packed + p.repair->kc * 16 + 16;
    std::fill_n(row_peaks, B, 0.0f);
  }
  // Of the first m rows of an operand, from the shares that all threads wrote.
  void gather(const Operand& a, i64 m, i64 B, int threads) {
    if (!p.has_peaks()) return;
    std::copy_n(a.peaks, m, row_peaks);
    for (int t = 1; t < threads; ++t)
      for (i64 i = 0; i < m; ++i) row_peaks[i] = std::max(row_peaks[i], a.peaks[t * B + i]);  // NaN: keeps the first
  }
  // sum[m][n] = a[first.., K] * columns j.. of w, complete. column_peaks: of column j on.
  void operator()(const Operand& a, const Weights& w, const float* column_peaks, i64 first, i64 m, i64 j, int n,
                  float* sum, i64 sum_row) const {
    for (i64 i = 0; i < m; i += p.kernel->mr) {
      const int count = static_cast<int>(std::min<i64>(p.kernel->mr, m - i));
      unsigned rows[32];
      const bool peaks = p.has_peaks();
      const SuspectArgs s = {sum + i * sum_row,
                             sum_row,
                             peaks ? row_peaks + first + i : nullptr,
                             peaks ? column_peaks : nullptr,
                             count,
                             n};
      if (!p.product->helpers->suspects(s, rows)) continue;
      for (int part = 0; part < n; part += 16)
        again(a, w, first + i, count, j + part, rows, part, sum + i * sum_row, sum_row);
    }
  }
  void again(const Operand& a, const Weights& w, i64 first, int m, i64 j, const unsigned* rows, int part, float* sum,
             i64 sum_row) const {
    const GemmKernel& exact = *p.repair;
    const Weights::Group columns = w.group(j);
    const auto flagged = [&](int i) { return rows[i] >> part & ((1u << columns.n) - 1); };
    int begin = 0, end = m;
    while (begin < end && !flagged(begin)) ++begin;
    while (end > begin && !flagged(end - 1)) --end;
    if (begin == end) return;
    for (i64 k = 0; k < w.K; k += exact.kc) {
      TileArgs t = {};
      t.k = std::min(exact.kc, w.K - k), t.n = columns.n;
      exact.helpers->pack_b(at(w.data, k * w.k_step + columns.first * w.j_step, exact.dtype), w.k_step, w.j_step, t.k,
                            columns.n, 16, packed, nullptr);
      t.a_row = a.row, t.a_col = 1, t.b = packed, t.b_row = 16, t.b_col = 1, t.c_row = 16, t.accumulate = k > 0;
      for (int i = begin; i < end; i += exact.mr) {
        t.m = std::min(exact.mr, end - i);
        t.a = a.data + (first + i) * a.row + k;
        t.c = sums + i64{i} * 16;
        exact.tile(t);
      }
    }
    i64 count = 0;
    for (int i = begin; i < end; ++i)
      for (int c = 0; c < columns.n; ++c)
        if (flagged(i) >> c & 1) sum[i * sum_row + part + c] = sums[i * 16 + c], ++count;
    gemm_add_repaired(count);
  }
};

// c[m, n] (+)= a[m, K] * b; columns of c from a panel's first, `column`, on.
inline void run_product(const Product& x, const Operand& a, i64 m, i64 steps, const Panels& b, i64 n, const States& c,
                        i64 column, bool accumulate, const Repair& repair, const Weights& w, const float* column_peaks,
                        float* sums) {
  for (i64 j = 0; j < n; j += x.nr) {
    const int width = static_cast<int>(std::min<i64>(x.nr, n - j));
    const float* const panel = b.data + j / x.nr * b.panel;
    if (!repair.p.repair) {
      run_panel(x, a, 0, m, steps, panel, b.row, width, c.at(0, column + j), c.row, accumulate);
      continue;
    }
    run_panel(x, a, 0, m, steps, panel, b.row, width, sums, x.nr, false);
    repair(a, w, column_peaks + column + j, 0, m, column + j, width, sums, x.nr);
    for (i64 i = 0; i < m; ++i) {
      float* const to = c.at(i, column + j);
      const float* const from = sums + i * x.nr;
      for (int v = 0; v < width; ++v) to[v] = accumulate ? to[v] + from[v] : from[v];
    }
  }
}

}  // namespace fastdl::recurrent
