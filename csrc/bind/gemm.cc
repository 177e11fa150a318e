// _C: GEMM, linear, their gradients, packs.
#include "gemm/gemm.h"

#include <algorithm>
#include <string>

#include "base/check.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

void run(const GemmProblem& p, const std::string& kernel, int threads, const char* op) {
  require_threads(threads, op);
  const GemmKernel* forced = forced_kernel(kernel, op);
  py::gil_scoped_release release;
  gemm(p.desc, p.args, forced, threads);
}

void run_matmul(py::handle out, py::handle a, py::handle b, py::handle bias, bool accumulate, const std::string& kernel,
                int threads) {
  const char* op = "fastdl.gemm";
  GemmProblem p = matmul_problem(out, a, b, op);
  add_bias(&p, bias, view(out, op, "out"), op);
  p.args.accumulate = accumulate;
  run(p, kernel, threads, op);
}

void run_linear(py::handle out, py::handle input, py::handle weight, py::handle bias, const std::string& kernel,
                int threads) {
  const char* op = "fastdl.linear";
  GemmProblem p = weight_problem(out, input, weight, op);
  add_bias(&p, bias, view(out, op, "out"), op);
  run(p, kernel, threads, op);
}

void run_linear_packed(py::handle out_, py::handle input_, py::handle packed_, py::handle bias, i64 N,
                       const std::string& kernel_name, int threads) {
  const char* op = "fastdl.linear_packed";
  const GemmKernel& kernel = pack_kernel(kernel_name, op);
  const TensorView out = view(out_, op, "out"), input = view(input_, op, "input"), packed = view(packed_, op, "packed");
  GemmProblem p = linear_problem(out, input, N, op);
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
  GemmProblem p = {};
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
  m.def("gemm", run_matmul, "out"_a, "a"_a, "b"_a, "bias"_a = py::none(), "accumulate"_a = false, "kernel"_a = "",
        "threads"_a = 0);
  m.def("linear", run_linear, "out"_a, "input"_a, "weight"_a, "bias"_a = py::none(), "kernel"_a = "", "threads"_a = 0);
  m.def("linear_wgrad", run_linear_wgrad, "out"_a, "grad"_a, "input"_a, "threads"_a = 0);
  m.def("sum_rows", run_sum_rows, "out"_a, "x"_a, "threads"_a = 0);
  m.def("pack", run_pack, "out"_a, "b"_a, "kernel"_a);
  m.def("linear_packed", run_linear_packed, "out"_a, "input"_a, "packed"_a, "bias"_a, "N"_a, "kernel"_a,
        "threads"_a = 0);
}

}  // namespace fastdl
