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
#include "conv/conv.h"
#include "gemm/gemm.h"
#include "rnn/rnn.h"

namespace py = pybind11;

namespace fastdl {
namespace {

using Strides = std::optional<std::pair<i64, i64>>;

// Output shapes of the plain case, for callers that decide between the kernels and torch: None when any tensor is not
// a CPU tensor with memory of a dtype that has kernels, or when shapes do not fit (the caller's slow path says why).
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

py::tuple tuple_of(const i64* sizes, int count) {
  py::tuple out(count);
  for (int i = 0; i < count; ++i) out[static_cast<std::size_t>(i)] = sizes[i];
  return out;
}

py::object linear_shape_or_none(py::handle input_, py::handle weight, py::handle bias) {
  return shape_or_none([&]() -> py::object {
    const char* op = "fastdl.linear";
    const TensorView input = view(input_, op, "input");
    i64 shape[kMaxBatchDims + 2];
    if (!linear_shape(input, view(weight, op, "weight"), bias, shape)) return py::none();
    return tuple_of(shape, input.ndim);
  });
}

py::object matmul_shape_or_none(py::handle a_, py::handle b_) {
  return shape_or_none([&]() -> py::object {
    const char* op = "fastdl.matmul";
    const TensorView a = view(a_, op, "input"), b = view(b_, op, "other");
    i64 shape[kMaxBatchDims + 2];
    if (!matmul_shape(a, b, shape)) return py::none();
    return tuple_of(shape, std::max(a.ndim, b.ndim));
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
  out["span"] = p.span;
  out["pack_a"] = p.pack_a;
  out["pack_b"] = p.pack_b;
  out["one_panel"] = p.one_panel;
  out["finish_cols"] = p.finish_cols;
  out["strips"] = p.strips;
  out["turned"] = p.turned;
  out["streamed"] = p.streamed;
  out["grid"] = py::make_tuple(p.grid_m, p.grid_n);
  out["threads"] = p.threads;
  out["workspace_bytes"] = p.workspace_bytes();
  out["why"] = p.why;
  out["candidates"] = gemm_candidates(d, machine, p);
  return out;
}

py::dict plan_problem(GemmProblem p, const std::string& kernel, int threads, const char* op, bool frozen = false) {
  require_threads(threads, op);
  p.desc.precision = asked_precision(p.desc.dtype);
  const Machine machine = this_machine(threads);
  p.args.pack = frozen ? p.args.b : nullptr;
  gemm_canonicalise(&p.desc, &p.args);
  if (p.args.pack && gemm_pack_pays(p.desc, machine))
    gemm_use_pack(&p.desc, &p.args, gemm_pack_kernel(machine.isa, p.desc.dtype, p.desc.precision));
  return plan_dict(p.desc, machine, gemm_plan(p.desc, machine, usable_row(gemm_kernels(), kernel, op)));
}

py::dict plan_linear(py::handle out, py::handle input, py::handle weight, bool packed, const std::string& kernel,
                     int threads) {
  const char* op = "fastdl.linear_plan";
  GemmProblem p = weight_problem(view(out, op, "out"), view(input, op, "input"), view(weight, op, "weight"), op);
  return plan_problem(p, kernel, threads, op, packed);
}

py::dict plan_matmul(py::handle out, py::handle a, py::handle b, const std::string& kernel, int threads) {
  const char* op = "fastdl.matmul_plan";
  return plan_problem(matmul_problem(view(out, op, "out"), view(a, op, "a"), view(b, op, "b"), op), kernel, threads,
                      op);
}

py::dict plan_shape(i64 M, i64 N, i64 K, i64 batch, Strides a, Strides b, bool packed, const std::string& isa,
                    int threads, i64 l1d, i64 l2, i64 l3, const std::string& kernel, const std::string& dtype,
                    const std::string& precision) {
  const char* op = "fastdl.gemm_plan";
  require_threads(threads, op);
  if (M < 0 || N < 0 || K < 0 || batch < 0)
    fail(op, ": expected sizes of at least 0, got M=", M, " N=", N, " K=", K, " batch=", batch);
  GemmDesc d = {};
  d.M = M, d.N = N, d.K = K, d.batch = batch, d.pairs = 1;
  d.dtype = dtype_named(dtype, op);
  d.precision = precision_named(precision, op);
  std::tie(d.a_row, d.a_col) = a.value_or(std::pair<i64, i64>(K, 1));
  std::tie(d.b_row, d.b_col) = b.value_or(std::pair<i64, i64>(N, 1));
  d.packed = packed;
  Machine machine = machine_named(isa, threads, op);
  if (l1d > 0) machine.l1d = l1d;
  if (l2 > 0) machine.l2 = l2;
  if (l3 > 0) machine.l3 = l3;
  return plan_dict(d, machine, gemm_plan(d, machine, forced_row(gemm_kernels(), kernel, op)));
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

template <class Row>
void add_counts(const CallCounts<Row>& counts, py::dict& out) {
  for (const Row& row : counts.table()) out[row.name] = counts.of(row);
}

py::list kernel_rows(const std::string& op) {
  py::list out;
  if (op == "gemm") {
    for (const GemmKernel& k : gemm_kernels()) {
      py::dict row = tiled_row(k, k.kind == GemmKind::kTile ? "tile" : "dot");
      row["precision"] = precision_name(k.precision);
      row["k_unit"] = k.k_unit;
      row["k_step"] = k.k_step;
      row["planes"] = k.planes;
      out.append(row);
    }
  } else if (op == "attention") {
    for (const AttentionKernel& k : attention_kernels()) {
      py::dict row = tiled_row(k, kind_name(k.kind));
      row["precision"] = precision_name(k.precision);
      row["k_unit"] = k.k_unit;
      row["k_step"] = k.k_step;
      row["planes"] = k.planes;
      row["key_block"] = k.key_block;
      out.append(row);
    }
  } else if (op == "rnn") {
    return rnn_kernel_rows();
  } else if (op == "conv") {
    return conv_kernel_rows();
  } else {
    fail("fastdl.kernels: argument 'op': expected 'gemm', 'attention', 'rnn' or 'conv', got '", op, "'");
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
    add_counts(gemm_calls(), out);
    add_counts(attention_calls(), out);
    add_counts(rnn_calls(), out);
    add_counts(conv_calls(), out);
    return out;
  });
  m.def("reset_counters", [] {
    gemm_calls().reset();
    attention_calls().reset();
    rnn_calls().reset();
    conv_calls().reset();
  });
  m.def("recomputed", [] { return gemm_repaired() + attention_recomputed(); });
  m.def("gemm_plan", plan_shape, "M"_a, "N"_a, "K"_a, py::kw_only(), "batch"_a = 1, "a_strides"_a = py::none(),
        "b_strides"_a = py::none(), "packed"_a = false, "isa"_a = "", "threads"_a = 0, "l1d"_a = 0, "l2"_a = 0,
        "l3"_a = 0, "kernel"_a = "", "dtype"_a = "float32", "precision"_a = "ieee");
  m.def("linear_plan", plan_linear, "out"_a, "input"_a, "weight"_a, "packed"_a = false, "kernel"_a = "",
        "threads"_a = 0);
  m.def("matmul_plan", plan_matmul, "out"_a, "a"_a, "b"_a, "kernel"_a = "", "threads"_a = 0);
  m.def("linear_shape", linear_shape_or_none, "input"_a, "weight"_a, "bias"_a = py::none());
  m.def("matmul_shape", matmul_shape_or_none, "a"_a, "b"_a);
  m.def(
      "pack_kernel",
      [](const std::string& name) {
        const DType dtype = dtype_named(name, "fastdl.pack_kernel");
        return gemm_pack_kernel(cpu_info().isa, dtype, asked_precision(dtype)).name;
      },
      "dtype"_a = "float32");
  m.def(
      "pack_numel",
      [](i64 K, i64 N, const std::string& k) {
        return gemm_pack_size(K, N, row_named(gemm_kernels(), k, "fastdl.pack_numel"));
      },
      "K"_a, "N"_a, "kernel"_a);
}

}  // namespace fastdl
