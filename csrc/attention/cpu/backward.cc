// The backward schedule. One part is a chunk of the keys of one key head: for each query head that reads it, for each
// block of keys, for each block of query rows that sees some of them, each strip of rows is: S and dP by tiles against
// packed panels of K and V, P and dS in L1, dQ += dS K by tiles; then the block is dV += P^T dO and dK += dS^T Q, its
// columns being the rows of tiles. Where keys are cut into chunks, each has a dQ of its own, summed in their order.
#include "attention/cpu/backward.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "attention/cpu/schedule.h"
#include "base/arena.h"
#include "base/parallel.h"

namespace fastdl {
namespace {

i64 offset(const AttentionStrides& step, i64 batch, i64 head, i64 row) {
  return batch * step.batch + head * step.head + row * step.row;
}

// Rows this many floats apart fall on one or two sets of an L1 way (4096 bytes) and evict each other.
bool rows_collide(i64 stride) { return std::gcd<i64>(stride * 4, 4096) >= 2048; }

// Scratch of a thread, cut as the plan says.
struct Scratch {
  float *q_strips, *q_panels, *o_strips, *o_panels;  // o: of dO
  float *k_panels, *k_rows, *v_panels;               // k_rows: B of dQ
  float *p, *ds, *ds_rows, *s, *g;                   // k_unit 1: s and g are those of the strip in p and ds
  float *dq, *dk, *dv, *delta;

  Scratch(char* memory, const AttentionDesc& d, const AttentionBackwardPlan& plan) {
    const auto take = [&](i64 floats) {
      char* const begin = memory;
      memory += round_up(floats * 4 + 64, 4096);
      return reinterpret_cast<float*>(begin);
    };
    const AttentionKernel& kernel = *plan.kernel;
    const i64 unit = kernel.k_unit, nr = kernel.nr;
    const i64 q_units = ceil_div(d.Lq, unit), k_units = ceil_div(plan.key_block, unit);
    const i64 s_row = plan.key_block + 16, rows = plan.strips * kernel.mr;
    q_strips = take(d.Lq * ceil_div(d.D, unit)), q_panels = take(q_units * round_up(d.D, nr));
    o_strips = take(d.Lq * ceil_div(d.Dv, unit)), o_panels = take(q_units * round_up(d.Dv, nr));
    k_panels = take(plan.key_block * ceil_div(d.D, unit)), k_rows = take(k_units * round_up(d.D, nr));
    v_panels = take(plan.key_block * ceil_div(d.Dv, unit));
    p = take(rows * s_row), ds = take(rows * s_row), ds_rows = ds + rows / 2 * s_row;
    s = p, g = ds;
    if (unit == 2) s = take(kernel.mr * s_row), g = take(kernel.mr * s_row);
    delta = take(d.Lq);
    const i64 keys = d.H != d.Hkv ? std::min(plan.chunk, round_up(d.Lk, nr)) : plan.key_block;
    dq = take(plan.chunks > 1 ? 0 : d.Lq * round_up(d.D, 16));
    dk = take(keys * round_up(d.D, 16)), dv = take(keys * round_up(d.Dv, 16));
  }
};

// A matrix in float32 that products are added to.
struct Sums {
  float* data = nullptr;  // null: not wanted
  i64 row = 0;
  float* at(i64 i, i64 j) const { return data + i * row + j; }
  Sums below(i64 i) const { return {data ? data + i * row : nullptr, row}; }
};

void clear(const Sums& x, i64 rows, i64 cols) {
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
  i64 unit, nr, s_row, q_steps, o_steps;  // steps: units along D and Dv
  i64 strips, blocks;                     // of queries

  Head(const AttentionDesc& desc, const AttentionBackwardPlan& plan, const AttentionArgs& a, const AttentionGrads& g,
       const Scratch& memory, i64 seq, i64 query_head)
      : d(desc), p(plan), args(a), grads(g), scratch(memory), kernel(*plan.kernel), sequence(seq) {
    batch = d.sequences ? 0 : seq, head = query_head, kv = d.H ? query_head / (d.H / d.Hkv) : 0;
    span = attention_span(d, args, seq);
    unit = kernel.k_unit, nr = kernel.nr, s_row = p.key_block + 16;
    q_steps = ceil_div(d.D, unit), o_steps = ceil_div(d.Dv, unit);
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
    const i64 steps = ceil_div(depth, unit);
    for (i64 strip = 0; strip < strips; ++strip) {
      const i64 begin = strip_begin(strip);
      const int m = static_cast<int>(strip_begin(strip + 1) - begin);
      kernel.helpers->pack_a(at(rows, begin * step.row, d.dtype), step.col, step.row, depth, m, m, out + begin * steps,
                             nullptr);
    }
    return {out, 0};
  }
  // x[count, cols] as B: in place where its rows are near each other, else packed to `out`.
  Operand panel_operand(const void* x, const AttentionStrides& step, i64 count, i64 cols, float* out) const {
    constexpr i64 kNear = 128;  // floats: farther apart, the columns of a panel crowd into few sets of L1
    if (d.dtype == DType::f32 && step.col == 1 && step.row > 0 && step.row <= kNear)
      return {static_cast<const float*>(x), step.row};
    pack_panels(x, step, count, cols, out);
    return {out, 0};
  }
  // B at row `first`, column j (a multiple of nr) of `count` rows, for a tile.
  void set_b(TileArgs* t, const Operand& b, i64 count, i64 first, i64 j) const {
    t->b = b.row ? b.data + first * b.row + j : b.data + j * ceil_div(count, unit) + first / unit * nr;
    t->b_row = b.row ? b.row : nr, t->b_col = 1;
  }
  // x[count, cols] to [panel of cols][units along rows][nr].
  void pack_panels(const void* x, const AttentionStrides& step, i64 count, i64 cols, float* out) const {
    for (i64 j = 0; j < cols; j += nr)
      kernel.helpers->pack_b(at(x, j * step.col, d.dtype), step.row, step.col, count,
                             static_cast<int>(std::min(nr, cols - j)), kernel.nr, out + j * ceil_div(count, unit),
                             nullptr);
  }
  // x[n, depth] transposed: [panel of n][steps][nr].
  void pack_columns(const void* x, const AttentionStrides& step, i64 n, i64 depth, float* out) const {
    for (i64 j = 0; j < n; j += nr)
      kernel.helpers->pack_b(at(x, j * step.row, d.dtype), step.col, step.row, depth,
                             static_cast<int>(std::min(nr, n - j)), kernel.nr, out + j * ceil_div(depth, unit),
                             nullptr);
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
  void products(const Operand& a, i64 row, int m, const float* panels, i64 steps, Seen columns, float* c) const {
    TileArgs t = {};
    t.a = a.data + row * (a.row ? a.row : steps), t.a_row = a.row ? a.row : 1, t.a_col = a.row ? 1 : m;
    t.b_row = nr, t.b_col = 1, t.c_row = s_row, t.k = steps, t.m = m;
    for (i64 j = columns.begin / nr * nr; j < columns.end; j += nr) {
      t.b = panels + j * steps, t.c = c + j, t.n = static_cast<int>(std::min(nr, round_up(columns.end - j, 16)));
      kernel.tile(t);
    }
  }
  // Arguments of P and dS for the strip of rows [begin, begin + m) and the block of n keys from `key` on.
  SoftmaxGradArgs grad_args(i64 begin, int m, i64 key, i64 n, Seen columns) const {
    SoftmaxGradArgs x = {};
    x.scores = softmax_args(d, args, span, sequence, head, begin, key, n);
    x.scores.s_row = s_row, x.scores.m = m;
    x.scores.begin = static_cast<int>(columns.begin / nr * nr), x.scores.end = static_cast<int>(columns.end);
    x.lse = lse() + 2 * begin, x.delta = scratch.delta + begin, x.factor = dropout_factor(d);
    x.stop = static_cast<int>(round_up(n, 16));
    return x;
  }
};

// A chunk of keys of one key head of one sequence.
struct Part {
  const AttentionDesc& d;
  const AttentionBackwardPlan& p;
  const AttentionArgs& args;
  const AttentionGrads& grads;
  const Scratch& scratch;
  float* shared;
  i64 sequence, kv, chunk;

  i64 dq_rows() const { return d.sequences ? d.total_q : d.Lq; }

  Sums dq_sums(const Head& h) const {
    if (!grads.dq) return {};
    const i64 dp = round_up(d.D, 16);
    if (p.chunks > 1)
      return {shared + ((chunk * d.B + h.batch) * d.H + h.head) * dq_rows() * dp + h.span.q_begin * dp, dp};
    return {scratch.dq, dp};
  }
  // Sums grow in scratch, also those of float32: where the gradient's rows are those of all heads side by side, tiles
  // that add to it in place wait for memory (8x12x577x64, 2 threads of Zen 4: 112 instead of 105 ms).
  static Sums key_sums(const void* grad, float* own, i64 depth) {
    return grad ? Sums{own, round_up(depth, 16)} : Sums{};
  }
  void finish(const Sums& sums, i64 rows, i64 cols, void* out, i64 out_row) const {
    if (!sums.data) return;
    FinishArgs f = {};
    f.sum = sums.data, f.sum_row = sums.row, f.c = out, f.c_row = out_row;
    f.activation = Activation::none, f.m = static_cast<int>(rows), f.n = static_cast<int>(cols);
    p.kernel->helpers->finish(f);
  }
  void finish_keys(const Head& h, i64 begin, i64 n, const Sums& dk, const Sums& dv) const {
    const i64 row = h.span.k_begin + begin;
    finish(dk, n, d.D, at(grads.dk, offset(grads.dk_step, h.batch, kv, row), d.dtype), grads.dk_step.row);
    finish(dv, n, d.Dv, at(grads.dv, offset(grads.dv_step, h.batch, kv, row), d.dtype), grads.dv_step.row);
  }

  struct Packed {
    Operand q_a, o_a;       // of S and dP
    Operand q_b, o_b, k_b;  // of dK, dV and dQ
  };

  // Query block `block` against the n keys from `key` on, packed.
  void run_block(const Head& h, const Packed& packed, i64 block, i64 key, i64 n, const Sums& dq, const Sums& dk,
                 const Sums& dv) const {
    const i64 first = h.block_strip(block), last = h.block_strip(block + 1), nr = h.nr, unit = h.unit;
    const i64 begin = h.strip_begin(first), end = h.strip_begin(last), s_row = h.s_row;
    const bool scores = dq.data || dk.data;
    for (i64 strip = first; strip < last; ++strip) {
      const i64 row = h.strip_begin(strip), in_block = row - begin;
      const int m = static_cast<int>(h.strip_begin(strip + 1) - row);
      const Seen columns = h.seen_of(row, row + m, key, n);
      const bool some = columns.begin < columns.end;
      const i64 at_row = unit == 1 ? in_block * s_row : 0;
      SoftmaxGradArgs x = h.grad_args(row, m, key, n, some ? columns : Seen{0, 0});
      x.scores.s = scratch.s + at_row, x.scale = d.scale, x.capped = true;
      if (dv.data) x.p = scratch.p + in_block / unit * s_row;
      if (scores) {
        x.g = scratch.g + at_row, x.ds = scratch.ds + in_block / unit * s_row;
        x.rows_step = s_row / 2, x.ds_rows = scratch.ds_rows + in_block * x.rows_step;
      }
      if (some) {
        h.products(packed.q_a, row, m, scratch.k_panels, h.q_steps, columns, x.scores.s);
        if (scores) h.products(packed.o_a, row, m, scratch.v_panels, h.o_steps, columns, scratch.g + at_row);
      }
      p.kernel->grads->softmax_grad[static_cast<int>(d.mask)](x);
      if (!some || !dq.data) continue;
      const i64 from = columns.begin / nr * nr;
      TileArgs t = {};
      t.a = unit == 1 ? x.ds + from : x.ds_rows + from / 2, t.a_row = unit == 1 ? s_row : x.rows_step, t.a_col = 1;
      t.c_row = dq.row, t.k = ceil_div(columns.end - from, unit), t.m = m;
      t.accumulate = first_key(h, row, m) < key;
      for (i64 j = 0; j < d.D; j += nr) {
        h.set_b(&t, packed.k_b, n, from, j);
        t.c = dq.at(row, j), t.n = static_cast<int>(std::min(nr, d.D - j));
        p.kernel->tile(t);
      }
    }
    if (dv.data) add_keys(h, begin, end, key, n, scratch.p, packed.o_b, d.Dv, dv);
    if (dk.data) add_keys(h, begin, end, key, n, scratch.ds, packed.q_b, d.D, dk);
  }

  // sums(j,:) += sum_i a(i,j) b(i,:) over the rows [begin, end) of the block, keys j of [key, key + n).
  void add_keys(const Head& h, i64 begin, i64 end, i64 key, i64 n, const float* a, const Operand& b, i64 depth,
                const Sums& sums) const {
    const i64 nr = h.nr, unit = h.unit, s_row = h.s_row;
    const i64 tiles = ceil_div(n, p.kernel->mr);
    TileArgs t = {};
    t.a_row = 1, t.a_col = s_row, t.c_row = sums.row;
    for (i64 j = 0; j < depth; j += nr) {
      t.n = static_cast<int>(std::min(nr, depth - j));
      for (i64 tile = 0; tile < tiles; ++tile) {
        const i64 from = n * tile / tiles, to = n * (tile + 1) / tiles;
        const Seen rows = seeing(d, h.span, key + from, key + to);  // those that see some key of the tile
        const i64 r0 = std::max<i64>(0, rows.begin - begin) / unit,
                  r1 = ceil_div(std::min(end, rows.end) - begin, unit);
        if (r0 >= r1) continue;
        h.set_b(&t, b, h.span.Lq, begin + r0 * unit, j);
        t.a = a + r0 * s_row + from;
        t.c = sums.at(from, j), t.k = r1 - r0, t.m = static_cast<int>(to - from);
        t.accumulate = rows.begin < begin || h.head > kv * (d.H / d.Hkv);
        p.kernel->tile(t);
      }
    }
  }

  // The first key of the part that the rows [row, row + m) see.
  i64 first_key(const Head& h, i64 row, i64 m) const {
    return std::max(chunk * p.chunk, seen(d, h.span, row, row + m).begin);
  }
  // Sums that no product reaches: of keys that no row sees, of rows that see no key of the part.
  void clear_unseen_keys(const Head& h, i64 key, i64 n, const Sums& dk, const Sums& dv) const {
    for (i64 tile = 0, tiles = ceil_div(n, p.kernel->mr); tile < tiles; ++tile) {
      const i64 from = n * tile / tiles, to = n * (tile + 1) / tiles;
      const Seen rows = seeing(d, h.span, key + from, key + to);
      if (rows.begin < rows.end) continue;
      clear(dk.below(from), to - from, d.D), clear(dv.below(from), to - from, d.Dv);
    }
  }
  void clear_unseeing_rows(const Head& h, i64 key_end, const Sums& dq) const {
    for (i64 strip = 0; strip < h.strips; ++strip) {
      const i64 row = h.strip_begin(strip), m = h.strip_begin(strip + 1) - row;
      if (first_key(h, row, m) >= std::min(key_end, seen(d, h.span, row, row + m).end)) clear(dq.below(row), m, d.D);
    }
  }

  // The rows that see some of the keys [begin, end).
  static Seen seeing(const AttentionDesc& d, const AttentionSpan& span, i64 begin, i64 end) {
    const Seen w = window(d, span, 0, 0);  // key j is seen by rows j - w.end .. j - w.begin
    return {std::clamp<i64>(begin - w.end, 0, span.Lq), std::clamp<i64>(end - w.begin, 0, span.Lq)};
  }

  void run_head(const Head& h, i64 key_begin, i64 key_end, const Sums& dk_all, const Sums& dv_all) const {
    const Sums dq = dq_sums(h);
    clear_unseeing_rows(h, key_end, dq);
    const i64 Lq = h.span.Lq;
    Packed packed = {};
    for (i64 key = key_begin; key < key_end; key += p.key_block) {
      const i64 n = std::min(p.key_block, key_end - key);
      const bool whole = d.H != d.Hkv;  // sums of all keys of the chunk are at hand
      const i64 below = whole ? key - key_begin : 0;
      const Sums dk = dk_all.below(below), dv = dv_all.below(below);
      if (h.head == kv * (d.H / d.Hkv)) clear_unseen_keys(h, key, n, dk, dv);
      const Seen rows = seeing(d, h.span, key, key + n);
      if (rows.begin < rows.end) {
        const bool scores = dq.data || dk.data;
        if (!packed.q_a.data) {
          packed.q_a = h.strip_operand(h.q_row(0), d.q, d.D, scratch.q_strips);
          if (dk.data) packed.q_b = h.panel_operand(h.q_row(0), d.q, Lq, d.D, scratch.q_panels);
          if (dv.data) packed.o_b = h.panel_operand(h.o_row(0), grads.dout_step, Lq, d.Dv, scratch.o_panels);
          if (scores) {
            packed.o_a = h.strip_operand(h.o_row(0), grads.dout_step, d.Dv, scratch.o_strips);
            h.compute_delta(0, Lq);
          }
        }
        h.pack_columns(h.k_row(key), d.k, n, d.D, scratch.k_panels);
        if (scores) h.pack_columns(h.v_row(key), d.v, n, d.Dv, scratch.v_panels);
        if (dq.data) packed.k_b = h.panel_operand(h.k_row(key), d.k, n, d.D, scratch.k_rows);
        for (i64 block = 0; block < h.blocks; ++block) {
          const Seen columns = h.seen_of(h.block_begin(block), h.block_begin(block + 1), key, n);
          if (columns.begin < columns.end) run_block(h, packed, block, key, n, dq, dk, dv);
        }
      }
      if (!whole) finish_keys(h, key, n, dk, dv);
    }
    if (p.chunks == 1 && grads.dq)
      finish(dq, Lq, d.D, at(grads.dq, offset(grads.dq_step, h.batch, h.head, h.span.q_begin), d.dtype),
             grads.dq_step.row);
  }

  void run() const {
    const i64 group = d.H / d.Hkv;
    const Head first(d, p, args, grads, scratch, sequence, kv * group);
    const i64 begin = chunk * p.chunk, end = std::min(first.span.Lk, begin + p.chunk);
    if (begin >= end && chunk > 0) return;
    const Sums dk = key_sums(grads.dk, scratch.dk, d.D), dv = key_sums(grads.dv, scratch.dv, d.Dv);
    if (group == 0) clear(dk, end - begin, d.D), clear(dv, end - begin, d.Dv);
    for (i64 g = 0; g < group; ++g)
      run_head(Head(d, p, args, grads, scratch, sequence, kv * group + g), begin, end, dk, dv);
    if (group != 1) finish_keys(first, begin, end - begin, dk, dv);
  }
};

// dq = the sum of the chunks' dQ, in their order, for one query head of one sequence.
void sum_chunks(const AttentionDesc& d, const AttentionBackwardPlan& p, const AttentionArgs& args,
                const AttentionGrads& grads, float* shared, i64 sequence, i64 head) {
  const AttentionSpan span = attention_span(d, args, sequence);
  const i64 batch = d.sequences ? 0 : sequence, dp = round_up(d.D, 16);
  const i64 rows = d.sequences ? d.total_q : d.Lq, chunks = std::max<i64>(1, ceil_div(span.Lk, p.chunk));
  const i64 step = d.B * d.H * rows * dp;
  float* const first = shared + (batch * d.H + head) * rows * dp + span.q_begin * dp;
  for (i64 i = 0; i < span.Lq; ++i) {
    float* const sum = first + i * dp;
    for (i64 c = 1; c < chunks; ++c)
      for (i64 j = 0; j < d.D; ++j) sum[j] += sum[c * step + j];
  }
  FinishArgs f = {};
  f.sum = first, f.sum_row = dp, f.c = at(grads.dq, offset(grads.dq_step, batch, head, span.q_begin), d.dtype);
  f.c_row = grads.dq_step.row, f.activation = Activation::none;
  f.m = static_cast<int>(span.Lq), f.n = static_cast<int>(d.D);
  p.kernel->helpers->finish(f);
}

// dmask, apart from the rest: its elements may sum over batch, heads, rows and columns, each in rising order.
struct MaskPart {
  const AttentionDesc& d;
  const AttentionBackwardPlan& p;
  const AttentionArgs& args;
  const AttentionGrads& grads;
  const Scratch& scratch;

  // Rows are split over parts where dmask has them, else key blocks.
  static i64 pieces(const AttentionDesc& d, const AttentionBackwardPlan& p, const AttentionGrads& grads) {
    if (grads.dmask_step.row) return ceil_div(d.Lq, p.strips * p.kernel->mr);
    return grads.dmask_step.col ? ceil_div(d.Lk, p.key_block) : 1;
  }

  void run(i64 index) const {
    const AttentionStrides& step = grads.dmask_step;
    const i64 all = pieces(d, p, grads), piece = index % all, heads = step.head ? d.H : 1;
    const i64 b = index / all / heads, h = index / all % heads;
    float* const out = grads.dmask + b * step.batch + h * step.head;
    const i64 rows_begin = step.row ? d.Lq * piece / all : 0, rows_end = step.row ? d.Lq * (piece + 1) / all : d.Lq;
    const i64 key_begin = !step.row && step.col ? piece * p.key_block : 0;
    const i64 key_end = !step.row && step.col ? std::min(d.Lk, key_begin + p.key_block) : d.Lk;
    for (i64 i = rows_begin; i < (step.row ? rows_end : rows_begin + 1); ++i)
      for (i64 j = key_begin; j < (step.col ? key_end : key_begin + 1); ++j) out[i * step.row + j * step.col] = 0;
    for (i64 sequence = step.batch ? b : 0; sequence < (step.batch ? b + 1 : d.B); ++sequence)
      for (i64 head = step.head ? h : 0; head < (step.head ? h + 1 : d.H); ++head)
        add_head(Head(d, p, args, grads, scratch, sequence, head), rows_begin, rows_end, key_begin, key_end, out);
  }

  void add_head(const Head& h, i64 rows_begin, i64 rows_end, i64 key_begin, i64 key_end, float* out) const {
    const i64 mr = p.kernel->mr, s_row = h.s_row;
    h.compute_delta(rows_begin, rows_end);
    for (i64 key = key_begin; key < key_end; key += p.key_block) {
      const i64 n = std::min(p.key_block, key_end - key);
      if (h.seen_of(rows_begin, rows_end, key, n).begin >= h.seen_of(rows_begin, rows_end, key, n).end) continue;
      h.pack_columns(h.k_row(key), d.k, n, d.D, scratch.k_panels);
      h.pack_columns(h.v_row(key), d.v, n, d.Dv, scratch.v_panels);
      for (i64 row = rows_begin; row < rows_end; row += mr) {
        const int m = static_cast<int>(std::min(mr, rows_end - row));
        const Seen columns = h.seen_of(row, row + m, key, n);
        if (columns.begin >= columns.end) continue;
        p.kernel->helpers->pack_a(h.q_row(row), d.q.col, d.q.row, d.D, m, m, scratch.q_strips, nullptr);
        p.kernel->helpers->pack_a(h.o_row(row), grads.dout_step.col, grads.dout_step.row, d.Dv, m, m, scratch.o_strips,
                                  nullptr);
        h.products({scratch.q_strips, 0}, 0, m, scratch.k_panels, h.q_steps, columns, scratch.s);
        h.products({scratch.o_strips, 0}, 0, m, scratch.v_panels, h.o_steps, columns, scratch.g);
        SoftmaxGradArgs x = h.grad_args(row, m, key, n, columns);
        x.scores.s = scratch.s, x.g = x.ds = scratch.g, x.scale = 1;
        p.kernel->grads->mask_grad[static_cast<int>(d.mask)](x);
        for (i64 i = 0; i < m; ++i) {
          float* const to = out + (row + i) * grads.dmask_step.row + key * grads.dmask_step.col;
          for (i64 j = columns.begin; j < columns.end; ++j) to[j * grads.dmask_step.col] += scratch.g[i * s_row + j];
        }
      }
    }
  }
};

// body(index, scratch) for each index below count, on all threads, in any order.
template <class Body>
void for_each(const AttentionDesc& d, const AttentionBackwardPlan& p, char* memory, i64 count, const Body& body) {
  std::atomic<i64> next{0};
  parallel(p.threads, [&](int thread, int) {
    const Scratch scratch(memory + thread * p.per_thread_bytes(), d, p);
    for (i64 i = next++; i < count; i = next++) body(i, scratch);
  });
}

}  // namespace

void attention_backward_run(const AttentionDesc& d, const AttentionBackwardPlan& p, const AttentionArgs& args,
                            const AttentionGrads& grads) {
  const i64 sequences = d.sequences ? d.sequences : d.B;
  if (sequences == 0 || d.Hkv == 0) return;
  ArenaLease memory(p.workspace_bytes());
  float* const shared = reinterpret_cast<float*>(memory.data());
  char* const own = memory.data() + p.shared_bytes;
  if (grads.dq || grads.dk || grads.dv) {
    for_each(d, p, own, sequences * d.Hkv * p.chunks, [&](i64 i, const Scratch& scratch) {
      Part{d, p, args, grads, scratch, shared, i / p.chunks / d.Hkv, i / p.chunks % d.Hkv, i % p.chunks}.run();
    });
  }
  if (grads.dq && p.chunks > 1) {
    for_each(d, p, own, sequences * d.H,
             [&](i64 i, const Scratch&) { sum_chunks(d, p, args, grads, shared, i / d.H, i % d.H); });
  }
  if (grads.dmask && d.H > 0 && d.B > 0) {
    const i64 outer = (grads.dmask_step.batch ? d.B : 1) * (grads.dmask_step.head ? d.H : 1);
    for_each(d, p, own, outer * MaskPart::pieces(d, p, grads),
             [&](i64 i, const Scratch& scratch) { MaskPart{d, p, args, grads, scratch}.run(i); });
  }
}

}  // namespace fastdl
