// One function a file of bindings.
#pragma once
#include <pybind11/pybind11.h>

namespace fastdl {

void bind_machine(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_gemm_info(pybind11::module_& m);
void bind_plain(pybind11::module_& m);
void bind_attention(pybind11::module_& m);

}  // namespace fastdl
