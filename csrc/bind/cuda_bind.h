// One function a file of bindings of the CUDA modules.
#pragma once
#include <pybind11/pybind11.h>

namespace fastdl {

void bind_cuda_probe(pybind11::module_& m);
void bind_twin(pybind11::module_& m);  // of the host twin alone

}  // namespace fastdl
