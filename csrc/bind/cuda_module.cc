// The CUDA kernels as a module of their own: `_cuda`, and from the same sources `_twin`, their host twin.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <map>
#include <string>

#include "base/check.h"
#include "bind/cuda_bind.h"
#include "bind/tensor.h"
#include "ptx/device.h"
#if FASTDL_TWIN
#include "ptx/twin/fiber.h"
#endif

#ifndef FASTDL_NVCC  // the host twin
#define FASTDL_NVCC ""
#define FASTDL_CUDA_CODE ""
#endif

namespace py = pybind11;

namespace fastdl {
namespace {

py::dict gpu_dict(const Gpu& gpu) {
  using namespace py::literals;
  return py::dict("sm"_a = gpu.sm, "multiprocessors"_a = gpu.multiprocessors, "shared_bytes"_a = gpu.shared_bytes,
                  "l2_bytes"_a = gpu.l2_bytes);
}

std::map<std::string, py::list (*)()>& kernel_rows() {
  static std::map<std::string, py::list (*)()> rows;
  return rows;
}

py::list kernels(const std::string& op) {
  std::string names;
  for (const auto& [name, rows] : kernel_rows()) {
    if (name == op) return rows();
    names += (names.empty() ? "" : ", ") + name;
  }
  fail("kernels: argument 'op': expected one of ", names, "; got '", op, "'");
}

}  // namespace

void add_kernel_rows(const char* op, py::list (*rows)()) { kernel_rows()[op] = rows; }

}  // namespace fastdl

PYBIND11_MODULE(FASTDL_CUDA_MODULE, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of fastdl.";
  m.attr("__version__") = FASTDL_VERSION;
  m.attr("twin") = FASTDL_TWIN == 1;
  m.attr("nvcc") = FASTDL_NVCC;
  m.attr("architectures") = FASTDL_TWIN ? "the host" : FASTDL_CUDA_CODE ", PTX for newer GPUs";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const fastdl::TypeMismatch& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const fastdl::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  });
  fastdl::init_tensors();
  m.def("gpu_count", &fastdl::gpu_count, "GPUs that can be used; 0 without a driver.");
  m.def("gpu_info", [](int device) { return fastdl::gpu_dict(fastdl::gpu_info(device)); }, py::arg("device"));
  m.def(
      "gpu_named", [](const std::string& name) { return fastdl::gpu_dict(fastdl::gpu_named(name)); }, py::arg("name"));
  m.def("gpu_name", &fastdl::gpu_name, py::arg("device"));
#if FASTDL_TWIN
  fastdl::bind_twin(m);
#endif
  m.def("kernels", &fastdl::kernels, py::arg("op"), "The rows of an operation's kernel table.");
  fastdl::bind_cuda_probe(m);
  fastdl::bind_cuda_gemm(m);
  fastdl::bind_cuda_attention(m);
  fastdl::bind_cuda_conv(m);
  fastdl::bind_cuda_rnn(m);
}
