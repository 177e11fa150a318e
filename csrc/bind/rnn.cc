// _C: recurrent layers, forward and backward.
#include "rnn/rnn.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

struct Mode {
  const char* name;
  RnnCell cell;
  bool relu;
};
constexpr Mode kModes[] = {{"lstm", RnnCell::lstm, false},
                           {"gru", RnnCell::gru, false},
                           {"rnn_tanh", RnnCell::plain, false},
                           {"rnn_relu", RnnCell::plain, true}};

const Mode& mode_named(const std::string& name, const char* op) {
  for (const Mode& m : kModes)
    if (name == m.name) return m;
  fail(op, ": argument 'mode': expected lstm, gru, rnn_tanh or rnn_relu, got '", name, "'");
}

const RnnKernel* forced_row(const std::string& name, const char* op) {
  if (name.empty()) return nullptr;
  const RnnKernel& k = rnn_kernel(name, op);
  if (k.isa > cpu_info().isa)
    fail(op, ": argument 'kernel': expected a level of at most ", isa_name(cpu_info().isa), ", the one in use, got '",
         name, "'");
  return &k;
}

// Arguments as they come, each checked against the sizes that x_gates and w_hh give; what is written is kept apart
// from everything else.
class Call {
 public:
  RnnDesc desc = {};
  RnnArgs args = {};
  RnnGradients grads = {};
  const RnnKernel* forced;
  int threads;

  Call(const char* op, const std::string& mode, const std::string& kernel, int threads_)
      : forced(forced_row(kernel, op)), threads(threads_), op_(op) {
    require_threads(threads, op);
    const Mode& m = mode_named(mode, op);
    desc.cell = m.cell;
    args.relu = m.relu;
    mode_ = m.name;
  }

  // x_gates or d_gates: [T, B, G*H], or packed [rows, G*H].
  void* gates(py::handle object, const char* name, py::handle batch_sizes, bool reverse, bool output) {
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
      fail(op_, ": argument 'batch_sizes': expected sizes that sum to the ", t.size(0), " rows of ", name);
    args.steps.batch_sizes = sizes_.data();
    return t.data;
  }

  void weights(py::handle w_hh, py::handle b_hh, py::handle w_hr) {
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
  RnnRows rows(py::handle object, const char* name, i64 width, bool output = false) {
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
  void* state(py::handle object, const char* name, i64 width, i64* row, bool output = false) {
    *row = 0;
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    if (t.ndim != 2 || t.size(0) != desc.B || t.size(1) != width) wrong(t, name, concat("[", desc.B, ", ", width, "]"));
    require_unit(t, name);
    *row = t.stride(0);
    return t.data;
  }

  // Contiguous [rows, width], or [T, B, width]; null for None.
  void* flat(py::handle object, const char* name, i64 width, bool output = false) {
    if (object.is_none()) return nullptr;
    const TensorView t = add(object, name, output);
    const bool fits =
        t.ndim >= 2 && t.size(-1) == width && (width == 0 || t.numel() == args.steps.rows * width) &&
        (t.ndim == 2 ? t.size(0) == args.steps.rows : t.ndim == 3 && t.size(0) == desc.T && t.size(1) == desc.B);
    if (!fits) wrong(t, name, concat("[", args.steps.rows, ", ", width, "]"));
    require_contiguous(t, name);
    return t.data;
  }

  void require_none(py::handle object, const char* name) {
    if (!object.is_none())
      fail(op_, ": argument '", name, "': expected None for ", mode_, desc.projected ? " with" : " without",
           " projection, got a tensor");
  }
  void require_given(const void* data, const char* name) {
    if (!data && args.steps.rows > 0)
      throw TypeMismatch(concat(op_, ": argument '", name, "': expected a torch.Tensor, got None"));
  }

  i64 gate_columns() const { return kGates[static_cast<int>(desc.cell)] * desc.H; }

  void run(bool backward) {
    for (const Argument& a : arguments_) {
      if (!a.output) continue;
      require_writable(a.view, op_);
      advise_huge_pages(a.view);
      for (const Argument& b : arguments_)
        if (&a != &b && !in_place(a, b)) require_apart(a.view, b.view, op_, b.name, a.name);
    }
    desc.backward = backward;
    desc.precision = asked_precision(desc.dtype, Switch::rnn);
    py::gil_scoped_release release;
    rnn(desc, args, backward ? &grads : nullptr, forced, threads);
  }

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

  TensorView add(py::handle object, const char* name, bool output = false) {
    const TensorView t = view(object, op_, name);
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
  std::vector<i64> batch_size_list(py::handle object) {
    packed_ = true;
    const IndexView v = index_view(object, op_, "batch_sizes");
    std::vector<i64> out(static_cast<std::size_t>(v.size));
    for (i64 i = 0; i < v.size; ++i) out[static_cast<std::size_t>(i)] = v.data[i * v.stride];
    return out;
  }

  const char* op_;
  const char* mode_;
  bool packed_ = false;
  std::vector<i64> sizes_;
  std::vector<Argument> arguments_;
};

void run_forward(py::handle y, py::handle h_n, py::handle c_n, py::handle saved, py::handle x_gates, py::handle h0,
                 py::handle c0, py::handle w_hh, py::handle b_hh, py::handle w_hr, const std::string& mode,
                 py::handle batch_sizes, bool reverse, const std::string& kernel, int threads) {
  Call c("fastdl.rnn", mode, kernel, threads);
  c.args.x = c.gates(x_gates, "x_gates", batch_sizes, reverse, false);
  c.weights(w_hh, b_hh, w_hr);
  const bool lstm = c.desc.cell == RnnCell::lstm;
  c.args.y = c.rows(y, "y", c.desc.P, true);
  c.require_given(c.args.y.data, "y");
  c.args.h0 = c.state(h0, "h0", c.desc.P, &c.args.h0_row);
  c.args.h_n = c.state(h_n, "h_n", c.desc.P, &c.args.h_n_row, true);
  if (!lstm) c.require_none(c0, "c0"), c.require_none(c_n, "c_n");
  c.args.c0 = c.state(c0, "c0", c.desc.H, &c.args.c0_row);
  c.args.c_n = c.state(c_n, "c_n", c.desc.H, &c.args.c_n_row, true);
  c.args.saved = c.flat(saved, "saved", rnn_saved_width(c.desc.cell, c.desc.H), true);
  if (c.desc.cell == RnnCell::plain) c.args.saved = nullptr;
  c.run(false);
}

void run_backward(py::handle d_gates, py::handle dh0, py::handle dc0, py::handle dy, py::handle dh_n, py::handle dc_n,
                  py::handle saved, py::handle y, py::handle h0, py::handle c0, py::handle w_hh, py::handle b_hh,
                  py::handle w_hr, const std::string& mode, py::handle batch_sizes, bool reverse,
                  py::handle d_recurrent, py::handle d_hidden, py::handle hidden, const std::string& kernel,
                  int threads) {
  Call c("fastdl.rnn_backward", mode, kernel, threads);
  RnnGradients& g = c.grads;
  g.d_gates = c.gates(d_gates, "d_gates", batch_sizes, reverse, true);
  c.weights(w_hh, b_hh, w_hr);
  const RnnDesc& d = c.desc;
  g.dy = c.rows(dy, "dy", d.P);
  c.args.y = c.rows(y, "y", d.P);
  c.require_given(c.args.y.data, "y");
  c.args.h0 = c.state(h0, "h0", d.P, &c.args.h0_row);
  g.dh_n = c.state(dh_n, "dh_n", d.P, &g.dh_n_row);
  g.dh0 = c.state(dh0, "dh0", d.P, &g.dh0_row, true);
  if (d.cell != RnnCell::lstm) c.require_none(c0, "c0"), c.require_none(dc_n, "dc_n"), c.require_none(dc0, "dc0");
  c.args.c0 = c.state(c0, "c0", d.H, &c.args.c0_row);
  g.dc_n = c.state(dc_n, "dc_n", d.H, &g.dc_n_row);
  g.dc0 = c.state(dc0, "dc0", d.H, &g.dc0_row, true);
  c.args.saved = c.flat(saved, "saved", rnn_saved_width(d.cell, d.H));
  if (d.cell != RnnCell::plain) c.require_given(c.args.saved, "saved");
  if (d.cell == RnnCell::gru) {
    c.require_given(g.d_recurrent = c.flat(d_recurrent, "d_recurrent", d.H, true), "d_recurrent");
  } else {
    c.require_none(d_recurrent, "d_recurrent");
  }
  if (d.projected) {
    c.require_given(g.d_hidden = c.flat(d_hidden, "d_hidden", d.P, true), "d_hidden");
    c.require_given(g.hidden = c.flat(hidden, "hidden", d.H, true), "hidden");
  } else {
    c.require_none(d_hidden, "d_hidden"), c.require_none(hidden, "hidden");
  }
  c.run(true);
}

py::tuple saved_shape(const std::string& mode, i64 rows, i64, i64 H, i64) {
  return py::make_tuple(rows, rnn_saved_width(mode_named(mode, "fastdl.rnn_saved_shape").cell, H));
}

py::dict plan_shape(i64 T, i64 B, i64 H, i64 P, const std::string& mode, bool backward, const std::string& isa,
                    int threads, const std::string& kernel, const std::string& dtype, const std::string& precision,
                    i64 l2) {
  const char* op = "fastdl.rnn_plan";
  require_threads(threads, op);
  if (T < 0 || B < 0 || H < 1 || P < 0)
    fail(op, ": expected T and B of at least 0 and H of at least 1, got T=", T, " B=", B, " H=", H, " P=", P);
  RnnDesc d = {};
  d.cell = mode_named(mode, op).cell;
  d.T = T, d.B = B, d.H = H, d.P = P ? P : H, d.projected = P != 0, d.backward = backward;
  if (d.projected && d.cell != RnnCell::lstm)
    fail(op, ": argument 'P': expected 0, projections belong to lstm, got ", P);
  d.dtype = dtype_named(dtype, op);
  d.precision = precision.empty() ? asked_precision(d.dtype, Switch::rnn) : precision_named(precision, op);
  const CpuInfo& cpu = cpu_info();
  Machine machine = {cpu.isa, threads > 0 ? threads : current_team(0).threads, cpu.l1d, l2 > 0 ? l2 : cpu.l2, cpu.l3};
  if (!isa.empty() && !parse_isa(isa, &machine.isa)) fail(op, ": argument 'isa': no level '", isa, "'");
  const RnnPlan p = rnn_plan(d, machine, kernel.empty() ? nullptr : &rnn_kernel(kernel, op));
  py::dict out;
  out["op"] = "rnn";
  out["mode"] = mode;
  out["T"] = T, out["B"] = B, out["H"] = H, out["P"] = d.P;
  out["backward"] = backward;
  out["kernel"] = p.kernel->name;
  out["product"] = p.product->name;
  out["precision"] = precision_name(p.kernel->precision);
  out["repair"] = p.repair ? py::object(py::str(p.repair->name)) : py::object(py::none());
  out["direct"] = p.direct ? py::object(py::str(p.direct->name)) : py::object(py::none());
  out["isa"] = isa_name(p.kernel->isa);
  out["mr"] = p.kernel->mr;
  out["nr"] = p.kernel->nr;
  out["units"] = p.kernel->units();
  out["row_block"] = p.row_block;
  out["threads"] = p.threads;
  out["workspace_bytes"] = p.workspace_bytes();
  out["why"] = p.why;
  out["candidates"] = rnn_candidates(d, machine, p);
  return out;
}

}  // namespace

py::list rnn_kernel_rows() {
  constexpr const char* kCells[] = {"lstm", "gru", "rnn"};
  py::list out;
  for (const RnnKernel& k : rnn_kernels()) {
    py::dict row = kernel_row(k.name, k.isa, k.dtype);
    row["kind"] = kCells[static_cast<int>(k.cell)];
    row["mr"] = k.mr;
    row["nr"] = k.nr;
    row["units"] = k.units();
    row["k_unit"] = k.k_unit;
    row["k_step"] = k.k_step;
    row["planes"] = k.planes;
    row["precision"] = precision_name(k.precision);
    out.append(row);
  }
  return out;
}

void bind_rnn(py::module_& m) {
  using namespace py::literals;
  m.def("rnn", run_forward, "y"_a, "h_n"_a, "c_n"_a, "saved"_a, "x_gates"_a, "h0"_a, "c0"_a, "w_hh"_a, "b_hh"_a,
        "w_hr"_a, py::kw_only(), "mode"_a, "batch_sizes"_a = py::none(), "reverse"_a = false, "kernel"_a = "",
        "threads"_a = 0);
  m.def("rnn_backward", run_backward, "d_gates"_a, "dh0"_a, "dc0"_a, "dy"_a, "dh_n"_a, "dc_n"_a, "saved"_a, "y"_a,
        "h0"_a, "c0"_a, "w_hh"_a, "b_hh"_a, "w_hr"_a, py::kw_only(), "mode"_a, "batch_sizes"_a = py::none(),
        "reverse"_a = false, "d_recurrent"_a = py::none(), "d_hidden"_a = py::none(), "hidden"_a = py::none(),
        "kernel"_a = "", "threads"_a = 0);
  m.def(
      "advise_huge_pages", [](py::handle out) { advise_huge_pages(view(out, "fastdl.advise_huge_pages", "out")); },
      "out"_a);
  m.def("rnn_saved_shape", saved_shape, "mode"_a, "rows"_a, "B"_a, "H"_a, "P"_a);
  m.def("rnn_plan", plan_shape, "T"_a, "B"_a, "H"_a, "P"_a = 0, py::kw_only(), "mode"_a = "lstm", "backward"_a = false,
        "isa"_a = "", "threads"_a = 0, "kernel"_a = "", "dtype"_a = "float32", "precision"_a = "", "l2"_a = 0);
}

}  // namespace fastdl
