// The decode schedule: few query rows against many keys. All rows that read one key head are taken together, the keys
// are cut into chunks of a fixed number, and each chunk is one unit of work: K and V pass through once, in place. What
// the chunks found is combined in their order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cpu/schedule.h"
#include "base/arena.h"
#include "base/parallel.h"

namespace fastdl {
namespace {

// One chunk of keys of one key head of one sequence.
struct Decode {
  const AttentionDesc& d;
  const AttentionPlan& p;
  const AttentionArgs& args;
  i64 group, rows, o_row;     // query heads of a key head; rows = group * Lq
  float *max, *sum, *output;  // [sequence][key head][chunk][rows], output rows o_row long

  Decode(const AttentionDesc& desc, const AttentionPlan& plan, const AttentionArgs& a, char* shared)
      : d(desc), p(plan), args(a), group(desc.H / desc.Hkv), rows(group * desc.Lq), o_row(round_up(desc.Dv, 16)) {
    output = reinterpret_cast<float*>(shared);
    max = output + units() * rows * o_row;
    sum = max + units() * rows;
  }
  i64 sequences() const { return d.sequences ? d.sequences : d.B; }
  i64 units() const { return sequences() * d.Hkv * p.blocks; }

  void run_chunk(i64 unit, char* memory) const {
    const i64 chunk = unit % p.blocks, head = unit / p.blocks % d.Hkv, sequence = unit / p.blocks / d.Hkv;
    const AttentionSpan span = attention_span(d, args, sequence);
    const i64 batch = d.sequences ? 0 : sequence, key = chunk * p.key_block;
    const i64 n = std::min(p.key_block, span.Lk - key), Lq = span.Lq, item = item_size(d.dtype);
    const Seen all = seen(d, span, 0, Lq);
    const i64 begin = std::max<i64>(0, all.begin - key) / 16 * 16, end = std::min(n, all.end - key);
    float* const max_out = max + unit * rows;
    float* const sum_out = sum + unit * rows;
    float* const o = output + unit * rows * o_row;
    if (begin >= end || Lq == 0) {
      std::fill_n(max_out, rows, -INFINITY);
      std::fill_n(sum_out, rows, 0.0f);
      std::fill_n(o, rows * o_row, 0.0f);
      return;
    }
    const i64 used = group * Lq;  // rows g * Lq + i
    char* const q = memory;
    float* const s = reinterpret_cast<float*>(memory + p.q_bytes);
    float* const row_max = reinterpret_cast<float*>(memory + p.q_bytes + p.s_bytes);
    float* const row_sum = row_max + round_up(rows, 16);
    const i64 s_row = p.key_block + 16;
    for (i64 g = 0; g < group; ++g)
      for (i64 i = 0; i < Lq; ++i)
        std::memcpy(
            q + (g * Lq + i) * d.D * item,
            at(args.q, batch * d.q.batch + (head * group + g) * d.q.head + (span.q_begin + i) * d.q.row, d.dtype),
            static_cast<std::size_t>(d.D * item));
    const AttentionOps& ops = *p.kernel->ops;
    const i64 first = span.k_begin + key + begin;
    DecodeScoresArgs x = {};
    x.q = q, x.q_row = d.D, x.k = at(args.k, batch * d.k.batch + head * d.k.head + first * d.k.row, d.dtype);
    x.k_row = d.k.row, x.s = s + begin, x.s_row = s_row;
    x.m = static_cast<int>(used), x.n = static_cast<int>(end - begin), x.d = static_cast<int>(d.D);
    ops.scores(x);
    // Rows that differ in nothing but their scores go through the softmax together.
    const Seen w = window(d, span, 0, 1);
    const bool alike =
        d.mask == MaskKind::none && d.dropout_p == 0 && w.begin + used <= key + begin && w.end >= key + end;
    for (i64 g = 0; g < (alike ? 1 : group); ++g) {
      const i64 m = alike ? used : Lq;
      SoftmaxArgs f = softmax_args(d, args, span, sequence, head * group + g, 0, key, n);
      f.s = s + g * Lq * s_row, f.s_row = s_row, f.m = static_cast<int>(m);
      f.begin = static_cast<int>(begin), f.end = static_cast<int>(end), f.stop = static_cast<int>(round_up(end, 16));
      f.p = f.s, f.p_row = s_row;
      f.max = row_max, f.sum = row_sum, f.first = true;
      ops.softmax[static_cast<int>(d.mask)](f);
      std::copy_n(row_max, m, max_out + g * Lq);
      std::copy_n(row_sum, m, sum_out + g * Lq);
    }
    DecodeValuesArgs y = {};
    y.p = s + begin / p.kernel->k_unit, y.p_row = s_row,
    y.v = at(args.v, batch * d.v.batch + head * d.v.head + first * d.v.row, d.dtype);
    y.v_row = d.v.row, y.o = o, y.o_row = o_row;
    y.m = static_cast<int>(used), y.n = static_cast<int>(end - begin), y.dv = static_cast<int>(d.Dv);
    ops.values(y);
  }

  void finish_head(i64 index) const {
    const i64 head = index % d.Hkv, sequence = index / d.Hkv, batch = d.sequences ? 0 : sequence;
    const AttentionSpan span = attention_span(d, args, sequence);
    const i64 first = index * p.blocks * rows;
    for (i64 row = 0; row < group * span.Lq; ++row) {
      DecodeCombineArgs c = {};
      c.max = max + first + row, c.sum = sum + first + row, c.o = output + (first + row) * o_row;
      c.row_step = rows, c.o_step = rows * o_row, c.chunks = p.blocks, c.dv = static_cast<int>(d.Dv),
      c.factor = max_unit(d);
      p.kernel->ops->combine(c);
      const i64 h = head * group + row / span.Lq, i = span.q_begin + row % span.Lq;
      AttentionFinishArgs f = {};
      f.o = c.o, f.o_row = o_row, f.sum = c.sum, f.factor = dropout_factor(d);
      f.out = at(args.out, batch * d.out.batch + h * d.out.head + i * d.out.row, d.dtype);
      f.out_row = d.out.row, f.m = 1, f.dv = static_cast<int>(d.Dv);
      p.kernel->ops->finish(f);
      if (!args.lse) continue;
      const i64 rows_of_head = d.sequences ? d.total_q : d.Lq;
      store_lse(d, *c.max, *c.sum, args.lse + 2 * ((batch * d.H + h) * rows_of_head + i));
    }
  }
};

}  // namespace

void attention_run_decode(const AttentionDesc& d, const AttentionPlan& p, const AttentionArgs& args) {
  if (d.Hkv == 0 || d.Lq == 0 || d.B == 0) return;
  ArenaLease memory(p.workspace_bytes());
  const Decode decode(d, p, args, memory.data());
  parallel(p.threads, [&](int thread, int threads) {
    char* const own = memory.data() + p.shared_bytes + thread * p.per_thread_bytes();
    for (i64 u = decode.units() * thread / threads, end = decode.units() * (thread + 1) / threads; u < end; ++u)
      decode.run_chunk(u, own);
  });
  const i64 heads = decode.sequences() * d.Hkv;
  parallel(p.threads, [&](int thread, int threads) {
    for (i64 i = heads * thread / threads, end = heads * (thread + 1) / threads; i < end; ++i) decode.finish_head(i);
  });
}

}  // namespace fastdl
