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
}

}  // namespace fastdl
