// One function a file of bindings.
#pragma once
#include <pybind11/pybind11.h>

#include "base/cpu_info.h"
#include "base/table.h"

namespace fastdl {

void bind_machine(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_gemm_info(pybind11::module_& m);
void bind_plain(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_rnn(pybind11::module_& m);
void bind_conv(pybind11::module_& m);

// The row that a caller forces, null for "": forced_row, of a level that is in use here.
template <class Row>
const Row* usable_row(const std::vector<Row>& table, const std::string& name, const char* op) {
  const Row* const row = forced_row(table, name, op);
  if (row && row->isa > cpu_info().isa)
    fail(op, ": argument 'kernel': expected a level of at most ", isa_name(cpu_info().isa), ", the one in use, got '",
         name, "'");
  return row;
}

// This machine, for plans that are asked about: of the level named, "" for its own.
Machine machine_named(const std::string& isa, int threads, const char* op);

// Rows of the kernel tables as Python sees them.
pybind11::dict kernel_row(const char* name, Isa isa, DType dtype);  // name, isa, dtype, available, reason
pybind11::list rnn_kernel_rows();
pybind11::list conv_kernel_rows();

}  // namespace fastdl
