// The recurrent schedule. A thread owns blocks of hidden units through the whole sequence: it packs their part of W_hh,
// keeps their c, and writes their h; all of h is read by everyone, so a step ends with a barrier.
#include <algorithm>
#include <cstring>

#include "base/arena.h"
#include "base/parallel.h"
#include "rnn/rnn.h"

namespace fastdl {
namespace {

const void* at(const void* p, i64 elements, DType dtype) {
  return static_cast<const char*>(p) + elements * kItemSize[static_cast<int>(dtype)];
}
void* at(void* p, i64 elements, DType dtype) {
  return static_cast<char*>(p) + elements * kItemSize[static_cast<int>(dtype)];
}

struct Range {
  i64 begin, end;
  i64 size() const { return end - begin; }
};
// The part of `count` things, `unit` of them to a block, that a thread owns; whole blocks.
Range share(i64 count, i64 unit, int thread, int threads) {
  const i64 blocks = (count + unit - 1) / unit;
  return {std::min(count, blocks * thread / threads * unit), std::min(count, blocks * (thread + 1) / threads * unit)};
}

// Walks the steps in the order they are computed, or (backward) in the reverse of that.
struct Clock {
  const RnnSteps* steps;
  i64 T, B, t, row;  // t: the step; row: rows before it
  bool rising;

  Clock(const RnnDesc& d, const RnnSteps& s, bool backward) : steps(&s), T(d.T), B(d.B), rising(s.reverse == backward) {
    t = rising ? 0 : T - 1;
    row = rising ? 0 : s.rows - size(t);
  }
  i64 size(i64 step) const { return step < 0 || step >= T ? 0 : steps->batch_sizes ? steps->batch_sizes[step] : B; }
  i64 size() const { return size(t); }
  i64 next_size() const { return size(rising ? t + 1 : t - 1); }
  void advance() {
    if (rising) row += size(t);
    t += rising ? 1 : -1;
    if (!rising) row -= size(t);
  }
};

// Row b of the clock's step; packed rows lie one behind the other.
void* row_of(const RnnRows& rows, const RnnSteps& steps, i64 t, i64 row, DType dtype) {
  return at(rows.data, steps.batch_sizes ? row * rows.row : t * rows.step, dtype);
}

// A matrix in scratch in the form that products read: rows of `row` floats, each k_unit elements.
struct Operand {
  float* data;
  i64 row;
  int k_unit;
  void* at(i64 i, i64 j) const { return reinterpret_cast<char*>(data + i * row) + j * (k_unit == 1 ? 4 : 2); }
};

// A line that another core has read since this one wrote it: written to, it costs the whole way between the two, and
// stores wait for each other. Asked for while the products run, it is there when the cell is done. (Compilers emit this
// instruction only above the base level; processors that lack it take it for a no-op.)
void own_line(void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}
void own_lines(const Operand& x, i64 m, i64 begin, i64 end) {
  constexpr i64 kLine = 64;
  for (i64 i = 0; i < m; ++i)
    for (char* p = static_cast<char*>(x.at(i, begin)); p < x.at(i, end); p += kLine) own_line(p);
}

struct States {  // float32
  float* data;
  i64 row;
  float* at(i64 i, i64 j) const { return data + i * row + j; }
};

// Tile rows of m, cut evenly: tile i is [begin(i), begin(i + 1)).
struct RowTiles {
  i64 m, count;
  RowTiles(i64 rows, i64 most) : m(rows), count((rows + most - 1) / most) {}
  i64 begin(i64 i) const { return m * i / count; }
};

// Panels [n/nr][steps][nr], or float32 rows as they lie in memory.
struct Panels {
  const float* data;
  i64 panel, row;
};

// c[m, n] (+)= a[m, steps] * b; columns of c from a panel's first on.
void run_product(const GemmKernel& kernel, const Operand& a, i64 m, i64 steps, const Panels& b, i64 n, const States& c,
                 i64 column, bool accumulate) {
  const RowTiles tiles(m, kernel.mr);
  const i64 kc = kernel.kc / kernel.k_unit;
  TileArgs t = {};
  t.a_row = a.row, t.a_col = 1, t.b_row = b.row, t.b_col = 1, t.c_row = c.row;
  for (i64 j = 0; j < n; j += kernel.nr) {
    t.n = static_cast<int>(std::min<i64>(kernel.nr, n - j));
    for (i64 k = 0; k < steps; k += kc) {
      t.k = std::min(kc, steps - k);
      t.b = b.data + j / kernel.nr * b.panel + k * b.row;
      t.accumulate = accumulate || k > 0;
      for (i64 i = 0; i < tiles.count; ++i) {
        const i64 row = tiles.begin(i);
        t.m = static_cast<int>(tiles.begin(i + 1) - row);
        t.a = a.data + row * a.row + k;
        t.c = c.at(row, column + j);
        kernel.tile(t);
      }
    }
  }
}

struct Scratch {
  float *w, *r, *h, *hidden, *state, *c, *bias, *sums;

  Scratch(const RnnPlan& p, char* memory) {
    const auto take = [&](i64 bytes) {
      float* const part = reinterpret_cast<float*>(memory);
      memory += bytes;
      return part;
    };
    w = take(p.w_bytes), r = take(p.r_bytes), h = take(p.h_bytes), hidden = take(p.hidden_bytes);
    state = take(p.state_bytes), c = take(p.c_bytes), bias = take(p.bias_bytes), sums = take(0);
  }
};

struct Forward {
  const RnnDesc& d;
  const RnnPlan& p;
  const RnnArgs& args;
  const RnnKernel& kernel;
  const RnnFunctions& fn;
  Scratch scratch;
  i64 gates, steps, hidden_steps;
  Operand h[2], hidden;
  States c, state;
  Barrier barrier;

  Forward(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& a, char* memory)
      : d(desc), p(plan), args(a), kernel(*plan.kernel), fn(*kernel.fn), scratch(plan, memory) {
    gates = kernel.gates() * d.H;
    steps = (d.P + kernel.k_unit - 1) / kernel.k_unit;
    hidden_steps = (d.H + kernel.k_unit - 1) / kernel.k_unit;
    const i64 row = rnn_padded(steps);
    h[0] = {scratch.h, row, kernel.k_unit};
    h[1] = {scratch.h + d.B * row, row, kernel.k_unit};
    hidden = {scratch.hidden, rnn_padded(hidden_steps), kernel.k_unit};
    c = {scratch.c, rnn_padded(d.H)};
    state = {scratch.state, rnn_padded(d.P)};
  }

  Panels panels(const float* packed, i64 column, i64 depth) const {
    return {packed + column * depth, p.product->nr * depth, p.product->nr};
  }
  i64 block_floats() const { return kernel.columns() * steps; }

  void prepare(const Range& units, const Range& columns, const Range& rows) {
    for (i64 u = units.begin; u < units.end; u += kernel.units()) {
      const i64 block = u / kernel.units();
      if (!p.direct) fn.pack(args.w, args.w_row, args.w_col, d.H, d.P, u, scratch.w + block * block_floats());
      float* bias = scratch.bias + block * kernel.columns();
      std::memset(bias, 0, static_cast<std::size_t>(kernel.columns()) * sizeof(float));
      for (i64 g = 0; args.bias && g < kernel.gates(); ++g) {
        const i64 n = std::min<i64>(kernel.units(), d.H - u);
        if (args.bias_step == 1) {
          fn.widen(at(args.bias, g * d.H + u, d.dtype), n, bias + g * kernel.units());
        } else {
          for (i64 j = 0; j < n; ++j)
            fn.widen(at(args.bias, (g * d.H + u + j) * args.bias_step, d.dtype), 1, bias + g * kernel.units() + j);
        }
      }
    }
    if (d.projected && columns.size() > 0)
      gemm_pack_b(at(args.r, columns.begin * args.r_row, d.dtype), args.r_col, args.r_row, d.H, columns.size(),
                  *p.product, scratch.r + columns.begin * hidden_steps);
    for (i64 i = rows.begin; i < rows.end; ++i) {
      for (const Operand& x : h) {
        std::memset(x.at(i, 0), 0, static_cast<std::size_t>(x.row) * sizeof(float));
        if (args.h0) fn.enter(at(args.h0, i * args.h0_row, d.dtype), d.P, x.at(i, 0));
      }
      if (d.projected) std::memset(hidden.at(i, 0), 0, static_cast<std::size_t>(hidden.row) * sizeof(float));
      if (d.cell != RnnCell::lstm) continue;
      std::memset(c.at(i, 0), 0, static_cast<std::size_t>(c.row) * sizeof(float));
      if (args.c0) fn.widen(at(args.c0, i * args.c0_row, d.dtype), d.H, c.at(i, 0));
    }
  }

  // Gates and the cell of one block of hidden units, m rows from row i of the step on.
  void run_block(const Clock& clock, const Operand& before, const Operand& after, i64 unit, i64 i, i64 m, float* sums) {
    if (p.direct) {
      run_dots(before, unit, i, m, sums);
    } else {
      run_panels(before, unit, i, m, sums);
    }
    update(clock, before, after, unit, i, m, sums);
  }

  // sums[m][gates][units] = h W^T of one block, from its panels.
  void run_panels(const Operand& before, i64 unit, i64 i, i64 m, float* sums) {
    const RowTiles tiles(m, kernel.mr);
    const i64 kc = kernel.kc / kernel.k_unit;
    const float* w = scratch.w + unit / kernel.units() * block_floats();
    TileArgs t = {};
    t.a_row = before.row, t.a_col = 1, t.b_row = kernel.nr, t.b_col = 1, t.c_row = kernel.columns(), t.n = kernel.nr;
    for (int panel = 0; panel < kernel.panels; ++panel) {
      for (i64 k = 0; k < steps; k += kc) {
        t.k = std::min(kc, steps - k);
        t.b = w + (panel * steps + k) * kernel.nr;
        t.accumulate = k > 0;
        for (i64 r = 0; r < tiles.count; ++r) {
          const i64 row = tiles.begin(r);
          t.m = static_cast<int>(tiles.begin(r + 1) - row);
          t.a = before.data + (i + row) * before.row + k;
          t.c = sums + row * t.c_row + panel * kernel.nr;
          fn.tile(t);
        }
      }
    }
  }

  // The same from W where it lies.
  void run_dots(const Operand& before, i64 unit, i64 i, i64 m, float* sums) {
    const GemmKernel& dot = *p.direct;
    const i64 n = std::min<i64>(kernel.units(), d.H - unit);
    TileArgs t = {};
    t.a_row = before.row * kernel.k_unit, t.a_col = 1, t.b_row = 1, t.b_col = args.w_row, t.c_row = kernel.columns();
    t.k = d.P;
    for (i64 g = 0; g < kernel.gates(); ++g) {
      for (i64 j = 0; j < n; j += dot.nr) {
        t.b = at(args.w, (g * d.H + unit + j) * args.w_row, d.dtype);
        t.n = static_cast<int>(std::min<i64>(dot.nr, n - j));
        for (i64 row = 0; row < m; row += dot.mr) {
          t.m = static_cast<int>(std::min<i64>(dot.mr, m - row));
          t.a = before.at(i + row, 0);
          t.c = sums + row * t.c_row + g * kernel.units() + j;
          dot.tile(t);
        }
      }
    }
  }

  void update(const Clock& clock, const Operand& before, const Operand& after, i64 unit, i64 i, i64 m,
              const float* sums) {
    RnnUpdateArgs u = {};
    u.sums = sums, u.bias = scratch.bias + unit / kernel.units() * kernel.columns();
    u.x = at(args.x, (clock.row + i) * gates + unit, d.dtype), u.gates_row = gates, u.H = d.H;
    u.c = c.at(i, unit), u.c_row = c.row;
    u.h = before.at(i, unit), u.h_next = (d.projected ? hidden : after).at(i, unit);
    u.h_row = (d.projected ? hidden : after).row * kernel.k_unit;
    if (!d.projected) u.y = at(row_of(args.y, args.steps, clock.t, clock.row, d.dtype), i * args.y.row + unit, d.dtype);
    u.y_row = args.y.row;
    if (args.saved) {
      u.saved = at(args.saved, (clock.row + i) * gates + unit, d.dtype);
      u.saved_state = at(args.saved, args.steps.rows * gates + (clock.row + i) * d.H + unit, d.dtype);
    }
    u.m = static_cast<int>(m), u.n = static_cast<int>(std::min<i64>(kernel.units(), d.H - unit)), u.relu = args.relu;
    fn.update(u);
  }

  void run(int thread, int threads) {
    const Range units = share(d.H, kernel.units(), thread, threads);
    const Range columns = d.projected ? share(d.P, p.product->nr, thread, threads) : units;
    prepare(units, columns, share(d.B, 1, thread, threads));
    barrier.wait(threads);
    float* const sums = scratch.sums + thread * (p.sum_bytes / 4);
    Clock clock(d, args.steps, false);
    for (i64 s = 0; s < d.T; ++s, clock.advance()) {
      const Operand &before = h[s & 1], &after = h[~s & 1];
      const i64 m = clock.size();
      if (threads > 1 && !d.projected) own_lines(after, m, units.begin, units.end);
      for (i64 u = units.begin; u < units.end; u += kernel.units())
        for (i64 i = 0; i < m; i += p.row_block)
          run_block(clock, before, after, u, i, std::min(p.row_block, m - i), sums);
      if (d.projected) {
        barrier.wait(threads);
        run_product(*p.product, hidden, m, hidden_steps, panels(scratch.r, columns.begin, hidden_steps), columns.size(),
                    state, columns.begin, false);
        void* y = row_of(args.y, args.steps, clock.t, clock.row, d.dtype);
        for (i64 i = 0; i < m && columns.size() > 0; ++i) {
          void* to = at(y, i * args.y.row + columns.begin, d.dtype);
          fn.narrow(state.at(i, columns.begin), columns.size(), to);
          fn.enter(to, columns.size(), after.at(i, columns.begin));
        }
      }
      finish_rows(clock.next_size(), m, after, units, columns);
      barrier.wait(threads);
    }
    if (d.T == 0) finish_rows(0, d.B, h[0], units, columns);
  }

  // The last states of rows that end here.
  void finish_rows(i64 begin, i64 end, const Operand& last, const Range& units, const Range& columns) {
    for (i64 i = begin; i < end; ++i) {
      if (args.h_n)
        fn.leave(last.at(i, columns.begin), columns.size(), at(args.h_n, i * args.h_n_row + columns.begin, d.dtype));
      if (args.c_n)
        fn.narrow(c.at(i, units.begin), units.size(), at(args.c_n, i * args.c_n_row + units.begin, d.dtype));
    }
  }
};

struct Backward {
  const RnnDesc& d;
  const RnnPlan& p;
  const RnnArgs& args;
  const RnnGradients& g;
  const RnnKernel& kernel;
  const RnnFunctions& fn;
  Scratch scratch;
  i64 gates, steps, state_steps;
  Operand d_gates[2], d_h;  // d_h: projected, the whole gradient of h
  States dh, dc, d_hidden;
  Barrier barrier;

  Backward(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& a, const RnnGradients& grads, char* memory)
      : d(desc), p(plan), args(a), g(grads), kernel(*plan.kernel), fn(*kernel.fn), scratch(plan, memory) {
    gates = kernel.gates() * d.H;
    steps = (gates + kernel.k_unit - 1) / kernel.k_unit;
    state_steps = (d.P + kernel.k_unit - 1) / kernel.k_unit;
    const i64 row = rnn_padded(steps);
    d_gates[0] = {scratch.h, row, kernel.k_unit};
    d_gates[1] = {scratch.h + d.B * row, row, kernel.k_unit};
    d_h = {scratch.hidden, rnn_padded(state_steps), kernel.k_unit};
    d_hidden = {scratch.hidden + d.B * d_h.row, rnn_padded(d.H)};
    dh = {scratch.state, rnn_padded(d.P)};
    dc = {scratch.c, rnn_padded(d.H)};
  }

  Panels panels(const float* packed, i64 column, i64 depth) const {
    return {packed + column * depth, p.product->nr * depth, p.product->nr};
  }
  Panels weights(i64 column) const {
    if (p.direct) return {static_cast<const float*>(args.w) + column, p.product->nr, args.w_row};
    return panels(scratch.w, column, steps);
  }

  static void clear(void* p, i64 floats) { std::memset(p, 0, static_cast<std::size_t>(floats) * sizeof(float)); }

  void prepare(const Range& units, const Range& columns, const Range& rows) {
    if (columns.size() > 0 && !p.direct)
      gemm_pack_b(at(args.w, columns.begin * args.w_col, d.dtype), args.w_row, args.w_col, gates, columns.size(),
                  *p.product, scratch.w + columns.begin * steps);
    if (d.projected && units.size() > 0)
      gemm_pack_b(at(args.r, units.begin * args.r_col, d.dtype), args.r_row, args.r_col, d.P, units.size(), *p.product,
                  scratch.r + units.begin * state_steps);
    for (i64 i = rows.begin; i < rows.end; ++i) {
      for (const Operand& x : d_gates) clear(x.at(i, 0), x.row);
      if (d.projected) clear(d_h.at(i, 0), d_h.row);
      clear(dh.at(i, 0), dh.row);
      if (g.dh_n) fn.widen(at(g.dh_n, i * g.dh_n_row, d.dtype), d.P, dh.at(i, 0));
      if (d.cell != RnnCell::lstm) continue;
      clear(dc.at(i, 0), dc.row);
      if (g.dc_n) fn.widen(at(g.dc_n, i * g.dc_n_row, d.dtype), d.H, dc.at(i, 0));
    }
  }

  // Rows i.. of a step through the cell, for the units owned. before: c or h of the step before, or null.
  void run_cell(const Clock& clock, const Operand& out, const Range& units, i64 i, i64 m, const void* before,
                i64 before_row) {
    if (m == 0 || units.size() == 0) return;
    const i64 u = units.begin, row = clock.row + i;
    RnnGradArgs a = {};
    const States& from = d.projected ? d_hidden : dh;
    a.dh = from.at(i, u), a.dh_row = from.row;
    if (g.dy.data && !d.projected)
      a.dy = at(row_of(g.dy, args.steps, clock.t, clock.row, d.dtype), i * g.dy.row + u, d.dtype);
    a.dy_row = g.dy.row;
    a.dc = dc.at(i, u), a.dc_row = dc.row;
    if (d.cell != RnnCell::plain) {
      a.saved = at(args.saved, row * gates + u, d.dtype);
      a.saved_state = at(args.saved, args.steps.rows * gates + row * d.H + u, d.dtype);
    }
    a.before = before, a.before_row = before_row;
    a.y = at(row_of(args.y, args.steps, clock.t, clock.row, d.dtype), i * args.y.row + u, d.dtype);
    a.y_row = args.y.row;
    a.d_gates = at(g.d_gates, row * gates + u, d.dtype), a.gates_row = gates, a.H = d.H;
    if (g.d_recurrent) a.d_recurrent = at(g.d_recurrent, row * d.H + u, d.dtype);
    a.recurrent = out.at(i, u), a.product_row = out.row * kernel.k_unit;
    if (g.hidden) a.hidden = at(g.hidden, row * d.H + u, d.dtype);
    a.m = static_cast<int>(m), a.n = static_cast<int>(units.size()), a.relu = args.relu;
    fn.grad(a);
  }

  void run(int thread, int threads) {
    const Range columns = share(d.P, p.product->nr, thread, threads);
    const Range units = d.projected ? share(d.H, p.product->nr, thread, threads) : columns;
    prepare(units, columns, share(d.B, 1, thread, threads));
    barrier.wait(threads);
    Clock clock(d, args.steps, true);
    for (i64 s = 0; s < d.T; ++s) {
      const Operand& out = d_gates[s & 1];
      const i64 m = clock.size();
      if (d.projected) {
        for (i64 i = 0; i < m && columns.size() > 0; ++i) {
          const void* dy = nullptr;
          if (g.dy.data)
            dy = at(row_of(g.dy, args.steps, clock.t, clock.row, d.dtype), i * g.dy.row + columns.begin, d.dtype);
          fn.merge(dh.at(i, columns.begin), dy, columns.size(), d_h.at(i, columns.begin),
                   at(g.d_hidden, (clock.row + i) * d.P + columns.begin, d.dtype));
        }
        barrier.wait(threads);
        run_product(*p.product, d_h, m, state_steps, panels(scratch.r, units.begin, state_steps), units.size(),
                    d_hidden, units.begin, false);
      }
      // The step before in time; rows that it has not begin with the initial state.
      Clock before = clock;
      before.advance();
      const i64 shared = s + 1 < d.T ? std::min(m, before.size()) : 0;
      const i64 u = units.begin;
      const bool lstm = d.cell == RnnCell::lstm;
      if (shared > 0) {
        const void* from = lstm ? at(args.saved, args.steps.rows * gates + before.row * d.H + u, d.dtype)
                                : at(row_of(args.y, args.steps, before.t, before.row, d.dtype), u, d.dtype);
        run_cell(clock, out, units, 0, shared, from, lstm ? d.H : args.y.row);
      }
      const void* initial = lstm ? args.c0 : args.h0;
      const i64 initial_row = lstm ? args.c0_row : args.h0_row;
      if (initial) initial = at(initial, shared * initial_row + u, d.dtype);
      run_cell(clock, out, units, shared, m - shared, initial, initial_row);
      barrier.wait(threads);
      if (threads > 1)
        for (i64 g = 0; g < kernel.gates(); ++g)
          own_lines(d_gates[~s & 1], m, g * d.H + units.begin, g * d.H + units.end);
      if (s + 1 < d.T || g.dh0)
        run_product(*p.product, out, m, steps, weights(columns.begin), columns.size(), dh, columns.begin,
                    d.cell == RnnCell::gru);
      clock = before;
    }
    for (i64 i = 0; i < d.B; ++i) {
      if (g.dh0) fn.narrow(dh.at(i, columns.begin), columns.size(), at(g.dh0, i * g.dh0_row + columns.begin, d.dtype));
      if (g.dc0) fn.narrow(dc.at(i, units.begin), units.size(), at(g.dc0, i * g.dc0_row + units.begin, d.dtype));
    }
  }
};

}  // namespace

void rnn_run(const RnnDesc& d, const RnnPlan& p, const RnnArgs& args) {
  if (d.B == 0) return;
  ArenaLease memory(p.workspace_bytes());
  Forward pass(d, p, args, memory.data());
  parallel_together(p.threads, [&](int thread, int threads) { pass.run(thread, threads); });
}

void rnn_run_backward(const RnnDesc& d, const RnnPlan& p, const RnnArgs& args, const RnnGradients& grads) {
  if (d.B == 0) return;
  ArenaLease memory(p.workspace_bytes());
  Backward pass(d, p, args, grads, memory.data());
  parallel_together(p.threads, [&](int thread, int threads) { pass.run(thread, threads); });
}

}  // namespace fastdl
