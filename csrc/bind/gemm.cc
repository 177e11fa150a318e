// _C: GEMM, linear, packs.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "bind/tensor.h"
#include "gemm/gemm.h"

namespace py = pybind11;

namespace fastdl {
namespace {

using Strides = std::optional<std::pair<i64, i64>>;

struct Problem {
  GemmDesc desc;
  GemmArgs args;
};

void require_rank(const TensorView& t, int least, const char* op, const char* argument) {
  if (t.ndim < least)
    fail(op, ": argument '", argument, "': expected at least ", least, " dimension", least > 1 ? "s" : "", ", got shape ",
         shape_string(t));
}

void add_bias(Problem* p, py::handle bias, const TensorView& out, const char* op) {
  if (bias.is_none()) return;
  const TensorView b = view(bias, op, "bias");
  if (b.ndim != 1 || b.size(0) != p->desc.N)
    fail(op, ": argument 'bias': expected shape [", p->desc.N, "], got ", shape_string(b));
  require_apart(out, b, op, "bias");
  p->args.bias = b.data;
  p->args.bias_step = b.stride(0);
}

// Appends a batch dimension; dimensions of one element are left out.
void add_batch(Problem* p, i64 size, i64 a, i64 b, i64 c, const char* op) {
  p->desc.batch *= size;
  if (size == 1) return;
  GemmBatch& batch = p->args.batch;
  if (batch.dims == kMaxBatchDims) fail(op, ": expected at most ", kMaxBatchDims, " batch dimensions, got more");
  const int i = batch.dims++;
  batch.size[i] = size, batch.a[i] = a, batch.b[i] = b, batch.c[i] = c;
}

void set_out(Problem* p, const TensorView& out, const char* op) {
  const i64 N = p->desc.N;
  if (N > 1 && out.numel() > 0 && out.stride(-1) != 1)
    fail(op, ": argument 'out': expected unit stride in the last dimension, got ", out.stride(-1));
  require_writable(out, op);
  p->args.c = out.data;
  p->args.c_row = out.ndim > 1 && p->desc.M > 1 ? out.stride(-2) : N;
}

// out[..., M, N] = a[..., M, K] @ b[..., K, N]
Problem matmul_problem(py::handle out_, py::handle a_, py::handle b_, const char* op) {
  const TensorView out = view(out_, op, "out"), a = view(a_, op, "a"), b = view(b_, op, "b");
  require_rank(out, 2, op, "out");
  require_rank(a, 2, op, "a");
  require_rank(b, 2, op, "b");
  Problem p = {};
  GemmDesc& d = p.desc;
  d.batch = 1;
  d.M = a.size(-2), d.K = a.size(-1), d.N = b.size(-1);
  d.a_row = a.stride(-2), d.a_col = a.stride(-1), d.b_row = b.stride(-2), d.b_col = b.stride(-1);
  if (b.size(-2) != d.K)
    fail(op, ": argument 'b': expected ", d.K, " rows to match the columns of a ", shape_string(a), ", got ",
         shape_string(b));
  if (out.size(-2) != d.M || out.size(-1) != d.N)
    fail(op, ": argument 'out': expected [..., ", d.M, ", ", d.N, "], got ", shape_string(out));
  for (const auto& [t, name] : {std::pair{&a, "a"}, std::pair{&b, "b"}}) {
    if (t->ndim > out.ndim) fail(op, ": argument '", name, "': expected at most ", out.ndim, " dimensions, got ", t->ndim);
    for (int i = 3; i <= t->ndim; ++i)
      if (t->size(-i) != 1 && t->size(-i) != out.size(-i))
        fail(op, ": argument '", name, "': expected batch dimensions that broadcast to out ", shape_string(out), ", got ",
             shape_string(*t));
  }
  const auto step = [](const TensorView& t, int i) { return i <= t.ndim && t.size(-i) > 1 ? t.stride(-i) : 0; };
  for (int i = out.ndim; i >= 3; --i) add_batch(&p, out.size(-i), step(a, i), step(b, i), out.stride(-i), op);
  set_out(&p, out, op);
  require_apart(out, a, op, "a");
  require_apart(out, b, op, "b");
  p.args.a = a.data;
  p.args.b = b.data;
  return p;
}

// out[..., N] = input[..., K] @ B[K, N]; the caller sets B.
Problem linear_problem(const TensorView& out, const TensorView& input, i64 N, const char* op) {
  require_rank(input, 1, op, "input");
  Problem p = {};
  GemmDesc& d = p.desc;
  d.batch = 1;
  d.K = input.size(-1), d.N = N;
  d.M = input.ndim > 1 ? input.size(-2) : 1;
  d.a_col = input.stride(-1);
  d.a_row = input.ndim > 1 ? input.stride(-2) : 1;
  bool fits = out.ndim == input.ndim && out.size(-1) == N;
  for (int i = 2; fits && i <= input.ndim; ++i) fits = out.size(-i) == input.size(-i);
  if (!fits) fail(op, ": argument 'out': expected the shape of input ", shape_string(input), " but ", N, " columns, got ",
                  shape_string(out));
  for (int i = input.ndim; i >= 3; --i) add_batch(&p, input.size(-i), input.stride(-i), 0, out.stride(-i), op);
  set_out(&p, out, op);
  require_apart(out, input, op, "input");
  p.args.a = input.data;
  return p;
}

Problem weight_problem(py::handle out_, py::handle input_, py::handle weight_, const char* op) {
  const TensorView out = view(out_, op, "out"), input = view(input_, op, "input"), w = view(weight_, op, "weight");
  require_rank(input, 1, op, "input");
  if (w.ndim != 2 || w.size(1) != input.size(-1))
    fail(op, ": argument 'weight': expected shape [N, ", input.size(-1), "] to match input ", shape_string(input),
         ", got ", shape_string(w));
  Problem p = linear_problem(out, input, w.size(0), op);
  require_apart(out, w, op, "weight");
  p.args.b = w.data;
  p.desc.b_row = w.stride(1);
  p.desc.b_col = w.stride(0);
  return p;
}

const GemmKernel* forced_kernel(const std::string& name, const char* op) {
  if (name.empty()) return nullptr;
  const GemmKernel& k = gemm_kernel(name, op);
  if (k.isa > cpu_info().isa)
    fail(op, ": argument 'kernel': expected a level of at most ", isa_name(cpu_info().isa), ", the one in use, got '",
         name, "'");
  return &k;
}

const GemmKernel& pack_kernel(const std::string& name, const char* op) {
  return name.empty() ? gemm_pack_kernel(cpu_info().isa) : *forced_kernel(name, op);
}

void require_threads(int threads, const char* op) {
  if (threads < 0) fail(op, ": argument 'threads': expected at least 0, got ", threads);
}

void run(const Problem& p, const std::string& kernel, int threads, const char* op) {
  require_threads(threads, op);
  const GemmKernel* forced = forced_kernel(kernel, op);
  py::gil_scoped_release release;
  gemm(p.desc, p.args, forced, threads);
}

void run_matmul(py::handle out, py::handle a, py::handle b, py::handle bias, bool accumulate,
                const std::string& kernel, int threads) {
  const char* op = "fastdl.gemm";
  Problem p = matmul_problem(out, a, b, op);
  add_bias(&p, bias, view(out, op, "out"), op);
  p.args.accumulate = accumulate;
  run(p, kernel, threads, op);
}

void run_linear(py::handle out, py::handle input, py::handle weight, py::handle bias, const std::string& kernel,
                int threads) {
  const char* op = "fastdl.linear";
  Problem p = weight_problem(out, input, weight, op);
  add_bias(&p, bias, view(out, op, "out"), op);
  run(p, kernel, threads, op);
}

void run_linear_packed(py::handle out_, py::handle input_, py::handle packed_, py::handle bias, i64 N,
                       const std::string& kernel_name, int threads) {
  const char* op = "fastdl.linear_packed";
  const GemmKernel& kernel = pack_kernel(kernel_name, op);
  const TensorView out = view(out_, op, "out"), input = view(input_, op, "input"), packed = view(packed_, op, "packed");
  Problem p = linear_problem(out, input, N, op);
  const i64 size = gemm_pack_size(p.desc.K, N, kernel);
  if (kernel.kind != GemmKind::kTile || packed.ndim != 1 || packed.size(0) != size || packed.stride(0) != 1)
    fail(op, ": argument 'packed': expected ", size, " contiguous elements, the pack of a [", p.desc.K, ", ", N,
         "] operand for a tile kernel, got ", shape_string(packed), " for ", kernel.name);
  require_apart(out, packed, op, "packed");
  add_bias(&p, bias, out, op);
  p.args.b = packed.data;
  p.desc.packed = true;
  p.desc.b_row = kernel.nr;
  p.desc.b_col = 1;
  run(p, kernel.name, threads, op);
}

// The leading dimensions of x (and y), merged where both step through them as through one; sizes of 1 are left out.
struct Rows {
  int dims = 0;
  i64 size[kMaxBatchDims], a[kMaxBatchDims], b[kMaxBatchDims];
};

Rows leading_rows(const TensorView& x, const TensorView* y, const char* op) {
  Rows r;
  for (int i = 0; i + 1 < x.ndim; ++i) {
    const i64 size = x.shape[i], a = x.strides[i], b = y ? y->strides[i] : 0;
    const int o = r.dims - 1;  // the dimension around this one
    if (size == 1) continue;
    if (o >= 0 && r.a[o] == a * size && r.b[o] == b * size) {
      r.size[o] *= size, r.a[o] = a, r.b[o] = b;
    } else {
      if (r.dims == kMaxBatchDims) fail(op, ": expected at most ", kMaxBatchDims, " leading dimensions, got more");
      r.size[r.dims] = size, r.a[r.dims] = a, r.b[r.dims++] = b;
    }
  }
  return r;
}

void run_sum_rows(py::handle out_, py::handle x_, int threads) {
  const char* op = "fastdl.sum_rows";
  const TensorView out = view(out_, op, "out"), x = view(x_, op, "x");
  require_rank(x, 1, op, "x");
  if (out.ndim != 1 || out.size(0) != x.size(-1) || (out.size(0) > 1 && out.stride(0) != 1))
    fail(op, ": argument 'out': expected contiguous [", x.size(-1), "], got ", shape_string(out));
  require_apart(out, x, op, "x");
  require_threads(threads, op);
  const Rows rows = leading_rows(x, nullptr, op);
  RowsDesc d = {};
  d.dims = rows.dims, d.cols = x.size(-1), d.col = x.stride(-1);
  for (int i = 0; i < rows.dims; ++i) d.size[i] = rows.size[i], d.stride[i] = rows.a[i];
  py::gil_scoped_release release;
  gemm_sum_rows(x.data, d, out.data, cpu_info().isa, current_team(threads).threads);
}

// out[N, K] = grad[..., N]^T @ input[..., K], contracted over all leading dimensions: those that do not merge into one
// run of rows in both are looped over and accumulated.
void run_linear_wgrad(py::handle out_, py::handle grad_, py::handle input_, int threads) {
  const char* op = "fastdl.linear_wgrad";
  const TensorView out = view(out_, op, "out"), grad = view(grad_, op, "grad"), input = view(input_, op, "input");
  require_threads(threads, op);
  require_rank(grad, 1, op, "grad");
  bool fits = grad.ndim == input.ndim;
  for (int i = 2; fits && i <= grad.ndim; ++i) fits = grad.size(-i) == input.size(-i);
  if (!fits)
    fail(op, ": argument 'grad': expected the leading dimensions of input ", shape_string(input), ", got ",
         shape_string(grad));
  if (out.ndim != 2 || out.size(0) != grad.size(-1) || out.size(1) != input.size(-1))
    fail(op, ": argument 'out': expected shape [", grad.size(-1), ", ", input.size(-1), "], got ", shape_string(out));
  const Rows rows = leading_rows(grad, &input, op);
  Problem p = {};
  GemmDesc& d = p.desc;
  d.batch = 1;
  d.M = out.size(0), d.N = out.size(1), d.K = rows.dims ? rows.size[rows.dims - 1] : 1;
  d.a_row = grad.stride(-1), d.a_col = rows.dims ? rows.a[rows.dims - 1] : 1;
  d.b_row = rows.dims ? rows.b[rows.dims - 1] : 1, d.b_col = input.stride(-1);
  set_out(&p, out, op);
  require_apart(out, grad, op, "grad");
  require_apart(out, input, op, "input");
  i64 outer = 1;
  for (int i = 0; i + 1 < rows.dims; ++i) outer *= rows.size[i];
  if (outer == 0) d.K = 0;
  py::gil_scoped_release release;
  for (i64 o = 0; o < std::max<i64>(1, outer); ++o) {
    p.args.a = grad.data, p.args.b = input.data;
    p.args.accumulate = o > 0;
    for (i64 i = rows.dims - 2, rest = o; i >= 0 && outer > 0; rest /= rows.size[i--]) {
      p.args.a += rest % rows.size[i] * rows.a[i];
      p.args.b += rest % rows.size[i] * rows.b[i];
    }
    gemm(d, p.args, nullptr, threads);
  }
}

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
    bool fits = w.ndim == 2 && input.ndim >= 1 && input.ndim <= kMaxBatchDims + 1 && input.size(-1) == w.size(1);
    if (fits && !bias_.is_none()) {
      const TensorView bias = view(bias_, op, "bias");
      fits = bias.ndim == 1 && bias.size(0) == w.size(0);
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
    if (a.ndim < 2 || b.ndim < 2 || ndim > kMaxBatchDims + 2 || a.size(-1) != b.size(-2)) return py::none();
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

py::dict plan_problem(Problem p, const std::string& kernel, int threads, const char* op) {
  require_threads(threads, op);
  gemm_canonicalise(&p.desc, &p.args);
  const Machine machine = this_machine(threads);
  return plan_dict(p.desc, machine, gemm_plan(p.desc, machine, forced_kernel(kernel, op)));
}

py::dict plan_linear(py::handle out, py::handle input, py::handle weight, bool packed, const std::string& kernel,
                     int threads) {
  const char* op = "fastdl.linear_plan";
  Problem p = weight_problem(out, input, weight, op);
  if (packed) p.desc.packed = true, p.desc.b_row = pack_kernel(kernel, op).nr, p.desc.b_col = 1;
  return plan_problem(p, kernel, threads, op);
}

py::dict plan_matmul(py::handle out, py::handle a, py::handle b, const std::string& kernel, int threads) {
  const char* op = "fastdl.matmul_plan";
  return plan_problem(matmul_problem(out, a, b, op), kernel, threads, op);
}

py::dict plan_shape(i64 M, i64 N, i64 K, i64 batch, Strides a, Strides b, bool packed, const std::string& isa,
                    int threads, i64 l1d, i64 l2, i64 l3, const std::string& kernel) {
  const char* op = "fastdl.gemm_plan";
  require_threads(threads, op);
  if (M < 0 || N < 0 || K < 0 || batch < 0)
    fail(op, ": expected sizes of at least 0, got M=", M, " N=", N, " K=", K, " batch=", batch);
  GemmDesc d = {};
  d.M = M, d.N = N, d.K = K, d.batch = batch;
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

py::list kernel_rows(const std::string& op) {
  if (op != "gemm") fail("fastdl.kernels: argument 'op': expected 'gemm', got '", op, "'");
  const CpuInfo& cpu = cpu_info();
  py::list out;
  for (const GemmKernel& k : gemm_kernels()) {
    py::dict row;
    row["name"] = k.name;
    row["isa"] = isa_name(k.isa);
    row["dtype"] = "float32";
    row["kind"] = k.kind == GemmKind::kTile ? "tile" : "dot";
    row["mr"] = k.mr;
    row["nr"] = k.nr;
    row["available"] = k.isa <= cpu.isa;
    row["reason"] = k.isa <= cpu.isa      ? std::string()
                    : isa_supported(k.isa) ? concat("FASTDL_ISA=", cpu.cap)
                                           : concat("this machine has no ", isa_name(k.isa));
    out.append(row);
  }
  return out;
}

void run_pack(py::handle out_, py::handle b_, const std::string& kernel_name) {
  const char* op = "fastdl.pack";
  const GemmKernel& kernel = pack_kernel(kernel_name, op);
  const TensorView out = view(out_, op, "out"), b = view(b_, op, "b");
  if (b.ndim != 2) fail(op, ": argument 'b': expected shape [K, N], got ", shape_string(b));
  const i64 size = gemm_pack_size(b.size(0), b.size(1), kernel);
  if (out.ndim != 1 || out.size(0) != size || out.stride(0) != 1)
    fail(op, ": argument 'out': expected ", size, " contiguous elements, got ", shape_string(out));
  require_apart(out, b, op, "b");
  py::gil_scoped_release release;
  gemm_pack_b(b.data, b.stride(0), b.stride(1), b.size(0), b.size(1), kernel, out.data);
}

}  // namespace

void bind_gemm(py::module_& m) {
  using namespace py::literals;
  m.def("kernels", kernel_rows, "op"_a);
  m.def("counters", [] {
    py::dict out;
    for (const GemmKernel& k : gemm_kernels()) out[k.name] = gemm_calls(k);
    return out;
  });
  m.def("reset_counters", gemm_reset_calls);
  m.def("gemm_plan", plan_shape, "M"_a, "N"_a, "K"_a, py::kw_only(), "batch"_a = 1, "a_strides"_a = py::none(),
        "b_strides"_a = py::none(), "packed"_a = false, "isa"_a = "", "threads"_a = 0, "l1d"_a = 0, "l2"_a = 0,
        "l3"_a = 0, "kernel"_a = "");
  m.def("gemm", run_matmul, "out"_a, "a"_a, "b"_a, "bias"_a = py::none(), "accumulate"_a = false, "kernel"_a = "",
        "threads"_a = 0);
  m.def("linear", run_linear, "out"_a, "input"_a, "weight"_a, "bias"_a = py::none(), "kernel"_a = "", "threads"_a = 0);
  m.def("linear_plan", plan_linear, "out"_a, "input"_a, "weight"_a, "packed"_a = false, "kernel"_a = "",
        "threads"_a = 0);
  m.def("matmul_plan", plan_matmul, "out"_a, "a"_a, "b"_a, "kernel"_a = "", "threads"_a = 0);
  m.def("linear_wgrad", run_linear_wgrad, "out"_a, "grad"_a, "input"_a, "threads"_a = 0);
  m.def("linear_shape", linear_shape, "input"_a, "weight"_a, "bias"_a = py::none());
  m.def("matmul_shape", matmul_shape, "a"_a, "b"_a);
  m.def("sum_rows", run_sum_rows, "out"_a, "x"_a, "threads"_a = 0);
  m.def("pack_kernel", [] { return gemm_pack_kernel(cpu_info().isa).name; });
  m.def("pack_numel", [](i64 K, i64 N, const std::string& k) { return gemm_pack_size(K, N, gemm_kernel(k, "fastdl.pack_numel")); }, "K"_a,
        "N"_a, "kernel"_a);
  m.def("pack", run_pack, "out"_a, "b"_a, "kernel"_a);
  m.def("linear_packed", run_linear_packed, "out"_a, "input"_a, "packed"_a, "bias"_a, "N"_a, "kernel"_a,
        "threads"_a = 0);
}

}  // namespace fastdl
