#include <exception>

#include "base/check.h"
#include "bind/bind.h"
#include "bind/tensor.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of fastdl.";
  m.attr("__version__") = FASTDL_VERSION;
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
  fastdl::bind_machine(m);
  fastdl::bind_gemm(m);
  fastdl::bind_gemm_info(m);
  fastdl::bind_plain(m);
  fastdl::bind_attention(m);
  fastdl::bind_rnn(m);
  fastdl::bind_conv(m);
}
