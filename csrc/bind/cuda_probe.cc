// Instructions one by one, for tests of the twin against what the PTX manual says, and of a GPU against the twin.
#include <pybind11/pybind11.h>

#include "base/check.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "ptx/probe.h"

namespace py = pybind11;

namespace fastdl {
namespace {

constexpr const char* kOp = "mma_probe";

// A contiguous tensor of so many elements.
TensorView whole(py::handle object, int* device, i64 numel, const char* op, const char* argument) {
  const TensorView t = device_view(object, device, op, argument);
  i64 step = 1;
  bool contiguous = true;
  for (int i = t.ndim - 1; i >= 0; step *= t.shape[i--]) contiguous = contiguous && t.strides[i] == step;
  if (!contiguous || t.numel() != numel || reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0)
    fail(op, ": argument '", argument, "': expected ", numel, " contiguous elements, got shape ", shape_string(t));
  return t;
}

void fragment_probe(py::handle a_, py::handle b_, py::handle d_) {
  const char* op = "fragment_probe";
  int device = -1;
  const TensorView a = whole(a_, &device, 32 * 8, op, "a"), b = whole(b_, &device, 32 * 4, op, "b"),
                   d = whole(d_, &device, 32 * 4, op, "d");
  if (a.dtype == DType::f32 || b.dtype != a.dtype || d.dtype != DType::f32)
    fail(op, ": expected bfloat16 or float16 operands of one dtype and float32 sums");
  fragment_probe_run(a.data, b.data, static_cast<float*>(d.data), a.dtype, current_stream(device, op));
}

void matrix_probe(py::handle x_, py::handle out_, bool transposed) {
  const char* op = "matrix_probe";
  int device = -1;
  const TensorView x = whole(x_, &device, 32 * 8, op, "x"), out = whole(out_, &device, 32 * 8, op, "out");
  if (x.dtype == DType::f32 || out.dtype != x.dtype) fail(op, ": expected bfloat16 or float16 tensors of one dtype");
  matrix_probe_run(x.data, out.data, transposed, current_stream(device, op));
}

void sums_probe(py::handle x_, py::handle out_) {
  const char* op = "sums_probe";
  int device = -1;
  const TensorView out = whole(out_, &device, 32, op, "out");
  const TensorView given = device_view(x_, &device, op, "x");
  const TensorView x = whole(x_, &device, given.numel() / 32 * 32, op, "x");
  if (x.dtype != DType::f32 || out.dtype != DType::f32) fail(op, ": expected float32 tensors");
  sums_probe_run(static_cast<const float*>(x.data), static_cast<int>(x.numel() / 32), static_cast<float*>(out.data),
                 current_stream(device, op));
}

void mma_probe(py::handle a, py::handle b, py::handle out) {
  int device = -1;
  const TensorView av = device_view(a, &device, kOp, "a"), bv = device_view(b, &device, kOp, "b"),
                   ov = device_view(out, &device, kOp, "out");
  if (av.ndim != 2 || av.size(0) != 16 || av.size(1) % 16 != 0 || av.stride(0) != av.size(1))
    fail(kOp, ": argument 'a': expected [16, a multiple of 16], contiguous, got ", shape_string(av));
  if (bv.ndim != 2 || bv.size(0) != 8 || bv.size(1) != av.size(1) || bv.stride(0) != bv.size(1))
    fail(kOp, ": argument 'b': expected [8, ", av.size(1), "], contiguous, got ", shape_string(bv));
  if (av.dtype == DType::f32) fail(kOp, ": argument 'a': expected bfloat16 or float16, got float32");
  require_dtype(bv, av.dtype, "as a", kOp, "b");
  require_dtype(ov, DType::f32, "sums", kOp, "out");
  if (ov.numel() != 128) fail(kOp, ": argument 'out': expected 16 x 8 elements, got ", shape_string(ov));
  const Stream stream = current_stream(device, kOp);
  py::gil_scoped_release release;
  mma_probe_run(av.data, bv.data, static_cast<float*>(ov.data), static_cast<int>(av.size(1)), av.dtype, stream);
}

}  // namespace

void bind_cuda_probe(py::module_& m) {
  m.def("mma_probe", &mma_probe, py::arg("a"), py::arg("b"), py::arg("out"),
        "out[16,8] = a[16,K] b[8,K]^T by one warp: cp.async, ldmatrix, mma.sync.");
  m.def("fragment_probe", &fragment_probe, py::arg("a"), py::arg("b"), py::arg("d"),
        "mma.sync alone: d[lane, register] += with operands a[32,4,2], b[32,2,2] as lanes and registers hold them.");
  m.def("matrix_probe", &matrix_probe, py::arg("x"), py::arg("out"), py::arg("transposed"),
        "ldmatrix alone: out[lane, register, 2] of x[32,8], of which lane l gives the address of row l.");
  m.def("sums_probe", &sums_probe, py::arg("x"), py::arg("out"),
        "out[l] = the sum over all lanes of x[lane, l / (32 / n)], x[32,n].");
}

}  // namespace fastdl
