// One function a file of bindings of the CUDA modules.
#pragma once
#include <pybind11/pybind11.h>

namespace fastdl {

// What kernels(op) lists: each binding names its operation's.
void add_kernel_rows(const char* op, pybind11::list (*rows)());

void bind_cuda_probe(pybind11::module_& m);
void bind_cuda_gemm(pybind11::module_& m);
void bind_cuda_attention(pybind11::module_& m);
void bind_cuda_conv(pybind11::module_& m);
void bind_cuda_rnn(pybind11::module_& m);
void bind_twin(pybind11::module_& m);  // of the host twin alone

}  // namespace fastdl
