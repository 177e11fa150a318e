// What the backward schedule knows of a query head: its rows, operands and products, and a thread's scratch.
#pragma once
#include <cstring>

#include "attention/cpu/backward.h"
#include "attention/cpu/schedule.h"
#include "gemm/cpu/cost.h"

namespace fastdl::backward {

inline i64 offset(const AttentionStrides& step, i64 batch, i64 head, i64 row) {
  return batch * step.batch + head * step.head + row * step.row;
}

// Scratch of a thread, cut as the plan says.
struct Scratch {
  float *q_strips, *q_panels, *o_strips, *o_panels;  // o: of dO
  float *k_panels, *k_rows, *v_panels;               // k_rows: B of dQ
  float *p, *ds, *ds_rows, *s, *g;                   // k_unit 1: s and g are those of the strip in p and ds
  float *next_s = nullptr, *next_g = nullptr;        // tiles: of the next strip
  float *dq, *dk, *dv, *delta;
  float *q_least, *o_least;                                   // of each query block: see Least
  float *exact_q, *exact_o, *exact_k, *exact_v, *exact_rows;  // operands of AttentionBackwardPlan::exact

  Scratch(char* memory, const AttentionDesc& d, const AttentionBackwardPlan& plan) {
    const auto take = [&](i64 floats) {
      char* const begin = memory;
      memory += pages(floats * 4 + 64);
      return reinterpret_cast<float*>(begin);
    };
    const AttentionKernel& kernel = *plan.kernel;
    const bool tiled = is_tiled(kernel);
    const i64 nr = kernel.nr, q_units = steps(kernel, d.Lq), k_units = steps(kernel, plan.key_block);
    const i64 s_row = plan.key_block + 16, rows = plan.strips * kernel.mr, q_rows = lines(kernel, d.Lq);
    q_strips = take(q_rows * steps(kernel, d.D)), q_panels = take(q_units * round_up(d.D, nr));
    o_strips = take(q_rows * steps(kernel, d.Dv)), o_panels = take(q_units * round_up(d.Dv, nr));
    k_panels = take(plan.key_block * steps(kernel, d.D)), k_rows = take(k_units * round_up(d.D, nr));
    v_panels = take(plan.key_block * steps(kernel, d.Dv));
    const i64 p_rows = tiled ? steps(kernel, rows) : rows;
    p = take(p_rows * s_row), ds = take(p_rows * s_row);
    ds_rows = tiled ? take(kernel.mr * backward_ds_row(kernel, plan)) : ds + rows / 2 * s_row;
    s = p, g = ds;
    if (kernel.k_unit == 2) s = take(backward_s_floats(d, plan)), g = take(backward_s_floats(d, plan));
    if (tiled) next_s = take(backward_s_floats(d, plan)), next_g = take(backward_s_floats(d, plan));
    delta = take(d.Lq);
    const i64 strips = ceil_div(d.Lq, kernel.mr);
    if (plan.exact) q_least = take(2 * strips), o_least = q_least + strips;
    const i64 keys = d.H != d.Hkv ? std::min(plan.chunk, round_up(d.Lk, nr)) : plan.key_block;
    dq = take(plan.chunks > 1 ? 0 : d.Lq * round_up(d.D, 16));
    dk = take(keys * round_up(d.D, 16)), dv = take(keys * round_up(d.Dv, 16));
    if (!plan.exact) return;
    exact_q = take(plan.exact->mr * d.D), exact_o = take(plan.exact->mr * d.Dv);
    exact_k = take(plan.key_block * d.D), exact_v = take(plan.key_block * d.Dv);
    exact_rows = take(plan.key_block * round_up(d.D, nr));
  }
};

// The least of the largest magnitudes of lines that are not all zeros: 0 where one is too large for parts.
struct Least {
  float value = INFINITY;
  void large(const float* peak, i64 n) {
    if (is_large(peak, n)) value = 0;
  }
  void lines(const float* peak, i64 n) {
    large(peak, n);
    for (i64 i = 0; i < n; ++i)
      if (peak[i] > 0) value = std::min(value, peak[i]);
  }
};
constexpr int kMaxLines = 32;  // of a panel

// A matrix in float32 that products are added to.
struct Sums {
  float* data = nullptr;  // null: not wanted
  i64 row = 0, col = 1;   // one of them is 1
  float* at(i64 i, i64 j) const { return data + i * row + j * col; }
  Sums below(i64 i) const { return {data ? data + i * row : nullptr, row, col}; }
};

inline void clear(const Sums& x, i64 rows, i64 cols) {
  if (x.col != 1) return clear({x.data, x.col}, cols, rows);
  for (i64 i = 0; x.data && i < rows; ++i) std::memset(x.at(i, 0), 0, static_cast<std::size_t>(cols) * sizeof(float));
}

// A of a product that sums along a head dimension, or B of one that sums along the rows, in units as the tiles read
// them: in place, or packed (row 0).
struct Operand {
  const float* data;
  i64 row;
};

// One sequence, one query head: how rows are cut, where operands lie, and what of them is packed.
struct Head {
  const AttentionDesc& d;
  const AttentionBackwardPlan& p;
  const AttentionArgs& args;
  const AttentionGrads& grads;
  const Scratch& scratch;
  const AttentionKernel& kernel;
  i64 sequence, batch, head, kv;  // batch: 0 where the sequences lie in one
  AttentionSpan span;
  i64 unit, nr, s_row, q_steps, o_steps;  // unit: rows that strips begin at multiples of; steps: of D and Dv, packed
  i64 strips, blocks;                     // of queries

  Head(const AttentionDesc& desc, const AttentionBackwardPlan& plan, const AttentionArgs& a, const AttentionGrads& g,
       const Scratch& memory, i64 seq, i64 query_head, const AttentionKernel& row)
      : d(desc), p(plan), args(a), grads(g), scratch(memory), kernel(row), sequence(seq) {
    batch = d.sequences ? 0 : seq, head = query_head, kv = d.H ? query_head / (d.H / d.Hkv) : 0;
    span = attention_span(d, args, seq);
    unit = kernel.k_step, nr = kernel.nr, s_row = p.key_block + 16;
    q_steps = steps(kernel, d.D), o_steps = steps(kernel, d.Dv);
    strips = ceil_div(ceil_div(span.Lq, unit), kernel.mr / unit);
    blocks = ceil_div(strips, p.strips);
  }
  // Strips begin at whole units.
  i64 strip_begin(i64 strip) const { return std::min(span.Lq, ceil_div(span.Lq, unit) * strip / strips * unit); }
  i64 block_strip(i64 block) const { return strips * block / blocks; }
  i64 block_begin(i64 block) const { return strip_begin(block_strip(block)); }

  const void* q_row(i64 i) const { return at(args.q, offset(d.q, batch, head, span.q_begin + i), d.dtype); }
  const void* o_row(i64 i) const {
    return at(grads.dout, offset(grads.dout_step, batch, head, span.q_begin + i), d.dtype);
  }
  const void* k_row(i64 j) const { return at(args.k, offset(d.k, batch, kv, span.k_begin + j), d.dtype); }
  const void* v_row(i64 j) const { return at(args.v, offset(d.v, batch, kv, span.k_begin + j), d.dtype); }
  const float* lse() const {
    return args.lse + 2 * ((batch * d.H + head) * (d.sequences ? d.total_q : d.Lq) + span.q_begin);
  }

  // Rows as A: in place, else packed to `out`, [strip][steps][m].
  Operand strip_operand(const void* rows, const AttentionStrides& step, i64 depth, float* out) const {
    const bool whole = unit == 1 ? d.dtype == DType::f32 : step.row % unit == 0 && depth % unit == 0;
    const bool aligned = reinterpret_cast<std::uintptr_t>(rows) % alignof(float) == 0;
    if (whole && aligned && step.col == 1 && step.row > 0 && !rows_collide(step.row / unit))
      return {static_cast<const float*>(rows), step.row / unit};
    Least least;
    for (i64 block = 0; block < blocks; ++block) pack_strips(block, rows, step, depth, out, false, &least);
    return {out, 0};
  }
  // x[count, cols] as B: in place where its rows are near each other, else packed to `out`.
  Operand panel_operand(const void* x, const AttentionStrides& step, i64 count, i64 cols, float* out,
                        Least* least = nullptr) const {
    constexpr i64 kNear = 128;  // floats: farther apart, the columns of a panel crowd into few sets of L1
    if (!is_tiled(kernel) && d.dtype == DType::f32 && step.col == 1 && step.row > 0 && step.row <= kNear)
      return {static_cast<const float*>(x), step.row};
    const Least packed = pack_panels(x, step, count, cols, out);
    if (least) *least = packed;
    return {out, 0};
  }
  // B at row `first`, column j (a multiple of nr) of `count` rows, for a tile.
  void set_b(TileArgs* t, const Operand& b, i64 count, i64 first, i64 j) const {
    t->b = b.row ? b.data + first * b.row + j : b.data + j * steps(kernel, count) + steps(kernel, first) * nr;
    t->b_row = b.row ? b.row : nr, t->b_col = 1;
  }
  // x[count, cols] to [panel of cols][units along rows][nr].
  Least pack_panels(const void* x, const AttentionStrides& step, i64 count, i64 cols, float* out) const {
    Least least;
    for (i64 j = 0; j < cols; j += nr) {
      float peak[kMaxLines] = {};
      kernel.helpers->pack_b(at(x, j * step.col, d.dtype), step.row, step.col, count,
                             static_cast<int>(std::min(nr, cols - j)), kernel.nr, out + j * steps(kernel, count), peak);
      least.lines(peak, nr);
    }
    return least;
  }
  // x[n, depth] transposed: [panel of n][steps][nr]. Returns the largest of all, instead of the least line.
  Least pack_columns(const void* x, const AttentionStrides& step, i64 n, i64 depth, float* out) const {
    Least least;
    float most = 0;
    for (i64 j = 0; j < n; j += nr) {
      float peak[kMaxLines] = {};
      kernel.helpers->pack_b(at(x, j * step.row, d.dtype), step.col, step.row, depth,
                             static_cast<int>(std::min(nr, n - j)), kernel.nr, out + j * steps(kernel, depth), peak);
      least.large(peak, nr);
      most = std::max(most, *std::max_element(peak, peak + nr));
    }
    if (most > 0) least.value = std::min(least.value, most);
    return least;
  }
  // Tiles: rows of a block as strips, A of S and dP.
  void pack_strips(i64 block, const void* rows, const AttentionStrides& step, i64 depth, float* out, bool tiny,
                   Least* least) const {
    for (i64 strip = block_strip(block); strip < block_strip(block + 1); ++strip) {
      float peak[kMaxLines] = {};
      const i64 begin = strip_begin(strip), m = strip_begin(strip + 1) - begin;
      kernel.helpers->pack_a(at(rows, begin * step.row, d.dtype), step.col, step.row, depth, static_cast<int>(m),
                             static_cast<int>(lines(kernel, m)), out + begin * steps(kernel, depth), peak);
      tiny ? least->lines(peak, m) : least->large(peak, m);
    }
  }
  // Tiles: x[Lq, cols] of a block turned, [panel of cols][steps of Lq][mr]: A of dK^T and dV^T.
  void pack_turned(i64 block, const void* x, const AttentionStrides& step, i64 cols, float* out, Least* least) const {
    const i64 begin = block_begin(block), end = block_begin(block + 1);
    for (i64 j = 0; j < cols; j += kernel.mr) {
      float peak[kMaxLines] = {};
      const i64 n = std::min<i64>(kernel.mr, cols - j), panel = lines(kernel, n);
      kernel.helpers->pack_a(at(x, begin * step.row + j * step.col, d.dtype), step.row, step.col, end - begin,
                             static_cast<int>(n), static_cast<int>(panel),
                             out + j * steps(kernel, span.Lq) + steps(kernel, begin) * panel, peak);
      least->lines(peak, n);
    }
  }
  // Rows [row, row + m), packed as A of S and dP.
  void pack_operands(i64 row, int m, float* q, float* o) const {
    const int panel = static_cast<int>(lines(kernel, m));
    kernel.helpers->pack_a(q_row(row), d.q.col, d.q.row, d.D, m, panel, q, nullptr);
    kernel.helpers->pack_a(o_row(row), grads.dout_step.col, grads.dout_step.row, d.Dv, m, panel, o, nullptr);
  }
  void compute_delta(i64 begin, i64 end) const {
    DeltaArgs t = {};
    t.dout = o_row(begin), t.dout_row = grads.dout_step.row, t.dout_col = grads.dout_step.col;
    t.out = at(static_cast<const void*>(args.out), offset(d.out, batch, head, span.q_begin + begin), d.dtype);
    t.out_row = d.out.row, t.delta = scratch.delta + begin, t.m = end - begin, t.dv = static_cast<int>(d.Dv);
    kernel.grads->delta(t);
  }
  Seen seen_of(i64 begin, i64 end, i64 key, i64 n) const {  // columns of the block that rows [begin, end) see together
    const Seen s = seen(d, span, begin, end);
    return {std::max<i64>(0, s.begin - key), std::min(n, s.end - key)};
  }

  // c[m, n] = the rows [row, row + m) against the columns [begin, end) of a packed block.
  void products(const Operand& a, i64 row, int m, const float* panels, i64 depth, Seen columns, float* c) const {
    run(score_products(a, row, m, panels, depth, columns, c));
  }
  ProductsAhead score_products(const Operand& a, i64 row, int m, const float* panels, i64 depth, Seen columns,
                               float* c) const {
    return panel_products(kernel, a.data + row * (a.row ? a.row : depth), a.row, m, panels, depth,
                          {columns.begin / nr * nr, columns.end}, c, s_row);
  }
  // Arguments of P and dS for the strip of rows [begin, begin + m) and the block of n keys from `key` on.
  SoftmaxGradArgs grad_args(i64 begin, int m, i64 key, i64 n, Seen columns) const {
    SoftmaxGradArgs x = {};
    x.scores = softmax_args(d, args, span, sequence, head, begin, key, n);
    x.scores.s_row = s_row, x.scores.m = m;
    x.scores.begin = static_cast<int>(columns.begin / nr * nr), x.scores.end = static_cast<int>(columns.end);
    x.lse = lse() + 2 * begin, x.delta = scratch.delta + begin, x.factor = dropout_factor(d);
    x.stop = static_cast<int>(round_up(n, std::max<i64>(16, unit)));
    x.rows = m;
    return x;
  }
};

}  // namespace fastdl::backward
