// What happens to one hidden unit of one sequence in a step: it takes all sums of its gates and writes the state.
// load() asks for everything that no other thread block writes in this launch, before the product.
#pragma once
#include "rnn/cuda/kernel_math.cuh"
#include "rnn/cuda/kernel_product.cuh"

namespace fastdl {

// A step: m sequences, `before` of them in the step computed before, `after` in the next; `row` rows before its own.
struct RnnStep {
  int m, before, after, parity;
  i64 t, row, t_after, row_after;
};

FASTDL_DEVICE i64 row_at(const RnnCudaArgs& args, const RnnCudaRows& rows, i64 t, i64 row, i64 b) {
  return args.packed ? (row + b) * rows.row : t * rows.step + b * rows.row;
}
template <class T>
FASTDL_DEVICE float load_state(const RnnCudaState& s, i64 b, int j) {
  return s.data ? load_float<T>(s.data, b * s.row + j) : 0.0f;
}
template <class T>
FASTDL_DEVICE void store_state(const RnnCudaState& s, i64 b, int j, float value) {
  if (s.data) static_cast<T*>(s.data)[b * s.row + j] = from_float<T>(value);
}
template <class T>
FASTDL_DEVICE float round_to(float x) {
  return to_float(from_float<T>(x));
}

// --- forward ----------------------------------------------------------------------------------------------------
template <class T, class E, int parts, RnnCell cell>
struct ForwardCell {
  static constexpr int kCellGates = kGates[static_cast<int>(cell)], kSlots = rnn_slots(kCellGates);
  static constexpr bool kSkipsFirst = false;
  float x[kCellGates], bias[kCellGates], state;  // c, or h before

  static FASTDL_DEVICE int rows(const RnnStep& step) { return step.m; }
  FASTDL_DEVICE void load(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j) {
    const i64 at = (step.row + b) * kCellGates * a.H + j;
#pragma unroll
    for (int g = 0; g < kCellGates; ++g) {
      x[g] = load_float<T>(a.x, at + static_cast<i64>(g) * a.H);
      bias[g] = a.bias ? load_float<T>(a.bias, (static_cast<i64>(g) * a.H + j) * a.bias_step) : 0.0f;
    }
    if constexpr (cell == RnnCell::lstm) state = b < step.before ? a.c[b * a.H + j] : load_state<T>(a.c0, b, j);
    if constexpr (cell == RnnCell::gru) state = get<T>(a.operand[0], step.parity, b, j);
  }
  FASTDL_DEVICE void finish(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j, const float (&sum)[kCellGates]) {
    const i64 row = step.row + b, at = row * kCellGates * a.H + j;
    const auto save = [&](int g, float v) {
      if (a.saved) static_cast<T*>(a.saved)[at + static_cast<i64>(g) * a.H] = from_float<T>(v);
    };
    const auto save_state = [&](float v) {
      if (a.saved) static_cast<T*>(a.saved)[(a.rows * kCellGates + row) * a.H + j] = from_float<T>(v);
    };
    float s[kCellGates], h;
#pragma unroll
    for (int g = 0; g < kCellGates; ++g) s[g] = sum[g] + bias[g];
    if constexpr (cell == RnnCell::lstm) {
      const float in = logistic(s[0] + x[0]), forget = logistic(s[1] + x[1]), fresh = tanh(s[2] + x[2]),
                  out = logistic(s[3] + x[3]);
      const float c = fma_rn(forget, state, in * fresh);
      a.c[b * a.H + j] = c;
      save(0, in), save(1, forget), save(2, fresh), save(3, out), save_state(c);
      if (b >= step.after) store_state<T>(a.c_n, b, j, c);
      h = out * tanh(c);
    } else if constexpr (cell == RnnCell::gru) {
      const float reset = logistic(s[0] + x[0]), keep = logistic(s[1] + x[1]), fresh = tanh(fma_rn(reset, s[2], x[2]));
      save(0, reset), save(1, keep), save(2, fresh), save_state(s[2]);
      h = fma_rn(keep, state - fresh, fresh);
    } else {
      const float z = s[0] + x[0];
      h = !a.relu ? tanh(z) : z < 0.0f ? 0.0f : z;
    }
    h = round_to<T>(h);
    if (cell == RnnCell::lstm && a.projected) return put<T, E, parts>(a.operand[1], 0, b, j, h);
    static_cast<T*>(a.y.data)[row_at(a, a.y, step.t, step.row, b) + j] = from_float<T>(h);
    if (b >= step.after) store_state<T>(a.h_n, b, j, h);
    put<T, E, parts>(a.operand[0], step.parity ^ 1, b, j, h);
  }
};

// h = (sigmoid(o) tanh(c)) W_hr^T
template <class T, class E, int parts>
struct ForwardProjection {
  static constexpr int kSlots = 2;
  static constexpr bool kSkipsFirst = false;
  static FASTDL_DEVICE int rows(const RnnStep& step) { return step.m; }
  FASTDL_DEVICE void load(const RnnCudaArgs&, const RnnStep&, i64, int) {}
  FASTDL_DEVICE void finish(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j, const float (&sum)[1]) {
    const float h = round_to<T>(sum[0]);
    static_cast<T*>(a.y.data)[row_at(a, a.y, step.t, step.row, b) + j] = from_float<T>(h);
    if (b >= step.after) store_state<T>(a.h_n, b, j, h);
    put<T, E, parts>(a.operand[0], step.parity ^ 1, b, j, h);
  }
};

// --- backward: the steps in the reverse order --------------------------------------------------------------------
// d sigma(z)/dz = s (1 - s), d tanh(z)/dz = 1 - t^2
FASTDL_DEVICE float through_sigmoid(float d, float s) { return d * (s * (1.0f - s)); }
FASTDL_DEVICE float through_tanh(float d, float t) { return d * ((1.0f - t) * (1.0f + t)); }

// From the gradient of h (sums + dy; projected: sums) to those of the gates.
template <class T, class E, int parts, bool projected>
struct BackwardCell {
  static constexpr int kSlots = 2;
  static constexpr bool kSkipsFirst = !projected;
  float gate[4], state, previous, dc, dh;

  static FASTDL_DEVICE int rows(const RnnStep& step) {
    return projected || step.m > step.before ? step.m : step.before;
  }
  FASTDL_DEVICE void load(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j) {
    const bool lstm = a.cell == RnnCell::lstm, joined = b >= step.before;
    dh = 0.0f;
    if (b >= step.m) {  // the sequence has ended: what is left is the gradient of h0
      if (a.cell == RnnCell::gru) dh = a.keep[b * a.H + j];
      return;
    }
    const i64 row = step.row + b, gates = static_cast<i64>(a.gates) * a.H;
    if (!projected) {
      if (joined) {
        dh = load_state<T>(a.dh_n, b, j);
      } else if (a.cell == RnnCell::gru) {
        dh = a.keep[b * a.H + j];
      }
      if (a.dy.data) dh += load_float<T>(a.dy.data, row_at(a, a.dy, step.t, step.row, b) + j);
    }
    if (a.cell == RnnCell::plain) {
      state = load_float<T>(a.y.data, row_at(a, a.y, step.t, step.row, b) + j);
      return;
    }
#pragma unroll
    for (int g = 0; g < 4; ++g)
      if (g < a.gates) gate[g] = load_float<T>(a.saved, row * gates + static_cast<i64>(g) * a.H + j);
    const i64 states = a.rows * gates;
    state = load_float<T>(a.saved, states + row * a.H + j);
    if (b >= step.after) {
      previous = load_state<T>(lstm ? a.c0 : a.h0, b, j);
    } else if (lstm) {
      previous = load_float<T>(a.saved, states + (step.row_after + b) * a.H + j);
    } else {
      previous = load_float<T>(a.y.data, row_at(a, a.y, step.t_after, step.row_after, b) + j);
    }
    if (lstm) dc = joined ? load_state<T>(a.dc_n, b, j) : a.c[b * a.H + j];
  }
  FASTDL_DEVICE void finish(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j, const float (&sum)[1]) {
    if (projected || b < step.before) dh += sum[0];
    if (b >= step.m) {
      if (!projected) store_state<T>(a.dh0, b, j, dh);
      return;
    }
    const i64 row = step.row + b, at = row * a.gates * a.H + j;
    const auto gates_at = [&](int g, float d) {
      static_cast<T*>(a.d_gates)[at + static_cast<i64>(g) * a.H] = from_float<T>(d);
    };
    const auto give = [&](int g, float d) {
      gates_at(g, d);
      put<T, E, parts>(a.operand[0], step.parity ^ 1, b, g * a.H + j, round_to<T>(d));
    };
    if (a.cell == RnnCell::lstm) {
      const float t = tanh(state), d = dc + through_tanh(dh * gate[3], t);
      give(0, through_sigmoid(d * gate[2], gate[0]));
      give(1, through_sigmoid(d * previous, gate[1]));
      give(2, through_tanh(d * gate[0], gate[2]));
      give(3, through_sigmoid(dh * t, gate[3]));
      const float next = d * gate[1];
      a.c[b * a.H + j] = next;
      if (b >= step.after) store_state<T>(a.dc0, b, j, next);
      if (a.hidden) static_cast<T*>(a.hidden)[row * a.H + j] = from_float<T>(gate[3] * t);
    } else if (a.cell == RnnCell::gru) {
      const float fresh = through_tanh(dh * (1.0f - gate[1]), gate[2]), recurrent = fresh * gate[0];
      give(0, through_sigmoid(fresh * state, gate[0]));
      give(1, through_sigmoid(dh * (previous - gate[2]), gate[1]));
      gates_at(2, fresh);
      put<T, E, parts>(a.operand[0], step.parity ^ 1, b, 2 * a.H + j, round_to<T>(recurrent));
      static_cast<T*>(a.d_recurrent)[row * a.H + j] = from_float<T>(recurrent);
      a.keep[b * a.H + j] = dh * gate[1];
    } else {
      give(0, !a.relu ? through_tanh(dh, state) : state <= 0.0f ? 0.0f : dh);
    }
  }
};

// With projection, first: the whole gradient of h.
template <class T, class E, int parts>
struct BackwardMerge {
  static constexpr int kSlots = 2;
  static constexpr bool kSkipsFirst = true;
  float dh;

  static FASTDL_DEVICE int rows(const RnnStep& step) { return step.m > step.before ? step.m : step.before; }
  FASTDL_DEVICE void load(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j) {
    dh = 0.0f;
    if (b >= step.m) return;
    if (b >= step.before) dh = load_state<T>(a.dh_n, b, j);
    if (a.dy.data) dh += load_float<T>(a.dy.data, row_at(a, a.dy, step.t, step.row, b) + j);
  }
  FASTDL_DEVICE void finish(const RnnCudaArgs& a, const RnnStep& step, i64 b, int j, const float (&sum)[1]) {
    if (b < step.before) dh += sum[0];
    if (b >= step.m) return store_state<T>(a.dh0, b, j, dh);
    static_cast<T*>(a.d_hidden)[(step.row + b) * a.P + j] = from_float<T>(dh);
    put<T, E, parts>(a.operand[1], 0, b, j, round_to<T>(dh));
  }
};

}  // namespace fastdl
