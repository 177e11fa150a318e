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
#include "bind/rnn_call.h"

namespace py = pybind11;

namespace fastdl {
namespace {

class Call : public RnnCall {
 public:
  Call(const char* op, const std::string& mode, const std::string& kernel, int threads)
      : RnnCall(op, mode), forced_(usable_row(rnn_kernels(), kernel, op)), threads_(threads) {
    require_threads(threads, op);
  }

  void run() {
    check_outputs(advise_huge_pages);
    desc.precision = asked_precision(desc.dtype, Switch::rnn);
    py::gil_scoped_release release;
    rnn(desc, args, desc.backward ? &grads : nullptr, forced_, threads_);
  }

 private:
  TensorView look(py::handle object, const char* name) override { return view(object, op_, name); }

  const RnnKernel* forced_;
  int threads_;
};

void run_forward(py::handle y, py::handle h_n, py::handle c_n, py::handle saved, py::handle x_gates, py::handle h0,
                 py::handle c0, py::handle w_hh, py::handle b_hh, py::handle w_hr, const std::string& mode,
                 py::handle batch_sizes, bool reverse, const std::string& kernel, int threads) {
  Call c("fastdl.rnn", mode, kernel, threads);
  c.forward_arguments(y, h_n, c_n, saved, x_gates, h0, c0, w_hh, b_hh, w_hr, batch_sizes, reverse);
  c.run();
}

void run_backward(py::handle d_gates, py::handle dh0, py::handle dc0, py::handle dy, py::handle dh_n, py::handle dc_n,
                  py::handle saved, py::handle y, py::handle h0, py::handle c0, py::handle w_hh, py::handle b_hh,
                  py::handle w_hr, const std::string& mode, py::handle batch_sizes, bool reverse,
                  py::handle d_recurrent, py::handle d_hidden, py::handle hidden, const std::string& kernel,
                  int threads) {
  Call c("fastdl.rnn_backward", mode, kernel, threads);
  c.backward_arguments(d_gates, dh0, dc0, dy, dh_n, dc_n, saved, y, h0, c0, w_hh, b_hh, w_hr, batch_sizes, reverse,
                       d_recurrent, d_hidden, hidden);
  c.run();
}

py::tuple saved_shape(const std::string& mode, i64 rows, i64, i64 H, i64) {
  return py::make_tuple(rows, rnn_saved_width(rnn_mode(mode, "fastdl.rnn_saved_shape").cell, H));
}

py::dict plan_shape(i64 T, i64 B, i64 H, i64 P, const std::string& mode, bool backward, const std::string& isa,
                    int threads, const std::string& kernel, const std::string& dtype, const std::string& precision,
                    i64 l2) {
  const char* op = "fastdl.rnn_plan";
  require_threads(threads, op);
  if (T < 0 || B < 0 || H < 1 || P < 0)
    fail(op, ": expected T and B of at least 0 and H of at least 1, got T=", T, " B=", B, " H=", H, " P=", P);
  RnnDesc d = {};
  d.cell = rnn_mode(mode, op).cell;
  d.T = T, d.B = B, d.H = H, d.P = P ? P : H, d.projected = P != 0, d.backward = backward;
  if (d.projected && d.cell != RnnCell::lstm)
    fail(op, ": argument 'P': expected 0, projections belong to lstm, got ", P);
  d.dtype = dtype_named(dtype, op);
  d.precision = precision.empty() ? asked_precision(d.dtype, Switch::rnn) : precision_named(precision, op);
  Machine machine = machine_named(isa, threads, op);
  if (l2 > 0) machine.l2 = l2;
  const RnnPlan p = rnn_plan(d, machine, forced_row(rnn_kernels(), kernel, op));
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
  py::list out;
  for (const RnnKernel& k : rnn_kernels()) {
    py::dict row = kernel_row(k.name, k.isa, k.dtype);
    row["kind"] = rnn_cell_name(k.cell);
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
