// The attention schedule: query rows are cut into strips of one register tile's height and blocks of strips. A block
// walks the keys that its rows see, a block of keys at a time, and each strip against a block of keys is: scores by
// tiles against packed panels of K, softmax in L1, then O += P V by tiles. A thread takes consecutive query blocks, so
// that what it packed of a head serves all of them; nothing is shared and no thread waits for another.
//
// Tiles of amx multiply beside the vector units: while the softmax of a strip takes exp, its rows start the scores of
// the next strip and, in bf16, O += P V of the one before, a product of 130 or 260 cycles at a time, which fits between
// the 4 to 8 rows of 70 each. By the cycles of a product (16), of a tile load (8) and of a vector of the softmax (9),
// a strip against 128 keys at D = 64 in bf16 takes 2300 for exp, and 1600 for both products beneath it. (In parts, the
// products take longer than exp, whatever lies beneath it.)
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cpu/schedule.h"
#include "base/arena.h"
#include "base/parallel.h"

namespace fastdl {
namespace {

// Scratch of a thread, cut as the plan says.
struct Scratch {
  float *q, *k, *v, *s, *p, *o, *max, *sum;
  char* packed;                        // [blocks]: see Pack
  float *exact_q, *exact_k, *exact_v;  // operands of AttentionPlan::exact

  Scratch(char* memory, const AttentionPlan& plan) {
    const auto take = [&](i64 bytes) {
      char* const begin = memory;
      memory += bytes;
      return reinterpret_cast<float*>(begin);
    };
    q = take(plan.q_bytes), k = take(plan.k_bytes), v = take(plan.v_bytes), s = take(plan.s_bytes);
    p = plan.p_bytes ? take(plan.p_bytes) : s;
    o = take(plan.o_bytes), max = take(plan.row_bytes), sum = max + plan.strips * row_slots(*plan.kernel);
    packed = reinterpret_cast<char*>(sum + plan.strips * row_slots(*plan.kernel));
    exact_q = take(0);
    exact_k = exact_q + plan.exact_q_floats, exact_v = exact_k + plan.exact_k_floats;
  }
};

// Of a block of keys in scratch.
enum Pack : char { kNone, kPacked, kLimited };  // kLimited: for AttentionPlan::exact

// One sequence and one key head.
struct Head {
  const AttentionDesc& d;
  const AttentionPlan& p;
  const AttentionArgs& args;
  AttentionSpan span;
  i64 sequence, batch;  // batch: 0 where the sequences lie in one
  const void* k = nullptr;
  const void* v = nullptr;
  i64 strips, blocks;  // of queries

  Head(const AttentionDesc& desc, const AttentionPlan& plan, const AttentionArgs& a, i64 seq)
      : d(desc), p(plan), args(a), span(attention_span(desc, a, seq)), sequence(seq), batch(desc.sequences ? 0 : seq) {
    strips = ceil_div(span.Lq, plan.kernel->mr);
    blocks = ceil_div(strips, plan.strips);
  }
  // Tiles are whole but for the last; else strips are of even height.
  i64 strip_begin(i64 strip) const {
    return is_tiled(*p.kernel) ? std::min(span.Lq, strip * p.kernel->mr) : span.Lq * strip / strips;
  }
  i64 block_strip(i64 block) const { return strips * block / blocks; }
  Seen block_seen(i64 block) const {
    return seen(d, span, strip_begin(block_strip(block)), strip_begin(block_strip(block + 1)));
  }
  // In units of one row against 16 keys; never 0.
  i64 block_cost(i64 block) const {
    const Seen s = block_seen(block);
    const i64 rows = strip_begin(block_strip(block + 1)) - strip_begin(block_strip(block));
    return rows * (std::max<i64>(0, s.end - s.begin) / 16 + 1);
  }
  i64 cost() const {
    i64 sum = 0;
    for (i64 i = 0; i < blocks; ++i) sum += block_cost(i);
    return sum;
  }
};

constexpr int kMaxLines = 32;  // of a panel

// Packed panels of keys [begin, begin + n): K as [panel][steps][nr]; V, where v_out is not null, likewise along the
// keys. Tiny K is harmless: scores are off by what is lost of them, not by a share of it.
Pack pack_keys(const Head& h, const AttentionKernel& kernel, i64 begin, i64 n, float* k_out, float* v_out) {
  const AttentionDesc& d = h.d;
  const i64 nr = kernel.nr, k_steps = steps(kernel, d.D), v_steps = steps(kernel, h.p.key_block);
  bool limited = false;
  for (i64 j = 0; j < n; j += nr) {
    float peak[kMaxLines] = {};
    kernel.helpers->pack_b(at(h.k, (begin + j) * d.k.row, d.dtype), d.k.col, d.k.row, d.D,
                           static_cast<int>(std::min(nr, n - j)), kernel.nr, k_out + j * k_steps, peak);
    limited |= is_large(peak, nr);
  }
  for (i64 j = 0; v_out && j < d.Dv; j += nr) {
    float peak[kMaxLines] = {};
    kernel.helpers->pack_b(at(h.v, begin * d.v.row + j * d.v.col, d.dtype), d.v.row, d.v.col, n,
                           static_cast<int>(std::min(nr, d.Dv - j)), kernel.nr, v_out + j * v_steps, peak);
    limited |= is_large(peak, nr) || is_tiny(peak, nr);
  }
  return limited ? kLimited : kPacked;
}

// The rows [begin, begin + m) of a query head, packed: whether tiles have limits for them.
bool pack_rows(const Head& h, const AttentionKernel& kernel, i64 head, i64 begin, i64 m, float* out) {
  const AttentionDesc& d = h.d;
  float peak[kMaxLines] = {};
  kernel.helpers->pack_a(
      at(h.args.q, h.batch * d.q.batch + head * d.q.head + (h.span.q_begin + begin) * d.q.row, d.dtype), d.q.col,
      d.q.row, d.D, static_cast<int>(m), static_cast<int>(lines(kernel, m)), out, peak);
  return is_large(peak, m);
}

// Query rows [begin, begin + m) against the keys [key, key + n) of a block: what they add to sum, max and o.
struct StripBlock {
  i64 begin;
  int m;
  i64 key;
  int n;
  const float* q;  // [steps][m]
  const float* k;
  const float* v;  // packed, or null
  float *s, *p, *max, *sum, *o;
  i64 p_row, head;
  bool first;
};

// The keys of the block that the strip sees, from a whole panel on; none where begin >= end.
Seen strip_columns(const Head& h, const AttentionKernel& kernel, const StripBlock& x) {
  const Seen some = seen(h.d, h.span, x.begin, x.begin + x.m);
  return {std::max<i64>(0, some.begin - x.key) / kernel.nr * kernel.nr, std::min<i64>(x.n, some.end - x.key)};
}

// The rows of the mask come from memory while the scores are computed.
void prefetch_mask(const Head& h, const AttentionKernel& kernel, const StripBlock& x) {
  const AttentionDesc& d = h.d;
  const auto [begin, end] = strip_columns(h, kernel, x);
  const SoftmaxArgs f = softmax_args(d, h.args, h.span, h.sequence, x.head, x.begin, x.key, x.n);
  if (f.mask_col != 1) return;
  const i64 item = d.mask == MaskKind::boolean ? 1 : d.mask == MaskKind::f32 ? 4 : item_size(d.dtype);
  for (int i = 0; i < (f.mask_row ? x.m : 1); ++i) {
    const char* const row = static_cast<const char*>(f.mask) + i * f.mask_row * item;
    for (i64 j = begin * item; j < end * item; j += 64) __builtin_prefetch(row + j, 0, 2);  // L2: L1 is full of scores
  }
}

ProductsAhead strip_scores(const Head& h, const AttentionKernel& kernel, const StripBlock& x) {
  return panel_products(kernel, x.q, 0, x.m, x.k, steps(kernel, h.d.D), strip_columns(h, kernel, x), x.s,
                        h.p.key_block + 16);
}

// O += P V.
ProductsAhead strip_values(const Head& h, const AttentionKernel& kernel, const StripBlock& x) {
  const AttentionDesc& d = h.d;
  const auto [begin, end] = strip_columns(h, kernel, x);
  const i64 nr = kernel.nr, o_row = round_up(d.Dv, 16);
  ProductsAhead y = {};
  TileArgs& t = y.first;
  t.a = x.p + steps(kernel, begin), t.a_row = x.p_row, t.a_col = 1, t.b_col = 1, t.k = steps(kernel, end - begin);
  t.c = x.o, t.c_row = o_row, t.m = static_cast<int>(lines(kernel, x.m)), t.n = static_cast<int>(nr);
  t.accumulate = !x.first;
  y.tile = kernel.tile_p, y.count = static_cast<int>(ceil_div(d.Dv, nr));
  const i64 before = (y.count - 1) * nr;
  if (x.v) {
    t.b = x.v + steps(kernel, begin) * nr, t.b_row = nr, y.b_step = steps(kernel, h.p.key_block) * nr;
    y.last_n = static_cast<int>(std::min(nr, o_row - before));
  } else {
    t.b = static_cast<const float*>(h.v) + (x.key + begin) * d.v.row, t.b_row = d.v.row, y.b_step = nr;
    y.last_n = static_cast<int>(d.Dv - before);
  }
  return y;
}

// The strip's scores, computed, to P; meanwhile products of other strips.
void strip_softmax(const Head& h, const AttentionKernel& kernel, const StripBlock& x, const ProductsAhead& scores,
                   const ProductsAhead& values) {
  const AttentionDesc& d = h.d;
  const auto [begin, end] = strip_columns(h, kernel, x);
  SoftmaxArgs f = softmax_args(d, h.args, h.span, h.sequence, x.head, x.begin, x.key, x.n);
  f.s = x.s, f.s_row = h.p.key_block + 16, f.p = x.p, f.p_row = x.p_row;
  f.m = x.m, f.begin = static_cast<int>(begin), f.end = static_cast<int>(end);
  f.stop = static_cast<int>(round_up(end, std::max(16, kernel.k_step)));
  f.max = x.max, f.sum = x.sum, f.o = x.o, f.o_row = round_up(d.Dv, 16), f.dv = static_cast<int>(d.Dv);
  f.first = x.first, f.ahead[0] = scores, f.ahead[1] = values;
  kernel.ops->softmax[static_cast<int>(d.mask)](f);
}

// The same by FMA: packs what it needs.
void run_exact(const Head& h, const StripBlock& x, const Scratch& scratch) {
  const AttentionKernel& exact = *h.p.exact;
  const i64 o_row = round_up(h.d.Dv, 16);
  pack_keys(h, exact, x.key, x.n, scratch.exact_k, scratch.exact_v);
  attention_count_recomputed(i64{x.m} * x.n);
  if (x.first) std::fill_n(x.o, x.m * o_row, 0.0f);
  for (int row = 0; row < x.m; row += exact.mr) {
    StripBlock y = x;
    y.begin += row, y.m = std::min(exact.mr, x.m - row), y.o = x.o + row * o_row, y.first = false;
    pack_rows(h, exact, x.head, y.begin, y.m, scratch.exact_q);
    float max[kMaxLines], sum[kMaxLines];  // written in whole vectors
    std::fill_n(std::copy_n(x.max + row, y.m, max), kMaxLines - y.m, -INFINITY);
    std::fill_n(std::copy_n(x.sum + row, y.m, sum), kMaxLines - y.m, 0.0f);
    y.q = scratch.exact_q, y.k = scratch.exact_k, y.v = scratch.exact_v, y.p = y.s, y.p_row = h.p.key_block + 16;
    y.max = max, y.sum = sum;
    const Seen columns = strip_columns(h, exact, y);
    if (columns.begin < columns.end) {
      run(strip_scores(h, exact, y));
      strip_softmax(h, exact, y, {}, {});
      run(strip_values(h, exact, y));
    }
    std::copy_n(max, y.m, x.max + row);
    std::copy_n(sum, y.m, x.sum + row);
  }
}

// Block `block` of query head `head`.
void run_block(const Head& h, i64 head, i64 block, const Scratch& scratch) {
  const AttentionDesc& d = h.d;
  const AttentionPlan& p = h.p;
  const AttentionKernel& kernel = *p.kernel;
  const i64 first = h.block_strip(block), strips = h.block_strip(block + 1) - first;
  const i64 q_strip = kernel.mr * steps(kernel, d.D), o_row = round_up(d.Dv, 16), slots = row_slots(kernel);
  const i64 k_block = p.key_block * steps(kernel, d.D);
  const i64 v_block = steps(kernel, p.key_block) * round_up(d.Dv, kernel.nr);
  std::uint64_t limited = 0;  // strips
  for (i64 i = 0; i < strips; ++i) {
    const i64 begin = h.strip_begin(first + i), m = h.strip_begin(first + i + 1) - begin;
    if (pack_rows(h, kernel, head, begin, m, scratch.q + i * q_strip)) limited |= std::uint64_t{1} << i;
  }
  std::fill_n(scratch.max, strips * slots, -INFINITY);
  std::fill_n(scratch.sum, strips * slots, 0.0f);

  const Seen range = h.block_seen(block);
  std::uint64_t started = 0;
  for (i64 kb = range.begin / p.key_block; kb * p.key_block < range.end; ++kb) {
    const i64 key = kb * p.key_block, n = std::min(p.key_block, h.span.Lk - key), slot = p.keep_k ? kb : 0;
    float* const k = scratch.k + slot * k_block;
    float* const v = p.pack_v ? scratch.v + slot * v_block : nullptr;
    if (!p.keep_k || !scratch.packed[slot]) scratch.packed[slot] = pack_keys(h, kernel, key, n, k, v);
    const bool limits = scratch.packed[slot] == kLimited;
    const int buffers = score_buffers(kernel);
    StripBlock todo[kStripLimit];
    int count = 0;
    for (i64 i = 0; i < strips; ++i) {
      const i64 begin = h.strip_begin(first + i);
      StripBlock x = {};
      x.begin = begin, x.m = static_cast<int>(h.strip_begin(first + i + 1) - begin), x.key = key;
      x.n = static_cast<int>(n), x.q = scratch.q + i * q_strip, x.k = k, x.v = v;
      x.s = scratch.s + count % buffers * kernel.mr * (p.key_block + 16), x.p = p.p_bytes ? scratch.p : x.s,
      x.p_row = p.p_row;
      x.max = scratch.max + i * slots, x.sum = scratch.sum + i * slots;
      x.o = scratch.o + i * kernel.mr * o_row, x.head = head, x.first = !(started >> i & 1);
      const Seen columns = strip_columns(h, kernel, x);
      if (columns.begin >= columns.end) continue;
      started |= std::uint64_t{1} << i;
      if (p.exact && (limits || limited >> i & 1)) {
        run_exact(h, x, scratch);
      } else {
        todo[count++] = x;
      }
    }
    ProductsAhead values = {};
    for (int i = 0; i < count; ++i) {
      const bool ahead = buffers > 1 && i + 1 < count, now = i == 0 || buffers == 1;
      if (d.mask != MaskKind::none && now) prefetch_mask(h, kernel, todo[i]);
      if (d.mask != MaskKind::none && ahead) prefetch_mask(h, kernel, todo[i + 1]);
      if (now) run(strip_scores(h, kernel, todo[i]));
      strip_softmax(h, kernel, todo[i], ahead ? strip_scores(h, kernel, todo[i + 1]) : ProductsAhead{}, values);
      values = strip_values(h, kernel, todo[i]);
      if (buffers < 3) run(values), values = {};
    }
    run(values);
  }

  for (i64 i = 0; i < strips; ++i) {
    const i64 begin = h.strip_begin(first + i), m = h.strip_begin(first + i + 1) - begin;
    const float* const max = scratch.max + i * slots;
    const float* const sum = scratch.sum + i * slots;
    AttentionFinishArgs f = {};
    f.o = scratch.o + i * kernel.mr * o_row, f.o_row = o_row, f.sum = sum;
    f.factor = dropout_factor(d);
    f.out = at(h.args.out, h.batch * d.out.batch + head * d.out.head + (h.span.q_begin + begin) * d.out.row, d.dtype);
    f.out_row = d.out.row, f.m = static_cast<int>(m), f.dv = static_cast<int>(d.Dv);
    kernel.ops->finish(f);
    if (!h.args.lse) continue;
    const i64 rows = d.sequences ? d.total_q : d.Lq;
    float* const lse = h.args.lse + 2 * ((h.batch * d.H + head) * rows + h.span.q_begin + begin);
    for (i64 r = 0; r < m; ++r) store_lse(d, max[r], sum[r], lse + 2 * r);
  }
}

// Runs the query blocks whose work begins within [begin, end) of all work in order: sequences, heads, blocks.
void run_share(const AttentionDesc& d, const AttentionPlan& p, const AttentionArgs& args, i64 begin, i64 end,
               const Scratch& scratch) {
  i64 work = 0;
  const i64 group = d.H / d.Hkv;
  for (i64 s = 0; s < (d.sequences ? d.sequences : d.B) && work < end; ++s) {
    Head h(d, p, args, s);
    const i64 cost = h.cost();
    i64 packed = -1;  // the key head that scratch holds
    for (i64 head = 0; head < d.H; ++head) {
      if (work + cost <= begin || work >= end) {
        work += cost;
        continue;
      }
      const i64 kv = head / group;
      if (packed != kv) {
        h.k = at(args.k, h.batch * d.k.batch + kv * d.k.head + h.span.k_begin * d.k.row, d.dtype);
        h.v = at(args.v, h.batch * d.v.batch + kv * d.v.head + h.span.k_begin * d.v.row, d.dtype);
        if (p.keep_k) std::memset(scratch.packed, 0, static_cast<std::size_t>(p.blocks));
        packed = kv;
      }
      for (i64 block = 0; block < h.blocks; ++block) {
        if (work >= begin && work < end) run_block(h, head, block, scratch);
        work += h.block_cost(block);
      }
    }
  }
}

}  // namespace

void attention_run(const AttentionDesc& d, const AttentionPlan& p, const AttentionArgs& args) {
  if (p.kernel->kind == AttentionKind::kDecode) return attention_run_decode(d, p, args);
  i64 work = 0;
  for (i64 s = 0; s < (d.sequences ? d.sequences : d.B); ++s) work += Head(d, p, args, s).cost() * d.H;
  if (work == 0 || d.Dv == 0) return;
  ArenaLease memory(p.workspace_bytes());
  parallel(p.threads, [&](int thread, int threads) {
    const Scratch scratch(memory.data() + thread * p.per_thread_bytes(), p);
    if (p.kernel->helpers->begin) p.kernel->helpers->begin();
    run_share(d, p, args, work * thread / threads, work * (thread + 1) / threads, scratch);
    if (p.kernel->helpers->end) p.kernel->helpers->end();
  });
}

}  // namespace fastdl
