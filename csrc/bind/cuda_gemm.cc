// GEMM of the CUDA modules.
#include <pybind11/pybind11.h>

#include <string>

#include "base/check.h"
#include "bind/cuda_bind.h"
#include "bind/cuda_tensor.h"
#include "gemm/cuda/tile_probe.h"

namespace py = pybind11;

namespace fastdl {
namespace {

Precision precision_named(const std::string& name, const char* op) {
  if (name == "fma") return Precision::fma;
  if (name == "ieee") return Precision::ieee;
  if (name == "tf32") return Precision::tf32;
  if (name == "bf16") return Precision::bf16;
  fail(op, ": argument 'precision': expected fma, ieee, tf32 or bf16, got '", name, "'");
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
  m.def("tile_probe", &tile_probe, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("a_transposed"),
        py::arg("b_transposed"), py::arg("precision"),
        "out[16,32] = a b by one warp, and the largest magnitudes of the rows of a and the columns of b.");
}

}  // namespace fastdl
