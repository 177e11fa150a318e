// GEMM and what training adds to it, of the CUDA modules.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "bind/gemm_problem.h"
#include "gemm/cuda/plan.h"
#include "gemm/cuda/tile_probe.h"

namespace py = pybind11;

namespace fastdl {
namespace {

// Ready to be planned: in the one form that gets a kernel.
GemmProblem problem(const TensorView& a, const TensorView& b, const TensorView& out, const std::string& precision,
                    const char* op) {
  GemmProblem p = matmul_problem(out, a, b, op);
  p.desc.precision = precision_named(precision, op);
  return p;
}

// An argument that lies in memory exactly as out does, or null for None.
void* like_out(py::handle object, const TensorView& out, int* device, const char* op, const char* argument) {
  if (object.is_none()) return nullptr;
  const TensorView t = device_view(object, device, op, argument);
  require_dtype(t, out.dtype, "as out", op, argument);
  require_alike(t, out, op, argument);
  require_apart(out, t, op, argument);
  return t.data;
}

void run_gemm(py::handle a_, py::handle b_, py::handle out_, py::handle bias_, py::handle residual, py::handle pre,
              const std::string& activation, bool accumulate, const std::string& precision, py::handle workspace,
              const std::string& kernel, int splits) {
  const char* op = "fastdl.gemm";
  int device = -1;
  const TensorView a = device_view(a_, &device, op, "a"), b = device_view(b_, &device, op, "b"),
                   out = device_view(out_, &device, op, "out");
  GemmProblem p = problem(a, b, out, precision, op);
  if (!bias_.is_none()) {
    const TensorView bias = device_view(bias_, &device, op, "bias");
    if (bias.ndim != 1 || bias.size(0) != p.desc.N)
      fail(op, ": argument 'bias': expected shape [", p.desc.N, "], got ", shape_string(bias));
    require_dtype(bias, out.dtype, "as out", op, "bias");
    require_apart(out, bias, op, "bias");
    p.args.bias = bias.data, p.args.bias_step = bias.stride(0);
  }
  p.args.residual = like_out(residual, out, &device, op, "residual");
  p.args.pre = like_out(pre, out, &device, op, "pre");
  if (p.args.pre) {
    const TensorView z = device_view(pre, &device, op, "pre");
    for (const auto& [object, name] :
         {std::pair{a_, "a"}, std::pair{b_, "b"}, std::pair{bias_, "bias"}, std::pair{residual, "residual"}})
      if (!object.is_none()) require_apart(z, device_view(object, &device, op, name), op, name, "pre");
  }
  p.args.activation = activation_named(activation, op);
  p.args.accumulate = accumulate;
  gemm_canonicalise(&p.desc, &p.args);
  const CudaGemmPlan plan =
      cuda_gemm_plan(p.desc, gpu_info(device), forced_row(cuda_gemm_kernels(), kernel, op), splits);
  void* const memory = workspace_memory(workspace, plan.workspace_bytes, &device, op);
  if (log_enabled()) log_once(describe(p.desc, plan));
  const Stream stream = current_stream(device, op);
  py::gil_scoped_release release;
  cuda_gemm_run(p.desc, plan, p.args, memory, stream);
}

i64 gemm_workspace(py::handle a_, py::handle b_, py::handle out_, const std::string& precision,
                   const std::string& kernel, int splits) {
  const char* op = "fastdl.gemm";
  int device = -1;
  const TensorView a = device_view(a_, &device, op, "a"), b = device_view(b_, &device, op, "b"),
                   out = device_view(out_, &device, op, "out");
  GemmProblem p = problem(a, b, out, precision, op);
  gemm_canonicalise(&p.desc, &p.args);
  return cuda_gemm_plan(p.desc, gpu_info(device), forced_row(cuda_gemm_kernels(), kernel, op), splits).workspace_bytes;
}

// A tensor of any device, meta included, as its shape, strides and dtype say.
struct Described {
  std::vector<i64> shape, strides;
  TensorView view;

  Described(py::handle tensor, const char* op, const char* argument) {
    if (!py::hasattr(tensor, "stride"))
      throw TypeMismatch(concat(op, ": argument '", argument, "': expected a torch.Tensor"));
    shape = tensor.attr("shape").cast<std::vector<i64>>();
    strides = tensor.attr("stride")().cast<std::vector<i64>>();
    std::string dtype = py::str(tensor.attr("dtype"));
    if (dtype.rfind("torch.", 0) == 0) dtype = dtype.substr(6);
    view = {nullptr, dtype_named(dtype, op), static_cast<int>(shape.size()), shape.data(), strides.data()};
  }
};

py::dict gemm_plan_of(py::handle a_, py::handle b_, py::handle out_, const std::string& precision,
                      const std::string& kernel, const std::string& gpu, int splits) {
  const char* op = "fastdl.gemm";
  const Described a(a_, op, "a"), b(b_, op, "b"), out(out_, op, "out");
  // Without memory nothing overlaps: addresses far apart say so.
  TensorView av = a.view, bv = b.view, ov = out.view;
  av.data = reinterpret_cast<void*>(std::uintptr_t{1} << 60);
  bv.data = reinterpret_cast<void*>(std::uintptr_t{2} << 60);
  ov.data = reinterpret_cast<void*>(std::uintptr_t{3} << 60);
  GemmProblem p = problem(av, bv, ov, precision, op);
  gemm_canonicalise(&p.desc, &p.args);
  const CudaGemmPlan plan = cuda_gemm_plan(p.desc, gpu.empty() ? gpu_info(0) : gpu_named(gpu),
                                           forced_row(cuda_gemm_kernels(), kernel, op), splits);
  py::dict d;
  d["op"] = "gemm";
  d["M"] = p.desc.M, d["N"] = p.desc.N, d["K"] = p.desc.K, d["batch"] = p.desc.batch;
  d["kernel"] = plan.kernel->name;
  d["tiles"] = py::make_tuple(plan.tiles_m, plan.tiles_n);
  d["splits"] = plan.splits;
  d["split_depth"] = plan.split_depth;
  d["blocks"] = plan.blocks(p.desc.batch);
  d["workspace_bytes"] = plan.workspace_bytes;
  d["microseconds"] = plan.microseconds;
  d["why"] = plan.why;
  d["text"] = describe(p.desc, plan);
  return d;
}

void activation_grad(py::handle dy_, py::handle z_, py::handle dz_, const std::string& activation) {
  const char* op = "fastdl.activation_grad";
  int device = -1;
  const TensorView dz = device_view(dz_, &device, op, "dz");
  i64 expected = 1;  // contiguous, so that all three are one run of elements
  for (int i = dz.ndim - 1; i >= 0; expected *= dz.shape[i--])
    if (dz.shape[i] > 1 && dz.strides[i] != expected && dz.numel() > 0)
      fail(op, ": argument 'dz': expected a contiguous tensor, got stride ", dz.strides[i], " in dimension ", i);
  for (const auto& [object, name] : {std::pair{dy_, "dy"}, std::pair{z_, "z"}})
    if (object.is_none()) throw TypeMismatch(concat(op, ": argument '", name, "': expected a torch.Tensor, got None"));
  const void* dy = like_out(dy_, dz, &device, op, "dy");
  const void* z = like_out(z_, dz, &device, op, "z");
  const Activation a = activation_named(activation, op);
  const Stream stream = current_stream(device, op);
  py::gil_scoped_release release;
  cuda_activation_grad(dy, z, dz.data, dz.numel(), a, dz.dtype, stream);
}

void sum_rows(py::handle x_, py::handle out_) {
  const char* op = "fastdl.sum_rows";
  int device = -1;
  const TensorView x = device_view(x_, &device, op, "x"), out = device_view(out_, &device, op, "out");
  require_rank(x, 1, op, "x");
  if (out.ndim != 1 || out.size(0) != x.size(-1) || (out.size(0) > 1 && out.stride(0) != 1))
    fail(op, ": argument 'out': expected contiguous [", x.size(-1), "], got ", shape_string(out));
  require_dtype(out, x.dtype, "as x", op, "out");
  require_apart(out, x, op, "x");
  const Rows rows = leading_rows(x, nullptr, op);
  RowsDesc d = {};
  d.dims = rows.dims, d.cols = x.size(-1), d.col = x.stride(-1), d.dtype = x.dtype;
  for (int i = 0; i < rows.dims; ++i) d.size[i] = rows.size[i], d.stride[i] = rows.a[i];
  const Stream stream = current_stream(device, op);
  py::gil_scoped_release release;
  cuda_sum_rows(x.data, d, out.data, stream);
}

py::list gemm_rows() {
  using namespace py::literals;
  py::list rows;
  for (const CudaGemmKernel& k : cuda_gemm_kernels())
    rows.append(py::dict("name"_a = k.name, "isa"_a = "sm80", "dtype"_a = torch_name(k.dtype),
                         "kind"_a = k.dot ? "dot" : "tile", "precision"_a = precision_name(k.precision),
                         "tile"_a = py::make_tuple(k.tile_m, k.tile_n), "depth"_a = k.depth, "threads"_a = k.threads,
                         "shared_bytes"_a = k.shared_bytes));
  return rows;
}

void tile_probe(py::handle a, py::handle b, py::handle out, bool a_transposed, bool b_transposed,
                const std::string& precision) {
  const char* op = "tile_probe";
  int device = -1;
  const TensorView av = device_view(a, &device, op, "a"), bv = device_view(b, &device, op, "b"),
                   ov = device_view(out, &device, op, "out");
  if (av.numel() != 16 * 32 || bv.numel() != 32 * 32 || ov.numel() != 16 * 32 + 48 || av.dtype != bv.dtype ||
      ov.dtype != DType::f32)
    fail(op, ": expected 16 x 32 and 32 x 32 operands of one dtype, and 16 x 32 + 48 float32 results");
  tile_probe_run({av.data, bv.data, static_cast<float*>(ov.data), a_transposed, b_transposed}, av.dtype,
                 precision_named(precision, op), current_stream(device, op));
}

}  // namespace

void bind_cuda_gemm(py::module_& m) {
  using namespace py::literals;
  add_kernel_rows("gemm", gemm_rows);
  m.def(
      "gemm", &run_gemm, "a"_a, "b"_a, "out"_a, "bias"_a = py::none(), "residual"_a = py::none(), "pre"_a = py::none(),
      "activation"_a = "none", "accumulate"_a = false, "precision"_a = "ieee", "workspace"_a = py::none(),
      "kernel"_a = "", "splits"_a = 0,
      "out = activation([out +] a b [+ bias]) [+ residual], a [..., M, K], b [..., K, N]; pre: what the activation is "
      "applied to. workspace: uint8, of gemm_workspace() bytes.");
  m.def("gemm_workspace", &gemm_workspace, "a"_a, "b"_a, "out"_a, "precision"_a = "ieee", "kernel"_a = "",
        "splits"_a = 0, "Bytes of workspace that gemm() of these needs.");
  m.def("gemm_plan", &gemm_plan_of, "a"_a, "b"_a, "out"_a, "precision"_a = "ieee", "kernel"_a = "", "gpu"_a = "",
        "splits"_a = 0, "What gemm() would do with tensors like these, of any device, on a GPU named sm80 or sm90.");
  m.def("activation_grad", &activation_grad, "dy"_a, "z"_a, "dz"_a, "activation"_a,
        "dz = dy * d activation(z) / dz, elementwise.");
  m.def("sum_rows", &sum_rows, "x"_a, "out"_a, "out[j] = the sum of x[..., j].");
  m.def("tile_probe", &tile_probe, "a"_a, "b"_a, "out"_a, "a_transposed"_a, "b_transposed"_a, "precision"_a,
        "out[16,32] = a b by one warp, and the largest magnitudes of the rows of a and the columns of b.");
}

}  // namespace fastdl
