// _C: what GEMM would do: the kernel table, plans, output shapes.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "attention/attention.h"
#include "base/check.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"
#include "gemm/gemm.h"
#include "rnn/rnn.h"

namespace py = pybind11;

namespace fastdl {
namespace {

using Strides = std::optional<std::pair<i64, i64>>;

// Output shapes of the plain case, for callers that decide between the kernels and torch: None when any tensor is not
// a float32 CPU tensor with memory, or when shapes do not fit (the caller's slow path says why).
template <class Shape>
py::object shape_or_none(const Shape& shape) {
  try {
    return shape();
  } catch (const Error&) {
    return py::none();
  } catch (const TypeMismatch&) {
    return py::none();
  }
}

py::object linear_shape(py::handle input_, py::handle weight_, py::handle bias_) {
  return shape_or_none([&]() -> py::object {
    const char* op = "fastdl.linear";
    const TensorView input = view(input_, op, "input"), w = view(weight_, op, "weight");
    bool fits = w.ndim == 2 && input.ndim >= 1 && input.ndim <= kMaxBatchDims + 1 && input.size(-1) == w.size(1) &&
                input.dtype == w.dtype;
    if (fits && !bias_.is_none()) {
      const TensorView bias = view(bias_, op, "bias");
      fits = bias.ndim == 1 && bias.size(0) == w.size(0) && bias.dtype == w.dtype;
    }
    if (!fits) return py::none();
    py::tuple out(input.ndim);
    for (int i = 0; i + 1 < input.ndim; ++i) out[static_cast<std::size_t>(i)] = input.shape[i];
    out[static_cast<std::size_t>(input.ndim - 1)] = w.size(0);
    return out;
  });
}

py::object matmul_shape(py::handle a_, py::handle b_) {
  return shape_or_none([&]() -> py::object {
    const char* op = "fastdl.matmul";
    const TensorView a = view(a_, op, "input"), b = view(b_, op, "other");
    const int ndim = std::max(a.ndim, b.ndim);
    if (a.ndim < 2 || b.ndim < 2 || ndim > kMaxBatchDims + 2 || a.size(-1) != b.size(-2) || a.dtype != b.dtype)
      return py::none();
    py::tuple out(ndim);
    out[static_cast<std::size_t>(ndim - 2)] = a.size(-2);
    out[static_cast<std::size_t>(ndim - 1)] = b.size(-1);
    for (int i = 3; i <= ndim; ++i) {
      const i64 na = i <= a.ndim ? a.size(-i) : 1, nb = i <= b.ndim ? b.size(-i) : 1;
      if (na != nb && na != 1 && nb != 1) return py::none();
      out[static_cast<std::size_t>(ndim - i)] = na == 1 ? nb : na;
    }
    return out;
  });
}

py::dict plan_dict(const GemmDesc& d, const Machine& machine, const GemmPlan& p) {
  py::dict out;
  out["op"] = "gemm";
  out["M"] = d.M;
  out["N"] = d.N;
  out["K"] = d.K;
  out["batch"] = d.batch;
  out["kernel"] = p.kernel->name;
  out["isa"] = isa_name(p.kernel->isa);
  out["mr"] = p.tile_m;
  out["nr"] = p.kernel->nr;
  out["mc"] = p.mc;
  out["nc"] = p.nc;
  out["kc"] = p.kc;
  out["pack_a"] = p.pack_a;
  out["pack_b"] = p.pack_b;
  out["grid"] = py::make_tuple(p.grid_m, p.grid_n);
  out["threads"] = p.threads;
  out["workspace_bytes"] = p.workspace_bytes();
  out["why"] = p.why;
  out["candidates"] = gemm_candidates(d, machine, p);
  return out;
}

Machine this_machine(int threads) {
  const CpuInfo& cpu = cpu_info();
  return {cpu.isa, current_team(threads).threads, cpu.l1d, cpu.l2, cpu.l3};
}

py::dict plan_problem(GemmProblem p, const std::string& kernel, int threads, const char* op) {
  require_threads(threads, op);
  gemm_canonicalise(&p.desc, &p.args);
  const Machine machine = this_machine(threads);
  return plan_dict(p.desc, machine, gemm_plan(p.desc, machine, forced_kernel(kernel, op)));
}

py::dict plan_linear(py::handle out, py::handle input, py::handle weight, bool packed, const std::string& kernel,
                     int threads) {
  const char* op = "fastdl.linear_plan";
  GemmProblem p = weight_problem(out, input, weight, op);
  if (packed) p.desc.packed = true, p.desc.b_row = pack_kernel(kernel, p.desc.dtype, op).nr, p.desc.b_col = 1;
  return plan_problem(p, kernel, threads, op);
}

py::dict plan_matmul(py::handle out, py::handle a, py::handle b, const std::string& kernel, int threads) {
  const char* op = "fastdl.matmul_plan";
  return plan_problem(matmul_problem(out, a, b, op), kernel, threads, op);
}

py::dict plan_shape(i64 M, i64 N, i64 K, i64 batch, Strides a, Strides b, bool packed, const std::string& isa,
                    int threads, i64 l1d, i64 l2, i64 l3, const std::string& kernel, const std::string& dtype) {
  const char* op = "fastdl.gemm_plan";
  require_threads(threads, op);
  if (M < 0 || N < 0 || K < 0 || batch < 0)
    fail(op, ": expected sizes of at least 0, got M=", M, " N=", N, " K=", K, " batch=", batch);
  GemmDesc d = {};
  d.M = M, d.N = N, d.K = K, d.batch = batch, d.pairs = 1;
  d.dtype = dtype_named(dtype, op);
  std::tie(d.a_row, d.a_col) = a.value_or(std::pair<i64, i64>(K, 1));
  std::tie(d.b_row, d.b_col) = b.value_or(std::pair<i64, i64>(N, 1));
  d.packed = packed;
  Machine machine = this_machine(threads);
  if (threads > 0) machine.threads = threads;
  if (!isa.empty() && !parse_isa(isa, &machine.isa)) fail(op, ": argument 'isa': no level '", isa, "'");
  if (l1d > 0) machine.l1d = l1d;
  if (l2 > 0) machine.l2 = l2;
  if (l3 > 0) machine.l3 = l3;
  return plan_dict(d, machine, gemm_plan(d, machine, kernel.empty() ? nullptr : &gemm_kernel(kernel, op)));
}

// What every table says of a row.
template <class Kernel>
py::dict tiled_row(const Kernel& k, const char* kind) {
  py::dict row = kernel_row(k.name, k.isa, k.dtype);
  row["kind"] = kind;
  row["mr"] = k.mr;
  row["nr"] = k.nr;
  return row;
}

py::list kernel_rows(const std::string& op) {
  py::list out;
  if (op == "gemm") {
    for (const GemmKernel& k : gemm_kernels()) out.append(tiled_row(k, k.kind == GemmKind::kTile ? "tile" : "dot"));
  } else if (op == "attention") {
    for (const AttentionKernel& k : attention_kernels()) {
      py::dict row = tiled_row(k, kind_name(k.kind));
      row["key_block"] = k.key_block;
      out.append(row);
    }
  } else if (op == "rnn") {
    return rnn_kernel_rows();
  } else {
    fail("fastdl.kernels: argument 'op': expected 'gemm', 'attention' or 'rnn', got '", op, "'");
  }
  return out;
}

}  // namespace

py::dict kernel_row(const char* name, Isa isa, DType dtype) {
  const CpuInfo& cpu = cpu_info();
  py::dict row;
  row["name"] = name;
  row["isa"] = isa_name(isa);
  row["dtype"] = torch_name(dtype);
  row["available"] = isa <= cpu.isa;
  row["reason"] = isa <= cpu.isa       ? std::string()
                  : isa_supported(isa) ? concat("FASTDL_ISA=", cpu.cap)
                                       : concat("this machine has no ", isa_name(isa));
  return row;
}

void bind_gemm_info(py::module_& m) {
  using namespace py::literals;
  m.def("kernels", kernel_rows, "op"_a);
  m.def("counters", [] {
    py::dict out;
    for (const GemmKernel& k : gemm_kernels()) out[k.name] = gemm_calls(k);
    for (const AttentionKernel& k : attention_kernels()) out[k.name] = attention_calls(k);
    for (const RnnKernel& k : rnn_kernels()) out[k.name] = rnn_calls(k);
    return out;
  });
  m.def("reset_counters", [] {
    gemm_reset_calls();
    attention_reset_calls();
    rnn_reset_calls();
  });
  m.def("gemm_plan", plan_shape, "M"_a, "N"_a, "K"_a, py::kw_only(), "batch"_a = 1, "a_strides"_a = py::none(),
        "b_strides"_a = py::none(), "packed"_a = false, "isa"_a = "", "threads"_a = 0, "l1d"_a = 0, "l2"_a = 0,
        "l3"_a = 0, "kernel"_a = "", "dtype"_a = "float32");
  m.def("linear_plan", plan_linear, "out"_a, "input"_a, "weight"_a, "packed"_a = false, "kernel"_a = "",
        "threads"_a = 0);
  m.def("matmul_plan", plan_matmul, "out"_a, "a"_a, "b"_a, "kernel"_a = "", "threads"_a = 0);
  m.def("linear_shape", linear_shape, "input"_a, "weight"_a, "bias"_a = py::none());
  m.def("matmul_shape", matmul_shape, "a"_a, "b"_a);
  m.def(
      "pack_kernel",
      [](const std::string& name) {
        return gemm_pack_kernel(cpu_info().isa, dtype_named(name, "fastdl.pack_kernel")).name;
      },
      "dtype"_a = "float32");
  m.def(
      "pack_numel",
      [](i64 K, i64 N, const std::string& k) { return gemm_pack_size(K, N, gemm_kernel(k, "fastdl.pack_numel")); },
      "K"_a, "N"_a, "kernel"_a);
}

}  // namespace fastdl
