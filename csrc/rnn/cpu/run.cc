// The recurrent schedule. A thread owns blocks of hidden units through the whole sequence: it packs their part of W_hh,
// keeps their c, and writes their h; all of h is read by everyone, so a step ends with a barrier.
#include <algorithm>
#include <cstring>

#include "base/arena.h"
#include "base/parallel.h"
#include "rnn/cpu/product.h"

namespace fastdl {
namespace {

using namespace recurrent;

struct Range {
  i64 begin, end;
  i64 size() const { return end - begin; }
};
// The part of `count` things, `unit` of them to a block, that a thread owns; whole blocks.
Range share(i64 count, i64 unit, int thread, int threads) {
  const i64 blocks = ceil_div(count, unit);
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

struct Scratch {
  float *w, *r, *h, *hidden, *state, *c, *bias, *peaks, *sums;

  Scratch(const RnnPlan& p, char* memory) {
    const auto take = [&](i64 bytes) {
      float* const part = reinterpret_cast<float*>(memory);
      memory += bytes;
      return part;
    };
    w = take(p.w_bytes), r = take(p.r_bytes), h = take(p.h_bytes), hidden = take(p.hidden_bytes);
    state = take(p.state_bytes), c = take(p.c_bytes), bias = take(p.bias_bytes);
    peaks = take(p.peak_bytes), sums = take(0);
  }
};

// What both directions keep.
struct Pass {
  const RnnDesc& d;
  const RnnPlan& p;
  const RnnArgs& args;
  const RnnKernel& kernel;
  const RnnFunctions& fn;
  Scratch scratch;
  i64 gates;
  Barrier barrier;
  float *w_peaks, *r_peaks;  // of packed columns

  Pass(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& a, char* memory)
      : d(desc), p(plan), args(a), kernel(*plan.kernel), fn(*kernel.fn), scratch(plan, memory) {
    gates = kernel.gates() * d.H;
    w_peaks = r_peaks = nullptr;
    if (!p.has_peaks()) return;
    w_peaks = scratch.peaks;
    r_peaks = w_peaks + rnn_packed_columns(d, kernel, *p.product).w;
  }
  // Peaks of the index-th operand that has them.
  float* row_peaks(int index) const {
    if (!p.has_peaks()) return nullptr;
    return r_peaks + rnn_packed_columns(d, kernel, *p.product).r + index * p.threads * d.B;
  }
  float* own(int thread) const { return scratch.sums + thread * ((p.sum_bytes + p.repair_bytes) / 4); }
  Repair repair(int thread) const { return Repair(p, own(thread) + p.sum_bytes / 4, d.B); }

  // Columns begin.. of W (or W_hr) in panels of the product's.
  void pack(const void* w, i64 k_step, i64 j_step, i64 K, const Range& columns, float* out, float* peaks) const {
    if (columns.size() == 0) return;
    if (peaks) std::fill_n(peaks + columns.begin, columns.size(), 0.0f);
    gemm_pack_panels(at(w, columns.begin * j_step, d.dtype), k_step, j_step, K, columns.size(), *p.product,
                     out + columns.begin * kernel.steps(K), peaks ? peaks + columns.begin : nullptr);
  }
  // Row i of an operand before the first step, all zeros but for `columns` that are there. No thread's share but one's.
  void start(const Operand& x, i64 i, i64 columns, int threads) const {
    for (int t = 0; x.peaks && t < threads; ++t) x.peaks[t * d.B + i] = 0;
    if (columns) split(x, i, 1, 0, columns, 1, x.peaks);
  }
  // Columns [begin, begin + n) of each segment, d.H apart, of rows i.. into their parts.
  void split(const Operand& x, i64 i, i64 m, i64 begin, i64 n, int segments, float* peaks) const {
    if (!fn.split) return;
    fn.split({x.data + i * x.row + begin, x.data + i * x.row + x.parts + begin / 2, x.row, x.part, d.H,
              peaks ? peaks + i : nullptr, m, n, segments});
  }
  // What a thread wrote of all rows of a step, for the products of all. An empty share has peaks too.
  void publish(const Operand& x, i64 m, const Range& columns, int segments, int thread) const {
    split(x, 0, m, columns.begin, columns.size(), segments, x.peaks ? x.peaks + thread * d.B : nullptr);
  }
};

struct Forward : Pass {
  Product product;
  i64 steps, hidden_steps;
  Operand h[2], hidden;
  States c, state;
  Weights w, r;

  Forward(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& a, char* memory)
      : Pass(desc, plan, a, memory), product(kernel) {
    steps = kernel.steps(d.P);
    hidden_steps = kernel.steps(d.H);
    h[0] = operand_of(kernel, d.P, scratch.h, row_peaks(0));
    h[1] = operand_of(kernel, d.P, scratch.h + operand_floats(kernel, d.P, d.B), row_peaks(1));
    hidden = operand_of(kernel, d.H, scratch.hidden, row_peaks(2));
    c = {scratch.c, rnn_padded(d.H)};
    state = {scratch.state, rnn_padded(d.P)};
    w = {args.w, args.w_col, args.w_row, d.P, d.H, kernel.gates(), kernel.units()};
    r = {args.r, args.r_col, args.r_row, d.H, d.P};
  }

  Panels panels(const float* packed, i64 column, i64 depth) const {
    return {packed + column * depth, p.product->nr * depth, p.product->nr};
  }
  i64 block_floats() const { return kernel.columns() * steps; }

  void prepare(const Range& units, const Range& columns, const Range& rows, int threads) {
    for (i64 u = units.begin; u < units.end; u += kernel.units()) {
      const i64 block = u / kernel.units();
      float* const peaks = w_peaks ? w_peaks + block * kernel.columns() : nullptr;
      if (peaks) std::fill_n(peaks, kernel.columns(), 0.0f);
      if (!p.direct) fn.pack(args.w, args.w_row, args.w_col, d.H, d.P, u, scratch.w + block * block_floats(), peaks);
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
    if (d.projected) pack(args.r, args.r_col, args.r_row, d.H, columns, scratch.r, r_peaks);
    for (i64 i = rows.begin; i < rows.end; ++i) {
      for (const Operand& x : h) {
        std::memset(x.at(i, 0), 0, static_cast<std::size_t>(x.row) * sizeof(float));
        if (args.h0) fn.enter(at(args.h0, i * args.h0_row, d.dtype), d.P, x.at(i, 0));
        start(x, i, args.h0 ? d.P : 0, threads);
      }
      if (d.projected) {
        std::memset(hidden.at(i, 0), 0, static_cast<std::size_t>(hidden.row) * sizeof(float));
        start(hidden, i, 0, threads);
      }
      if (d.cell != RnnCell::lstm) continue;
      std::memset(c.at(i, 0), 0, static_cast<std::size_t>(c.row) * sizeof(float));
      if (args.c0) fn.widen(at(args.c0, i * args.c0_row, d.dtype), d.H, c.at(i, 0));
    }
  }

  // Gates and the cell of one block of hidden units, m rows from row i of the step on.
  void run_block(const Clock& clock, const Operand& before, const Operand& after, i64 unit, i64 i, i64 m,
                 const Repair& repair, float* sums) {
    if (p.direct) {
      run_dots(before, unit, i, m, sums);
    } else {
      run_panels(before, unit, i, m, repair, sums);
    }
    update(clock, before, after, unit, i, m, sums);
  }

  // sums[m][gates][units] = h W^T of one block, from its panels.
  void run_panels(const Operand& before, i64 unit, i64 i, i64 m, const Repair& repair, float* sums) {
    const i64 block = unit / kernel.units(), columns = kernel.columns();
    for (int panel = 0; panel < kernel.panels; ++panel) {
      const i64 j = i64{panel} * kernel.nr;
      const float* const b = scratch.w + block * block_floats() + panel * steps * kernel.nr;
      run_panel(product, before, i, m, steps, b, kernel.nr, kernel.nr, sums + j, columns, false);
      if (p.repair)
        repair(before, w, w_peaks + block * columns + j, i, m, block * columns + j, kernel.nr, sums + j, columns);
    }
  }

  // The same from W where it lies.
  void run_dots(const Operand& before, i64 unit, i64 i, i64 m, float* sums) {
    const GemmKernel& dot = *p.direct;
    const i64 n = std::min<i64>(kernel.units(), d.H - unit);
    TileArgs t = {};
    t.a_row = before.row * before.unit, t.a_col = 1, t.b_row = 1, t.b_col = args.w_row, t.c_row = kernel.columns();
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
    u.h_row = (d.projected ? hidden : after).row * after.unit;
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
    prepare(units, columns, share(d.B, 1, thread, threads), threads);
    barrier.wait(threads);
    float* const sums = own(thread);
    Repair repair = this->repair(thread);
    Clock clock(d, args.steps, false);
    for (i64 s = 0; s < d.T; ++s, clock.advance()) {
      const Operand &before = h[s & 1], &after = h[~s & 1];
      const i64 m = clock.size();
      if (threads > 1 && !d.projected) own_lines(after, kernel.planes, m, units.begin, units.end);
      repair.gather(before, m, d.B, threads);
      for (i64 u = units.begin; u < units.end; u += kernel.units())
        for (i64 i = 0; i < m; i += p.row_block)
          run_block(clock, before, after, u, i, std::min(p.row_block, m - i), repair, sums);
      publish(d.projected ? hidden : after, m, units, 1, thread);
      if (d.projected) {
        barrier.wait(threads);
        repair.gather(hidden, m, d.B, threads);
        run_product({kernel, *p.product}, hidden, m, hidden_steps, panels(scratch.r, columns.begin, hidden_steps),
                    columns.size(), state, columns.begin, false, repair, r, r_peaks, sums);
        void* y = row_of(args.y, args.steps, clock.t, clock.row, d.dtype);
        for (i64 i = 0; i < m && columns.size() > 0; ++i) {
          void* to = at(y, i * args.y.row + columns.begin, d.dtype);
          fn.narrow(state.at(i, columns.begin), columns.size(), to);
          fn.enter(to, columns.size(), after.at(i, columns.begin));
        }
        publish(after, m, columns, 1, thread);
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

struct Backward : Pass {
  const RnnGradients& g;
  i64 steps, state_steps;
  Operand d_gates[2], d_h;  // d_h: projected, the whole gradient of h
  States dh, dc, d_hidden;
  Weights w, r;

  Backward(const RnnDesc& desc, const RnnPlan& plan, const RnnArgs& a, const RnnGradients& grads, char* memory)
      : Pass(desc, plan, a, memory), g(grads) {
    steps = kernel.steps(gates);
    state_steps = kernel.steps(d.P);
    d_gates[0] = operand_of(kernel, gates, scratch.h, row_peaks(0));
    d_gates[1] = operand_of(kernel, gates, scratch.h + operand_floats(kernel, gates, d.B), row_peaks(1));
    d_h = operand_of(kernel, d.P, scratch.hidden, row_peaks(2));
    d_hidden = {scratch.hidden + operand_floats(kernel, d.P, d.B), rnn_padded(d.H)};
    dh = {scratch.state, rnn_padded(d.P)};
    dc = {scratch.c, rnn_padded(d.H)};
    w = {args.w, args.w_row, args.w_col, gates, d.P};
    r = {args.r, args.r_row, args.r_col, d.P, d.H};
  }

  Panels panels(const float* packed, i64 column, i64 depth) const {
    return {packed + column * depth, p.product->nr * depth, p.product->nr};
  }
  Panels weights(i64 column) const {
    if (p.direct) return {static_cast<const float*>(args.w) + column, p.product->nr, args.w_row};
    return panels(scratch.w, column, steps);
  }

  static void clear(void* p, i64 floats) { std::memset(p, 0, static_cast<std::size_t>(floats) * sizeof(float)); }

  void prepare(const Range& units, const Range& columns, const Range& rows, int threads) {
    if (!p.direct) pack(args.w, args.w_row, args.w_col, gates, columns, scratch.w, w_peaks);
    if (d.projected) pack(args.r, args.r_row, args.r_col, d.P, units, scratch.r, r_peaks);
    for (i64 i = rows.begin; i < rows.end; ++i) {
      for (const Operand& x : d_gates) clear(x.at(i, 0), x.row), start(x, i, 0, threads);
      if (d.projected) clear(d_h.at(i, 0), d_h.row), start(d_h, i, 0, threads);
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
    a.recurrent = out.at(i, u), a.product_row = out.row * out.unit;
    if (g.hidden) a.hidden = at(g.hidden, row * d.H + u, d.dtype);
    a.m = static_cast<int>(m), a.n = static_cast<int>(units.size()), a.relu = args.relu;
    fn.grad(a);
  }

  void run(int thread, int threads) {
    const Range columns = share(d.P, p.product->nr, thread, threads);
    const Range units = d.projected ? share(d.H, p.product->nr, thread, threads) : columns;
    prepare(units, columns, share(d.B, 1, thread, threads), threads);
    barrier.wait(threads);
    const Product product(kernel, *p.product);
    float* const sums = own(thread);
    Repair repair = this->repair(thread);
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
        publish(d_h, m, columns, 1, thread);
        barrier.wait(threads);
        repair.gather(d_h, m, d.B, threads);
        run_product(product, d_h, m, state_steps, panels(scratch.r, units.begin, state_steps), units.size(), d_hidden,
                    units.begin, false, repair, r, r_peaks, sums);
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
      publish(out, m, units, kernel.gates(), thread);
      barrier.wait(threads);
      if (threads > 1)
        for (i64 g = 0; g < kernel.gates(); ++g)
          own_lines(d_gates[~s & 1], kernel.planes, m, g * d.H + units.begin, g * d.H + units.end);
      if (s + 1 < d.T || g.dh0) {
        repair.gather(out, m, d.B, threads);
        run_product(product, out, m, steps, weights(columns.begin), columns.size(), dh, columns.begin,
                    d.cell == RnnCell::gru, repair, w, w_peaks, sums);
      }
      clock = before;
    }
    for (i64 i = 0; i < d.B; ++i) {
      if (g.dh0) fn.narrow(dh.at(i, columns.begin), columns.size(), at(g.dh0, i * g.dh0_row + columns.begin, d.dtype));
      if (g.dc0) fn.narrow(dc.at(i, units.begin), units.size(), at(g.dc0, i * g.dc0_row + units.begin, d.dtype));
    }
  }
};

template <class P>
void run_pass(P& pass) {
  const GemmHelpers& helpers = *pass.p.product->helpers;
  parallel_together(pass.p.threads, [&](int thread, int threads) {
    if (helpers.begin) helpers.begin();
    pass.run(thread, threads);
    if (helpers.end) helpers.end();
  });
}

}  // namespace

void rnn_run(const RnnDesc& d, const RnnPlan& p, const RnnArgs& args) {
  if (d.B == 0) return;
  ArenaLease memory(p.workspace_bytes());
  Forward pass(d, p, args, memory.data());
  run_pass(pass);
}

void rnn_run_backward(const RnnDesc& d, const RnnPlan& p, const RnnArgs& args, const RnnGradients& grads) {
  if (d.B == 0) return;
  ArenaLease memory(p.workspace_bytes());
  Backward pass(d, p, args, grads, memory.data());
  run_pass(pass);
}

}  // namespace fastdl
