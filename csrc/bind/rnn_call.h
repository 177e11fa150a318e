// The arguments of a recurrent layer as Python gives them, checked: the same for every device.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "base/check.h"
#include "bind/tensor.h"
#include "rnn/rnn.h"

namespace fastdl {

struct RnnMode {
  const char* name;
  RnnCell cell;
  bool relu;
};
constexpr RnnMode kRnnModes[] = {{"lstm", RnnCell::lstm, false},
                                 {"gru", RnnCell::gru, false},
                                 {"rnn_tanh", RnnCell::plain, false},
                                 {"rnn_relu", RnnCell::plain, true}};

inline const RnnMode& rnn_mode(const std::string& name, const char* op) {
  for (const RnnMode& m : kRnnModes)
    if (name == m.name) return m;
  fail(op, ": argument 'mode': expected lstm, gru, rnn_tanh or rnn_relu, got '", name, "'");
}

// Arguments as they come, each checked against the sizes that x_gates and w_hh give; what is written is kept apart
// from everything else.
class RnnCall {
 public:
  RnnDesc desc = {};
  RnnArgs args = {};
  RnnGradients grads = {};

  RnnCall(const char* op, const std::string& mode) : op_(op) {
    const RnnMode& m = rnn_mode(mode, op);
    desc.cell = m.cell;
    args.relu = m.relu;
    mode_ = m.name;
  }
  virtual ~RnnCall() = default;

  // x_gates or d_gates: [T, B, G*H], or packed [rows, G*H].
  void* gates(pybind11::handle object, const char* name, pybind11::handle batch_sizes, bool reverse, bool output) {
    const TensorView t = add(object, name, output);
    desc.dtype = t.dtype;
    const int rank = batch_sizes.is_none() ? 3 : 2;
    if (t.ndim != rank) wrong(t, name, rank == 3 ? "[T, B, gates*H]" : "[rows, gates*H], packed");
    const i64 count = kGates[static_cast<int>(desc.cell)];
    desc.H = t.size(-1) / count;
    if (t.size(-1) % count != 0 || desc.H < 1) wrong(t, name, concat("a last dimension of gates*H, ", count, " gates"));
    require_contiguous(t, name);
    args.steps.reverse = reverse;
    if (rank == 3) {
      desc.T = t.size(0), desc.B = t.size(1);
      args.steps.rows = desc.T * desc.B;
      return t.data;
    }
    sizes_ = batch_size_list(batch_sizes);
    desc.T = static_cast<i64>(sizes_.size());
    desc.B = desc.T ? sizes_[0] : 0;
    args.steps.rows = 0;
    for (i64 i = 0; i < desc.T; ++i) {
      const i64 n = sizes_[static_cast<std::size_t>(i)];
      if (n < 1 || (i && n > sizes_[static_cast<std::size_t>(i - 1)]))
        fail(op_, ": argument 'batch_sizes': expected positive sizes that do not rise, got ", n, " at step ", i);
      i64& rows = args.steps.rows;  // -1: more than there are
      rows = rows < 0 || n > t.size(0) - rows ? -1 : rows + n;
    }
    if (args.steps.rows != t.size(0))
      fail(op_, ": argument 'batch_sizes': expected sizes that sum to the ", t.size(0), " rows of ", name, ", got ",
           args.steps.rows < 0 ? std::string("more") : concat("a sum of ", args.steps.rows));
    args.steps.batch_sizes = sizes_.data();
    return t.data;
  }

  void weights(pybind11::handle w_hh, pybind11::handle b_hh, pybind11::handle w_hr) {
    const i64 rows = gate_columns();
    const TensorView w = add(w_hh, "w_hh");
    if (w.ndim != 2 || w.size(0) != rows || w.size(1) < 1)
      wrong(w, "w_hh", concat("[", rows, ", hidden or projected size]"));
    desc.P = w.size(1);
    desc.projected = !w_hr.is_none();
    desc.w_rows = w.stride(1) == 1 || w.size(1) == 1;
    args.w = w.data, args.w_row = w.stride(0), args.w_col = w.stride(1);
    if (desc.projected) {
      if (desc.cell != RnnCell::lstm)
        fail(op_, ": argument 'w_hr': expected None, projections belong to lstm, got one for ", mode_);
      const TensorView r = add(w_hr, "w_hr");
      if (r.ndim != 2 || r.size(0) != desc.P || r.size(1) != desc.H)
        wrong(r, "w_hr", concat("[", desc.P, ", ", desc.H, "]"));
      args.r = r.data, args.r_row = r.stride(0), args.r_col = r.stride(1);
    } else if (desc.P != desc.H) {
      wrong(w, "w_hh", concat("[", rows, ", ", desc.H, "] without w_hr"));
    }
    if (b_hh.is_none()) return;
    const TensorView b = add(b_hh, "b_hh");
    if (b.ndim != 1 || b.size(0) != rows) wrong(b, "b_hh", concat("[", rows, "]"));
    args.bias = b.data, args.bias_step = b.stride(0);
  }

  // [T, B, width] or packed [rows, width], unit stride in the last; data null for None.
  RnnRows rows(pybind11::handle object, const char* name, i64 width, bool output = false) {
    if (object.is_none()) return {nullptr, 0, 0};
    const TensorView t = add(object, name, output);
    const bool packed = args.steps.batch_sizes != nullptr || packed_;
    const bool fits = packed ? t.ndim == 2 && t.size(0) == args.steps.rows && t.size(1) == width
                             : t.ndim == 3 && t.size(0) == desc.T && t.size(1) == desc.B && t.size(2) == width;
    if (!fits)
      wrong(t, name,
            packed ? concat("[", args.steps.rows, ", ", width, "]")
                   : concat("[", desc.T, ", ", desc.B, ", ", width, "]"));
    require_unit(t, name);
    return {t.data, packed ? 0 : t.stride(0), t.stride(-2)};
  }

  // [B, width], unit stride in the last; null for None.
  void* state(pybind11::handle object, const char* name, i64 width, i64* row, bool output = false) {
    *row = 0;
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    if (t.ndim != 2 || t.size(0) != desc.B || t.size(1) != width) wrong(t, name, concat("[", desc.B, ", ", width, "]"));
    require_unit(t, name);
    *row = t.stride(0);
    return t.data;
  }

  // Contiguous [rows, width], or [T, B, width]; null for None.
  void* flat(pybind11::handle object, const char* name, i64 width, bool output = false) {
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    const bool fits =
        t.ndim >= 2 && t.size(-1) == width && (width == 0 || t.numel() == args.steps.rows * width) &&
        (t.ndim == 2 ? t.size(0) == args.steps.rows : t.ndim == 3 && t.size(0) == desc.T && t.size(1) == desc.B);
    if (!fits) wrong(t, name, concat("[", args.steps.rows, ", ", width, "]"));
    require_contiguous(t, name);
    return t.data;
  }

  void require_none(pybind11::handle object, const char* name) {
    if (!object.is_none())
      fail(op_, ": argument '", name, "': expected None for ", mode_, desc.projected ? " with" : " without",
           " projection, got a tensor");
  }
  void require_given(const void* data, const char* name) {
    if (!data && args.steps.rows > 0)
      throw TypeMismatch(concat(op_, ": argument '", name, "': expected a torch.Tensor, got None"));
  }

  i64 gate_columns() const { return kGates[static_cast<int>(desc.cell)] * desc.H; }

  // The arguments of the two native calls.
  void forward_arguments(pybind11::handle y, pybind11::handle h_n, pybind11::handle c_n, pybind11::handle saved,
                         pybind11::handle x_gates, pybind11::handle h0, pybind11::handle c0, pybind11::handle w_hh,
                         pybind11::handle b_hh, pybind11::handle w_hr, pybind11::handle batch_sizes, bool reverse) {
    desc.backward = false;
    args.x = gates(x_gates, "x_gates", batch_sizes, reverse, false);
    weights(w_hh, b_hh, w_hr);
    const bool lstm = desc.cell == RnnCell::lstm;
    args.y = rows(y, "y", desc.P, true);
    require_given(args.y.data, "y");
    args.h0 = state(h0, "h0", desc.P, &args.h0_row);
    args.h_n = state(h_n, "h_n", desc.P, &args.h_n_row, true);
    if (!lstm) require_none(c0, "c0"), require_none(c_n, "c_n");
    args.c0 = state(c0, "c0", desc.H, &args.c0_row);
    args.c_n = state(c_n, "c_n", desc.H, &args.c_n_row, true);
    args.saved = flat(saved, "saved", rnn_saved_width(desc.cell, desc.H), true);
    if (desc.cell == RnnCell::plain) args.saved = nullptr;
  }
  void backward_arguments(pybind11::handle d_gates, pybind11::handle dh0, pybind11::handle dc0, pybind11::handle dy,
                          pybind11::handle dh_n, pybind11::handle dc_n, pybind11::handle saved, pybind11::handle y,
                          pybind11::handle h0, pybind11::handle c0, pybind11::handle w_hh, pybind11::handle b_hh,
                          pybind11::handle w_hr, pybind11::handle batch_sizes, bool reverse,
                          pybind11::handle d_recurrent, pybind11::handle d_hidden, pybind11::handle hidden) {
    desc.backward = true;
    RnnGradients& g = grads;
    g.d_gates = gates(d_gates, "d_gates", batch_sizes, reverse, true);
    weights(w_hh, b_hh, w_hr);
    g.dy = rows(dy, "dy", desc.P);
    args.y = rows(y, "y", desc.P);
    require_given(args.y.data, "y");
    args.h0 = state(h0, "h0", desc.P, &args.h0_row);
    g.dh_n = state(dh_n, "dh_n", desc.P, &g.dh_n_row);
    g.dh0 = state(dh0, "dh0", desc.P, &g.dh0_row, true);
    if (desc.cell != RnnCell::lstm) require_none(c0, "c0"), require_none(dc_n, "dc_n"), require_none(dc0, "dc0");
    args.c0 = state(c0, "c0", desc.H, &args.c0_row);
    g.dc_n = state(dc_n, "dc_n", desc.H, &g.dc_n_row);
    g.dc0 = state(dc0, "dc0", desc.H, &g.dc0_row, true);
    args.saved = flat(saved, "saved", rnn_saved_width(desc.cell, desc.H));
    if (desc.cell != RnnCell::plain) require_given(args.saved, "saved");
    if (desc.cell == RnnCell::gru) {
      require_given(g.d_recurrent = flat(d_recurrent, "d_recurrent", desc.H, true), "d_recurrent");
    } else {
      require_none(d_recurrent, "d_recurrent");
    }
    if (desc.projected) {
      require_given(g.d_hidden = flat(d_hidden, "d_hidden", desc.P, true), "d_hidden");
      require_given(g.hidden = flat(hidden, "hidden", desc.H, true), "hidden");
    } else {
      require_none(d_hidden, "d_hidden"), require_none(hidden, "hidden");
    }
  }

  // Packed y, and the states that its sequences began with.
  void packed_arguments(pybind11::handle out, pybind11::handle y, pybind11::handle h0, pybind11::handle batch_sizes,
                        bool reverse) {
    desc.cell = RnnCell::plain;
    grads.d_gates = gates(out, "out", batch_sizes, reverse, true);
    desc.P = desc.H;
    args.y = rows(y, "y", desc.P);
    require_given(args.y.data, "y");
    args.h0 = state(h0, "h0", desc.P, &args.h0_row);
    require_given(args.h0, "h0");
  }

  // What is to be written: it must lie apart from all else.
  void check_outputs(void (*each)(const TensorView&)) {
    for (const Argument& a : arguments_) {
      if (!a.output) continue;
      require_writable(a.view, op_, a.name);
      if (each) each(a.view);
      for (const Argument& b : arguments_)
        if (&a != &b && !in_place(a, b)) require_apart(a.view, b.view, op_, b.name, a.name);
    }
  }

 protected:
  const char* op_;
  // A tensor where this module's kernels run.
  virtual TensorView look(pybind11::handle object, const char* name) = 0;

 private:
  struct Argument {
    TensorView view;
    const char* name;
    bool output;
  };
  // The gates may be the first part of saved: each element is read before it is replaced.
  static bool in_place(const Argument& a, const Argument& b) {
    const std::string x = a.name, y = b.name;
    return x == "saved" && y == "x_gates" && a.view.data == b.view.data;
  }

  TensorView add(pybind11::handle object, const char* name, bool output = false) {
    const TensorView t = look(object, name);
    if (!arguments_.empty()) require_dtype(t, arguments_[0].view.dtype, "as the gates", op_, name);
    arguments_.push_back({t, name, output});
    return t;
  }
  template <class Text>
  [[noreturn]] void wrong(const TensorView& t, const char* name, const Text& expected) {
    fail(op_, ": argument '", name, "': expected ", expected, ", got ", shape_string(t));
  }
  void require_unit(const TensorView& t, const char* name) {
    if (t.size(-1) > 1 && t.stride(-1) != 1 && t.numel() > 0)
      fail(op_, ": argument '", name, "': expected a unit stride in the last dimension, got ", t.stride(-1));
  }
  void require_contiguous(const TensorView& t, const char* name) {
    i64 expected = 1;
    for (int i = t.ndim - 1; i >= 0; expected *= t.shape[i--])
      if (t.shape[i] > 1 && t.strides[i] != expected && t.numel() > 0)
        fail(op_, ": argument '", name, "': expected a contiguous tensor, got stride ", t.strides[i], " in dimension ",
             i);
  }
  std::vector<i64> batch_size_list(pybind11::handle object) {
    packed_ = true;
    const IndexView v = index_view(object, op_, "batch_sizes");
    std::vector<i64> out(static_cast<std::size_t>(v.size));
    for (i64 i = 0; i < v.size; ++i) out[static_cast<std::size_t>(i)] = v.data[i * v.stride];
    return out;
  }

  const char* mode_;
  bool packed_ = false;
  std::vector<i64> sizes_;
  std::vector<Argument> arguments_;
};

}  // namespace fastdl
