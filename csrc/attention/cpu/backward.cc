// The backward schedule. One part is a chunk of the keys of one key head: for each query head that reads it, for each
// block of keys, for each block of query rows that sees some of them, each strip of rows is: S and dP by tiles against
// packed panels of K and V, P and dS in L1, dQ += dS K by tiles; then the block is dV += P^T dO and dK += dS^T Q, its
// columns being the rows of tiles. Where keys are cut into chunks, each has a dQ of its own, summed in their order.
// Tiles of amx take P and dS as they lie as B, not as A: there dV and dK are summed turned, dV^T += dO^T P.
#include <algorithm>
#include <atomic>

#include "attention/cpu/backward_head.h"
#include "base/arena.h"
#include "base/parallel.h"

namespace fastdl {
namespace {

using namespace backward;

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
  Sums key_sums(const void* grad, float* own, i64 depth) const {
    if (!grad) return {};
    const i64 keys = d.H != d.Hkv ? std::min(p.chunk, round_up(d.Lk, p.kernel->nr)) : p.key_block;
    return turned() ? Sums{own, 1, keys} : Sums{own, round_up(depth, 16)};
  }
  bool turned() const { return is_tiled(*p.kernel); }
  void finish(const Sums& sums, i64 rows, i64 cols, void* out, i64 out_row) const {
    if (!sums.data) return;
    if (sums.col != 1) {
      const i64 step = p.kernel->nr, depth = round_up(cols, 16);
      for (i64 i = 0; i < rows; i += step) {
        const i64 n = std::min(step, rows - i);
        p.kernel->grads->turn(sums.at(i, 0), sums.col, static_cast<int>(round_up(n, 16)), static_cast<int>(depth),
                              scratch.s, depth);
        finish({scratch.s, depth}, n, cols, at(out, i * out_row, d.dtype), out_row);
      }
      return;
    }
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
    const AttentionKernel& kernel = h.kernel;
    const i64 first = h.block_strip(block), last = h.block_strip(block + 1), nr = h.nr, unit = kernel.k_unit;
    const i64 begin = h.strip_begin(first), end = h.strip_begin(last), s_row = h.s_row;
    const bool scores = dq.data || dk.data;
    bool ready = false;  // the strip's S and dP are computed
    float *s_g[2] = {scratch.s, scratch.g}, *next_s_g[2] = {scratch.next_s, scratch.next_g};
    for (i64 strip = first; strip < last; ++strip) {
      const i64 row = h.strip_begin(strip), in_block = row - begin;
      const int m = static_cast<int>(h.strip_begin(strip + 1) - row);
      const Seen columns = h.seen_of(row, row + m, key, n);
      const bool some = columns.begin < columns.end;
      const i64 at_row = unit == 1 ? in_block * s_row : 0;
      SoftmaxGradArgs x = h.grad_args(row, m, key, n, some ? columns : Seen{0, 0});
      x.scores.s = s_g[0] + at_row, x.scale = d.scale, x.capped = true;
      if (turned()) x.rows = static_cast<int>(round_up(m, kernel.k_step));
      if (dv.data) x.p = scratch.p + steps(kernel, in_block) * s_row;
      if (scores) {
        x.g = s_g[1] + at_row, x.ds = scratch.ds + steps(kernel, in_block) * s_row;
        x.rows_step = backward_ds_row(kernel, p);
        x.ds_rows = scratch.ds_rows + (turned() ? 0 : in_block * x.rows_step);
      }
      const auto start = [&](i64 from, int count, Seen keys, float* s, float* g, ProductsAhead(&out)[2]) {
        out[0] = h.score_products(packed.q_a, from, count, scratch.k_panels, h.q_steps, keys, s);
        if (scores) out[1] = h.score_products(packed.o_a, from, count, scratch.v_panels, h.o_steps, keys, g);
      };
      if (some && !ready) {
        ProductsAhead now[2] = {};
        start(row, m, columns, x.scores.s, s_g[1] + at_row, now);
        fastdl::run(now[0]), fastdl::run(now[1]);
      }
      ready = false;
      if (turned() && strip + 1 < last) {  // the next strip's, into the buffers that this one leaves
        const i64 next = h.strip_begin(strip + 1), stop = h.strip_begin(strip + 2);
        const Seen keys = h.seen_of(next, stop, key, n);
        ready = keys.begin < keys.end;
        if (ready) start(next, static_cast<int>(stop - next), keys, next_s_g[0], next_s_g[1], x.scores.ahead);
      }
      kernel.grads->softmax_grad[static_cast<int>(d.mask)](x);
      if (turned()) std::swap(s_g, next_s_g);
      if (!some || !dq.data) continue;
      const i64 from = columns.begin / nr * nr;
      TileArgs t = {};
      t.a = unit == 1 ? x.ds + from : x.ds_rows + steps(kernel, from), t.a_row = unit == 1 ? s_row : x.rows_step;
      t.a_col = 1, t.c_row = dq.row, t.k = steps(kernel, columns.end - from), t.m = m;
      t.accumulate = first_key(h, row, m) < key;
      for (i64 j = 0; j < d.D; j += nr) {
        h.set_b(&t, packed.k_b, n, from, j);
        t.c = dq.at(row, j), t.n = static_cast<int>(std::min(nr, d.D - j));
        kernel.tile_p(t);
      }
    }
    const auto add = turned() ? &Part::add_keys_turned : &Part::add_keys;
    if (dv.data) (this->*add)(h, begin, end, key, n, scratch.p, packed.o_b, d.Dv, dv);
    if (dk.data) (this->*add)(h, begin, end, key, n, scratch.ds, packed.q_b, d.D, dk);
  }

  // Whether tiles have limits for the query block against the key block at hand.
  bool limited(i64 block, const Least& k, const Least& k_rows, const Least& v) const {
    if (!p.exact) return false;
    const float q = scratch.q_least[block], o = scratch.o_least[block], scale = std::abs(d.scale);
    const float least = std::min({q, o, k_rows.value, v.value});
    const float ds = o * std::min(1.0f, v.value);  // about what the least rows of dP are, and dS
    return least < kTinyPeak || k.value == 0 || ds * std::min(1.0f, scale * std::min(q, k_rows.value)) < kTinyProduct;
  }

  // run_block by FMA: packs what it needs, adds to sums that it first clears where run_block would not add.
  void run_block_exact(const Head& tiles, i64 block, i64 key, i64 n, const Sums& dq, const Sums& dk,
                       const Sums& dv) const {
    const AttentionKernel& exact = *p.exact;
    const Head h(d, p, args, grads, scratch, sequence, tiles.head, exact);
    const i64 begin = tiles.block_begin(block), end = tiles.block_begin(block + 1), nr = h.nr, s_row = h.s_row;
    for (i64 strip = tiles.block_strip(block); dq.data && strip < tiles.block_strip(block + 1); ++strip) {
      const i64 row = tiles.strip_begin(strip), m = tiles.strip_begin(strip + 1) - row;
      const Seen columns = h.seen_of(row, row + m, key, n);
      if (columns.begin < columns.end && first_key(tiles, row, m) >= key) clear(dq.below(row), m, d.D);
    }
    for (i64 tile = 0; tile < key_tiles(n); ++tile) {
      const i64 from = key_tile(n, tile), count = key_tile(n, tile + 1) - from;
      const Seen rows = seeing(d, h.span, key + from, key + from + count);
      if (std::max(rows.begin, begin) >= std::min(rows.end, end) || adds(h, rows, begin)) continue;
      clear(dk.below(from), count, d.D), clear(dv.below(from), count, d.Dv);
    }
    attention_count_recomputed((end - begin) * n);
    h.pack_columns(h.k_row(key), d.k, n, d.D, scratch.exact_k);
    h.pack_columns(h.v_row(key), d.v, n, d.Dv, scratch.exact_v);
    h.pack_panels(h.k_row(key), d.k, n, d.D, scratch.exact_rows);
    for (i64 row = begin; row < end; row += exact.mr) {
      const int m = static_cast<int>(std::min<i64>(exact.mr, end - row));
      const Seen columns = h.seen_of(row, row + m, key, n);
      if (columns.begin >= columns.end) continue;
      h.pack_operands(row, m, scratch.exact_q, scratch.exact_o);
      h.products({scratch.exact_q, 0}, 0, m, scratch.exact_k, h.q_steps, columns, scratch.s);
      h.products({scratch.exact_o, 0}, 0, m, scratch.exact_v, h.o_steps, columns, scratch.g);
      SoftmaxGradArgs x = h.grad_args(row, m, key, n, columns);
      x.scores.s = x.p = scratch.s, x.g = x.ds = scratch.g, x.scale = d.scale, x.capped = true;
      exact.grads->softmax_grad[static_cast<int>(d.mask)](x);
      const i64 from = columns.begin / nr * nr;
      TileArgs t = {};
      t.accumulate = true;
      t.a = scratch.g + from, t.a_row = s_row, t.a_col = 1, t.k = columns.end - from, t.m = m, t.c_row = dq.row;
      for (i64 j = 0; dq.data && j < d.D; j += nr) {
        h.set_b(&t, {scratch.exact_rows, 0}, n, from, j);
        t.c = dq.at(row, j), t.n = static_cast<int>(std::min(nr, d.D - j));
        exact.tile(t);
      }
      add_exact(exact, scratch.exact_o, m, scratch.s, s_row, from, columns.end, d.Dv, dv);
      add_exact(exact, scratch.exact_q, m, scratch.g, s_row, from, columns.end, d.D, dk);
    }
  }
  // sums^T(c,j) += sum_i x(i,c) a(i,j), x packed [depth][m], keys j of [from, to).
  static void add_exact(const AttentionKernel& exact, const float* x, int m, const float* a, i64 s_row, i64 from,
                        i64 to, i64 depth, const Sums& sums) {
    TileArgs t = {};
    t.a_row = m, t.a_col = 1, t.k = m, t.b_row = s_row, t.b_col = 1, t.c_row = sums.col, t.accumulate = true;
    for (i64 c = 0; sums.data && c < depth; c += exact.mr) {
      t.a = x + c * m, t.m = static_cast<int>(std::min<i64>(exact.mr, depth - c));
      for (i64 j = from; j < to; j += exact.nr) {
        t.b = a + j, t.c = sums.at(j, c), t.n = static_cast<int>(std::min<i64>(exact.nr, round_up(to - j, 16)));
        exact.tile(t);
      }
    }
  }

  // Keys of a block as rows of tiles, or columns.
  i64 key_tiles(i64 n) const { return ceil_div(n, p.kernel->mr); }
  i64 key_tile(i64 n, i64 tile) const { return turned() ? std::min(n, tile * p.kernel->mr) : n * tile / key_tiles(n); }
  // Whether sums of keys that these rows see hold something before the query block that begins at `begin`.
  bool adds(const Head& h, Seen rows, i64 begin) const { return rows.begin < begin || h.head > kv * (d.H / d.Hkv); }

  // As add_keys, with the sums and x turned.
  void add_keys_turned(const Head& h, i64 begin, i64 end, i64 key, i64 n, const float* a, const Operand& x, i64 depth,
                       const Sums& sums) const {
    const AttentionKernel& kernel = h.kernel;
    TileArgs t = {};
    t.a_row = 1, t.b_row = h.s_row, t.b_col = 1, t.c_row = sums.col;
    for (i64 c = 0; c < depth; c += kernel.mr) {
      t.m = static_cast<int>(lines(kernel, std::min<i64>(kernel.mr, depth - c))), t.a_col = t.m;
      for (i64 tile = 0; tile < key_tiles(n); ++tile) {
        const i64 from = key_tile(n, tile), to = key_tile(n, tile + 1);
        const Seen rows = seeing(d, h.span, key + from, key + to);
        if (std::max(rows.begin, begin) >= std::min(rows.end, end)) continue;
        const i64 r0 = std::max<i64>(0, rows.begin - begin) / h.unit * h.unit, r1 = std::min(end, rows.end) - begin;
        t.a = x.data + c * steps(kernel, h.span.Lq) + steps(kernel, begin + r0) * t.m;
        t.b = a + steps(kernel, r0) * h.s_row + from;
        t.c = sums.at(from, c), t.k = steps(kernel, r1 - r0), t.n = static_cast<int>(round_up(to - from, 16));
        t.accumulate = adds(h, rows, begin);
        kernel.tile_p(t);
      }
    }
  }

  // sums(j,:) += sum_i a(i,j) b(i,:) over the rows [begin, end) of the block, keys j of [key, key + n).
  void add_keys(const Head& h, i64 begin, i64 end, i64 key, i64 n, const float* a, const Operand& b, i64 depth,
                const Sums& sums) const {
    const i64 nr = h.nr, unit = h.unit, s_row = h.s_row;
    TileArgs t = {};
    t.a_row = 1, t.a_col = s_row, t.c_row = sums.row;
    for (i64 j = 0; j < depth; j += nr) {
      t.n = static_cast<int>(std::min(nr, depth - j));
      for (i64 tile = 0; tile < key_tiles(n); ++tile) {
        const i64 from = key_tile(n, tile), to = key_tile(n, tile + 1);
        const Seen rows = seeing(d, h.span, key + from, key + to);  // those that see some key of the tile
        const i64 r0 = std::max<i64>(0, rows.begin - begin) / unit,
                  r1 = ceil_div(std::min(end, rows.end) - begin, unit);
        if (r0 >= r1) continue;
        h.set_b(&t, b, h.span.Lq, begin + r0 * unit, j);
        t.a = a + r0 * s_row + from;
        t.c = sums.at(from, j), t.k = r1 - r0, t.m = static_cast<int>(to - from);
        t.accumulate = adds(h, rows, begin);
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
    for (i64 tile = 0; tile < key_tiles(n); ++tile) {
      const i64 from = key_tile(n, tile), to = key_tile(n, tile + 1);
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

  // Tiles: the operands of a head, block by block.
  Packed pack_queries(const Head& h, bool scores, bool want_dk, bool want_dv) const {
    for (i64 block = 0; block < h.blocks; ++block) {
      Least q, o;
      h.pack_strips(block, h.q_row(0), d.q, d.D, scratch.q_strips, false, &q);
      if (scores) h.pack_strips(block, h.o_row(0), grads.dout_step, d.Dv, scratch.o_strips, true, &o);
      if (want_dk) h.pack_turned(block, h.q_row(0), d.q, d.D, scratch.q_panels, &q);
      if (want_dv) h.pack_turned(block, h.o_row(0), grads.dout_step, d.Dv, scratch.o_panels, &o);
      if (p.exact) scratch.q_least[block] = q.value, scratch.o_least[block] = o.value;
    }
    return {{scratch.q_strips, 0}, {scratch.o_strips, 0}, {scratch.q_panels, 0}, {scratch.o_panels, 0}, {}};
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
        if (!packed.q_a.data && turned()) {
          packed = pack_queries(h, scores, dk.data, dv.data);
          if (scores) h.compute_delta(0, Lq);
        } else if (!packed.q_a.data) {
          packed.q_a = h.strip_operand(h.q_row(0), d.q, d.D, scratch.q_strips);
          if (dk.data) packed.q_b = h.panel_operand(h.q_row(0), d.q, Lq, d.D, scratch.q_panels);
          if (dv.data) packed.o_b = h.panel_operand(h.o_row(0), grads.dout_step, Lq, d.Dv, scratch.o_panels);
          if (scores) {
            packed.o_a = h.strip_operand(h.o_row(0), grads.dout_step, d.Dv, scratch.o_strips);
            h.compute_delta(0, Lq);
          }
        }
        const Least k = h.pack_columns(h.k_row(key), d.k, n, d.D, scratch.k_panels);
        Least v, k_rows;
        if (scores) v = h.pack_columns(h.v_row(key), d.v, n, d.Dv, scratch.v_panels);
        if (dq.data) packed.k_b = h.panel_operand(h.k_row(key), d.k, n, d.D, scratch.k_rows, &k_rows);
        for (i64 block = 0; block < h.blocks; ++block) {
          const Seen columns = h.seen_of(h.block_begin(block), h.block_begin(block + 1), key, n);
          if (columns.begin >= columns.end) continue;
          if (limited(block, k, k_rows, v)) {
            run_block_exact(h, block, key, n, dq, dk, dv);
          } else {
            run_block(h, packed, block, key, n, dq, dk, dv);
          }
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
    const Head first(d, p, args, grads, scratch, sequence, kv * group, *p.kernel);
    const i64 begin = chunk * p.chunk, end = std::min(first.span.Lk, begin + p.chunk);
    if (begin >= end && chunk > 0) return;
    const Sums dk = key_sums(grads.dk, scratch.dk, d.D), dv = key_sums(grads.dv, scratch.dv, d.Dv);
    if (group == 0) clear(dk, end - begin, d.D), clear(dv, end - begin, d.Dv);
    for (i64 g = 0; g < group; ++g)
      run_head(Head(d, p, args, grads, scratch, sequence, kv * group + g, *p.kernel), begin, end, dk, dv);
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
        add_head(Head(d, p, args, grads, scratch, sequence, head, kernel()), rows_begin, rows_end, key_begin, key_end,
                 out);
  }
  // By FMA where parts have limits: so no element is looked at for them.
  const AttentionKernel& kernel() const { return p.exact ? *p.exact : *p.kernel; }

  void add_head(const Head& h, i64 rows_begin, i64 rows_end, i64 key_begin, i64 key_end, float* out) const {
    const i64 mr = h.kernel.mr, s_row = h.s_row;
    float* const q = p.exact ? scratch.exact_q : scratch.q_strips;
    float* const o = p.exact ? scratch.exact_o : scratch.o_strips;
    float* const k = p.exact ? scratch.exact_k : scratch.k_panels;
    float* const v = p.exact ? scratch.exact_v : scratch.v_panels;
    h.compute_delta(rows_begin, rows_end);
    for (i64 key = key_begin; key < key_end; key += p.key_block) {
      const i64 n = std::min(p.key_block, key_end - key);
      if (h.seen_of(rows_begin, rows_end, key, n).begin >= h.seen_of(rows_begin, rows_end, key, n).end) continue;
      h.pack_columns(h.k_row(key), d.k, n, d.D, k);
      h.pack_columns(h.v_row(key), d.v, n, d.Dv, v);
      for (i64 row = rows_begin; row < rows_end; row += mr) {
        const int m = static_cast<int>(std::min(mr, rows_end - row));
        const Seen columns = h.seen_of(row, row + m, key, n);
        if (columns.begin >= columns.end) continue;
        h.pack_operands(row, m, q, o);
        h.products({q, 0}, 0, m, k, h.q_steps, columns, scratch.s);
        h.products({o, 0}, 0, m, v, h.o_steps, columns, scratch.g);
        SoftmaxGradArgs x = h.grad_args(row, m, key, n, columns);
        x.scores.s = scratch.s, x.g = x.ds = scratch.g, x.scale = 1;
        h.kernel.grads->mask_grad[static_cast<int>(d.mask)](x);
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
    if (p.kernel->helpers->begin) p.kernel->helpers->begin();
    for (i64 i = next++; i < count; i = next++) body(i, scratch);
    if (p.kernel->helpers->end) p.kernel->helpers->end();
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
