// _cuda, _twin: recurrent layers, forward and backward. The calls are those of _C, with a workspace of `rnn_plan`'s
// size.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "base/check.h"
#include "base/log.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "bind/gemm_problem.h"
#include "bind/rnn_call.h"
#include "rnn/cuda/layout.h"
#include "rnn/cuda/plan.h"

namespace py = pybind11;

namespace fastdl {
namespace {

// A GPU as if it had fewer multiprocessors; 0: all.
Gpu limited(Gpu gpu, int multiprocessors, const char* op) {
  if (multiprocessors < 0 || multiprocessors > gpu.multiprocessors)
    fail(op, ": argument 'multiprocessors': expected 0 to ", gpu.multiprocessors, ", got ", multiprocessors);
  if (multiprocessors > 0) gpu.multiprocessors = multiprocessors;
  return gpu;
}

class Call : public RnnCall {
 public:
  using RnnCall::RnnCall;

  void run(py::handle workspace, const std::string& precision, const std::string& kernel, int multiprocessors) {
    check_outputs(nullptr);
    desc.precision = precision_named(precision, op_);
    const CudaRnnPlan plan = cuda_rnn_plan(desc, limited(gpu_info(device_), multiprocessors, op_),
                                           forced_row(cuda_rnn_kernels(), kernel, op_));
    void* const memory = workspace_memory(workspace, plan.workspace_bytes(), &device_, op_);
    const Stream stream = current_stream(device_, op_);
    if (log_enabled()) log_once(describe(desc, plan));
    py::gil_scoped_release release;
    cuda_rnn_run(desc, plan, args, desc.backward ? &grads : nullptr, memory, stream);
  }

  void states_before() {
    check_outputs(nullptr);
    const Stream stream = current_stream(device_, op_);
    py::gil_scoped_release release;
    cuda_rnn_states_before(args.steps, desc.T, desc.P, args.y, args.h0, args.h0_row, grads.d_gates, desc.dtype, stream);
  }

 private:
  TensorView look(py::handle object, const char* name) override { return device_view(object, &device_, op_, name); }

  int device_ = -1;
};

void run_forward(py::handle y, py::handle h_n, py::handle c_n, py::handle saved, py::handle x_gates, py::handle h0,
                 py::handle c0, py::handle w_hh, py::handle b_hh, py::handle w_hr, py::handle workspace,
                 const std::string& mode, py::handle batch_sizes, bool reverse, const std::string& precision,
                 const std::string& kernel, int multiprocessors) {
  Call c("fastdl.rnn", mode);
  c.forward_arguments(y, h_n, c_n, saved, x_gates, h0, c0, w_hh, b_hh, w_hr, batch_sizes, reverse);
  c.run(workspace, precision, kernel, multiprocessors);
}

void run_backward(py::handle d_gates, py::handle dh0, py::handle dc0, py::handle dy, py::handle dh_n, py::handle dc_n,
                  py::handle saved, py::handle y, py::handle h0, py::handle c0, py::handle w_hh, py::handle b_hh,
                  py::handle w_hr, py::handle workspace, const std::string& mode, py::handle batch_sizes, bool reverse,
                  py::handle d_recurrent, py::handle d_hidden, py::handle hidden, const std::string& precision,
                  const std::string& kernel, int multiprocessors) {
  Call c("fastdl.rnn_backward", mode);
  c.backward_arguments(d_gates, dh0, dc0, dy, dh_n, dc_n, saved, y, h0, c0, w_hh, b_hh, w_hr, batch_sizes, reverse,
                       d_recurrent, d_hidden, hidden);
  c.run(workspace, precision, kernel, multiprocessors);
}

void states_before(py::handle out, py::handle y, py::handle h0, py::handle batch_sizes, bool reverse) {
  Call c("fastdl.rnn_states_before", "rnn_tanh");
  if (batch_sizes.is_none())
    throw TypeMismatch("fastdl.rnn_states_before: argument 'batch_sizes': expected a torch.Tensor, got None");
  c.packed_arguments(out, y, h0, batch_sizes, reverse);
  c.states_before();
}

py::tuple saved_shape(const std::string& mode, i64 rows, i64, i64 H, i64) {
  return py::make_tuple(rows, rnn_saved_width(rnn_mode(mode, "fastdl.rnn_saved_shape").cell, H));
}

py::dict plan_shape(i64 T, i64 B, i64 H, i64 P, const std::string& mode, bool backward, const std::string& dtype,
                    const std::string& precision, const std::string& gpu, int device, const std::string& kernel,
                    int multiprocessors) {
  const char* op = "fastdl.rnn_plan";
  if (T < 0 || B < 0 || H < 1 || P < 0)
    fail(op, ": expected T and B of at least 0 and H of at least 1, got T=", T, " B=", B, " H=", H, " P=", P);
  RnnDesc d = {};
  d.cell = rnn_mode(mode, op).cell;
  d.T = T, d.B = B, d.H = H, d.P = P ? P : H, d.projected = P != 0, d.backward = backward;
  if (d.projected && d.cell != RnnCell::lstm)
    fail(op, ": argument 'P': expected 0, projections belong to lstm, got ", P);
  d.dtype = dtype_named(dtype, op);
  d.precision = precision_named(precision, op);
  const Gpu on = limited(gpu.empty() ? gpu_info(device) : gpu_named(gpu), multiprocessors, op);
  const CudaRnnPlan p = cuda_rnn_plan(d, on, forced_row(cuda_rnn_kernels(), kernel, op));
  py::dict out;
  out["op"] = "rnn";
  out["kernel"] = p.kernel->name;
  out["resident"] = p.kernel->resident;
  out["unit_blocks"] = p.unit_blocks;
  out["batch_blocks"] = p.batch_blocks;
  out["tile_rows"] = p.tile_rows;
  out["shared_bytes"] = p.shared_bytes;
  out["workspace_bytes"] = p.workspace_bytes();
  out["why"] = p.why;
  out["text"] = describe(d, p);
  out["candidates"] = cuda_rnn_candidates(d, on, p);
  return out;
}

py::list kernel_rows() {
  constexpr const char* kCells[] = {"lstm", "gru", "rnn"};
  py::list out;
  for (const CudaRnnKernel& k : cuda_rnn_kernels()) {
    const int gates = kGates[static_cast<int>(k.cell)];
    py::dict row;
    row["name"] = k.name;
    row["isa"] = "sm80";
    row["dtype"] = torch_name(k.dtype);
    row["precision"] = precision_name(k.precision);
    row["kind"] = kCells[static_cast<int>(k.cell)];
    row["parts"] = k.parts;
    row["resident"] = k.resident;
    row["units"] = rnn_units(gates);
    row["rows"] = kRnnRows;
    row["k_block"] = kRnnBlockK;
    out.append(row);
  }
  return out;
}

}  // namespace

void bind_cuda_rnn(py::module_& m) {
  using namespace py::literals;
  add_kernel_rows("rnn", kernel_rows);
  m.def("rnn", run_forward, "y"_a, "h_n"_a, "c_n"_a, "saved"_a, "x_gates"_a, "h0"_a, "c0"_a, "w_hh"_a, "b_hh"_a,
        "w_hr"_a, "workspace"_a, py::kw_only(), "mode"_a, "batch_sizes"_a = py::none(), "reverse"_a = false,
        "precision"_a = "ieee", "kernel"_a = "", "multiprocessors"_a = 0);
  m.def("rnn_backward", run_backward, "d_gates"_a, "dh0"_a, "dc0"_a, "dy"_a, "dh_n"_a, "dc_n"_a, "saved"_a, "y"_a,
        "h0"_a, "c0"_a, "w_hh"_a, "b_hh"_a, "w_hr"_a, "workspace"_a, py::kw_only(), "mode"_a,
        "batch_sizes"_a = py::none(), "reverse"_a = false, "d_recurrent"_a = py::none(), "d_hidden"_a = py::none(),
        "hidden"_a = py::none(), "precision"_a = "ieee", "kernel"_a = "", "multiprocessors"_a = 0);
  m.def("rnn_states_before", states_before, "out"_a, "y"_a, "h0"_a, "batch_sizes"_a, "reverse"_a = false);
  m.def("rnn_saved_shape", saved_shape, "mode"_a, "rows"_a, "B"_a, "H"_a, "P"_a);
  m.def("rnn_plan", plan_shape, "T"_a, "B"_a, "H"_a, "P"_a = 0, py::kw_only(), "mode"_a = "lstm", "backward"_a = false,
        "dtype"_a = "float32", "precision"_a = "ieee", "gpu"_a = "", "device"_a = 0, "kernel"_a = "",
        "multiprocessors"_a = 0);
}

}  // namespace fastdl
