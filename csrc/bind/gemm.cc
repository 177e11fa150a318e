// _C: GEMM, linear, their gradients, packs.
#include "gemm/gemm.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/parallel.h"
#include "bind/bind.h"
#include "bind/gemm_problem.h"

namespace py = pybind11;

namespace fastdl {
namespace {

void run(GemmProblem& p, const std::string& kernel, int threads, const char* op, Switch which = Switch::matmul) {
  require_threads(threads, op);
  const GemmKernel* forced = usable_row(gemm_kernels(), kernel, op);
  p.desc.precision = asked_precision(p.desc.dtype, which);
  py::gil_scoped_release release;
  gemm(p.desc, p.args, forced, threads);
}

void run_matmul(py::handle out, py::handle a, py::handle b, py::handle bias, bool accumulate, const std::string& kernel,
                int threads, const std::string& which) {
  const char* op = "fastdl.gemm";
  const TensorView result = view(out, op, "out");
  GemmProblem p = matmul_problem(result, view(a, op, "a"), view(b, op, "b"), op);
  add_bias(&p, bias, result, op);
  p.args.accumulate = accumulate;
  if (!accumulate) advise_huge_pages(result);
  run(p, kernel, threads, op, switch_named(which, op));
}

void run_linear(py::handle out, py::handle input, py::handle weight, py::handle bias, const std::string& kernel,
                int threads, const std::string& which) {
  const char* op = "fastdl.linear";
  const TensorView result = view(out, op, "out");
  GemmProblem p = weight_problem(result, view(input, op, "input"), view(weight, op, "weight"), op);
  add_bias(&p, bias, result, op);
  advise_huge_pages(result);
  run(p, kernel, threads, op, switch_named(which, op));
}

// An argument that lies in memory exactly as out does, or null for None.
void* like_out(py::handle object, const TensorView& out, const char* op, const char* argument) {
  if (object.is_none()) return nullptr;
  const TensorView t = view(object, op, argument);
  require_dtype(t, out.dtype, "as out", op, argument);
  require_alike(t, out, op, argument);
  require_apart(out, t, op, argument);
  return t.data;
}

void run_linear_fused(py::handle out_, py::handle input, py::handle weight, py::handle bias,
                      const std::string& activation, py::handle residual, py::handle pre, py::handle packed,
                      const std::string& kernel, int threads) {
  const char* op = "fastdl.linear_fused";
  const TensorView out = view(out_, op, "out");
  GemmProblem p = weight_problem(out, view(input, op, "input"), view(weight, op, "weight"), op);
  add_bias(&p, bias, out, op);
  p.args.activation = activation_named(activation, op);
  p.args.residual = like_out(residual, out, op, "residual");
  p.args.pre = like_out(pre, out, op, "pre");
  if (!packed.is_none()) {
    if (!kernel.empty()) fail(op, ": argument 'kernel': expected none beside a pack, got '", kernel, "'");
    p.args.pack = own_pack(packed, p.desc, out, op);
  }
  if (p.args.pre) {  // written while the inputs are still being read
    const TensorView z = view(pre, op, "pre");
    for (const auto& [object, name] : {std::pair{input, "input"}, std::pair{weight, "weight"}, std::pair{bias, "bias"},
                                       std::pair{residual, "residual"}, std::pair{packed, "packed"}})
      if (!object.is_none()) require_apart(z, view(object, op, name), op, name, "pre");
  }
  run(p, kernel, threads, op);
}

void run_activation_grad(py::handle out_, py::handle grad_, py::handle pre_, const std::string& activation,
                         int threads) {
  const char* op = "fastdl.activation_grad";
  const TensorView out = view(out_, op, "out");
  require_threads(threads, op);
  i64 expected = 1;  // contiguous, so that all three are one run of elements
  for (int i = out.ndim - 1; i >= 0; expected *= out.shape[i--])
    if (out.shape[i] > 1 && out.strides[i] != expected && out.numel() > 0)
      fail(op, ": argument 'out': expected a contiguous tensor, got stride ", out.strides[i], " in dimension ", i);
  for (const auto& [object, name] : {std::pair{grad_, "grad"}, std::pair{pre_, "pre"}})
    if (object.is_none()) throw TypeMismatch(concat(op, ": argument '", name, "': expected a torch.Tensor, got None"));
  const void* grad = like_out(grad_, out, op, "grad");
  const void* pre = like_out(pre_, out, op, "pre");
  const Activation a = activation_named(activation, op);
  py::gil_scoped_release release;
  gemm_activation_grad(grad, pre, out.numel(), a, out.data, out.dtype, cpu_info().isa, current_team(threads).threads);
}

void run_linear_packed(py::handle out_, py::handle input_, py::handle packed, py::handle bias, i64 N,
                       const std::string& kernel_name, int threads) {
  const char* op = "fastdl.linear_packed";
  const TensorView out = view(out_, op, "out"), input = view(input_, op, "input");
  const GemmKernel& kernel = pack_kernel(kernel_name, input.dtype, op);
  GemmProblem p = linear_problem(out, input, N, op);
  p.args.pack = pack_data(packed, p.desc.K, N, kernel, out, op);
  gemm_use_pack(&p.desc, &p.args, kernel);
  add_bias(&p, bias, out, op);
  p.args.pack = nullptr;
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
  require_dtype(out, x.dtype, "as x", op, "out");
  d.dims = rows.dims, d.cols = x.size(-1), d.col = x.stride(-1), d.dtype = x.dtype;
  for (int i = 0; i < rows.dims; ++i) d.size[i] = rows.size[i], d.stride[i] = rows.a[i];
  py::gil_scoped_release release;
  gemm_sum_rows(x.data, d, out.data, cpu_info().isa, current_team(threads).threads);
}

// out[N, K] = grad[..., N]^T @ input[..., K], contracted over all leading dimensions: those that do not merge into one
// run of rows in both become pairs to sum over. accumulate: added to what out holds.
void run_linear_wgrad(py::handle out_, py::handle grad_, py::handle input_, bool accumulate, int threads,
                      const std::string& which) {
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
  require_dtype(input, grad.dtype, "as grad", op, "input");
  require_dtype(out, grad.dtype, "as grad", op, "out");
  const Rows rows = leading_rows(grad, &input, op);
  const int inner = rows.dims - 1;
  GemmProblem p = {};
  GemmDesc& d = p.desc;
  d.batch = d.pairs = 1, d.dtype = grad.dtype;
  d.M = out.size(0), d.N = out.size(1), d.K = rows.dims ? rows.size[inner] : 1;
  d.a_row = grad.stride(-1), d.a_col = rows.dims ? rows.a[inner] : 1;
  d.b_row = rows.dims ? rows.b[inner] : 1, d.b_col = input.stride(-1);
  GemmPairs& pairs = p.args.pairs;
  for (int i = 0; i < inner; ++i) {
    pairs.size[i] = rows.size[i], pairs.a[i] = rows.a[i], pairs.b[i] = rows.b[i];
    d.pairs *= rows.size[i];
  }
  if (d.pairs == 0) {
    d.K = 0, d.pairs = 1;  // nothing to sum: zeros
  } else {
    pairs.dims = std::max(0, inner);
  }
  set_out(&p, out, op);
  require_apart(out, grad, op, "grad");
  require_apart(out, input, op, "input");
  p.args.a = grad.data, p.args.b = input.data, p.args.accumulate = accumulate;
  run(p, "", threads, op, switch_named(which, op));
}

void run_pack(py::handle out_, py::handle b_, const std::string& kernel_name) {
  const char* op = "fastdl.pack";
  const TensorView out = view(out_, op, "out"), b = view(b_, op, "b");
  const GemmKernel& kernel = pack_kernel(kernel_name, b.dtype, op);
  require_dtype(b, kernel.dtype, "as the kernel", op, "b");
  require_dtype(out, DType::f32, "the dtype of packs", op, "out");
  if (b.ndim != 2) fail(op, ": argument 'b': expected shape [K, N], got ", shape_string(b));
  const i64 size = gemm_pack_size(b.size(0), b.size(1), kernel);
  if (out.ndim != 1 || out.size(0) != size || out.stride(0) != 1)
    fail(op, ": argument 'out': expected ", size, " contiguous elements, got ", shape_string(out));
  require_apart(out, b, op, "b");
  py::gil_scoped_release release;
  gemm_pack_b(b.data, b.stride(0), b.stride(1), b.size(0), b.size(1), kernel, static_cast<float*>(out.data));
}

}  // namespace

void bind_gemm(py::module_& m) {
  using namespace py::literals;
  m.def("gemm", run_matmul, "out"_a, "a"_a, "b"_a, "bias"_a = py::none(), "accumulate"_a = false, "kernel"_a = "",
        "threads"_a = 0, "switch"_a = "matmul");
  m.def("linear", run_linear, "out"_a, "input"_a, "weight"_a, "bias"_a = py::none(), "kernel"_a = "", "threads"_a = 0,
        "switch"_a = "matmul");
  m.def("linear_fused", run_linear_fused, "out"_a, "input"_a, "weight"_a, "bias"_a = py::none(),
        "activation"_a = "none", "residual"_a = py::none(), "pre"_a = py::none(), "packed"_a = py::none(),
        "kernel"_a = "", "threads"_a = 0);
  m.def("activation_grad", run_activation_grad, "out"_a, "grad"_a, "pre"_a, "activation"_a, "threads"_a = 0);
  m.def("linear_wgrad", run_linear_wgrad, "out"_a, "grad"_a, "input"_a, "accumulate"_a = false, "threads"_a = 0,
        "switch"_a = "matmul");
  m.def("sum_rows", run_sum_rows, "out"_a, "x"_a, "threads"_a = 0);
  m.def("pack", run_pack, "out"_a, "b"_a, "kernel"_a);
  m.def("linear_packed", run_linear_packed, "out"_a, "input"_a, "packed"_a, "bias"_a, "N"_a, "kernel"_a,
        "threads"_a = 0);
}

}  // namespace fastdl
