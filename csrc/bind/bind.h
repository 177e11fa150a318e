// One function a file of bindings.
#pragma once
#include <pybind11/pybind11.h>

#include "base/types.h"

namespace fastdl {

void bind_machine(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_gemm_info(pybind11::module_& m);
void bind_plain(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_rnn(pybind11::module_& m);
void bind_conv(pybind11::module_& m);

// Rows of the kernel tables as Python sees them.
pybind11::dict kernel_row(const char* name, Isa isa, DType dtype);  // name, isa, dtype, available, reason
pybind11::list rnn_kernel_rows();
pybind11::list conv_kernel_rows();

}  // namespace fastdl
