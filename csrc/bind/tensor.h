// torch.Tensor arguments as checked views. The only place that knows how tensors cross the border.
#pragma once
#include <pybind11/pybind11.h>

#include "base/types.h"
#include "bind/dlpack.h"

namespace fastdl {

// A float32 CPU tensor, borrowed for the call. shape and strides belong to the tensor object.
struct TensorView {
  float* data;
  int ndim;
  const i64* shape;
  const i64* strides;

  i64 size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  i64 stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
  i64 numel() const;
};

// Throws TypeMismatch for non-tensors, Error for other dtypes and devices; both name `op` and `argument`.
TensorView view(pybind11::handle object, const char* op, const char* argument);
std::string shape_string(const TensorView& t);
// Throws Error unless writing `out` touches each of its elements once.
void require_writable(const TensorView& out, const char* op);
// Throws Error when the memory ranges of the two meet.
void require_apart(const TensorView& out, const TensorView& in, const char* op, const char* argument);

// Reads the exchange API off torch.Tensor; throws ImportError when torch is too old or too new for it.
void init_tensors();

}  // namespace fastdl
