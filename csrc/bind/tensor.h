// torch.Tensor arguments as checked views. The only place that knows how tensors cross the border.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "base/sizes.h"
#include "bind/dlpack.h"

namespace fastdl {

// A CPU tensor of one of the kernels' dtypes, borrowed for the call. shape and strides belong to the tensor object.
struct TensorView {
  void* data;
  DType dtype;
  int ndim;
  const i64* shape;
  const i64* strides;

  i64 size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  i64 stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
  i64 numel() const;
};

// Throws TypeMismatch for non-tensors, Error for other dtypes and devices; both name `op` and `argument`.
TensorView view(pybind11::handle object, const char* op, const char* argument);
// As view, but bool tensors pass too: *boolean says so, and dtype means nothing then.
TensorView view_or_bool(pybind11::handle object, const char* op, const char* argument, bool* boolean);
// The elements of a contiguous 1-D int32 or int64 tensor.
std::vector<i64> read_integers(pybind11::handle object, const char* op, const char* argument);
std::string shape_string(const TensorView& t);
// Throws Error unless t is of this dtype; `why` completes "expected float32, ...".
void require_dtype(const TensorView& t, DType dtype, const char* why, const char* op, const char* argument);
const char* torch_name(DType dtype);
DType dtype_named(const std::string& name, const char* op);  // argument 'dtype'; "" is float32

// A 1-D int64 CPU tensor, borrowed for the call.
struct IndexView {
  const i64* data;
  i64 size, stride;
};
IndexView index_view(pybind11::handle object, const char* op, const char* argument);
// Throws Error unless writing `out`, the argument named `written`, touches each of its elements once.
void require_writable(const TensorView& out, const char* op, const char* written = "out");
// Throws Error when the memory ranges of `out`, an argument named `written`, and of `in`, named `argument`, meet.
void require_apart(const TensorView& out, const TensorView& in, const char* op, const char* argument,
                   const char* written = "out");
// Throws Error unless t lies in memory exactly as `out` does, the argument named `written`.
void require_alike(const TensorView& t, const TensorView& out, const char* op, const char* argument,
                   const char* written = "out");
// Asks for huge pages where `out` is large enough to be a mapping of its own: see base/arena.h.
void advise_huge_pages(const TensorView& out);

// Any tensor with memory, as the exchange API shows it; data includes the byte offset. `place` is where the message
// says that it was expected.
dlpack::Tensor borrowed_tensor(pybind11::handle object, const char* op, const char* argument, const char* place);
bool kernel_dtype(dlpack::DataType t, DType* out);  // false for dtypes that no kernel takes
std::string dlpack_dtype_name(dlpack::DataType t);
std::string dlpack_device_name(dlpack::Device d);
std::string take_error();  // the text of the pending Python error, which is cleared
const dlpack::ExchangeApi& exchange_api();

// Reads the exchange API off torch.Tensor; throws ImportError when torch is too old or too new for it.
void init_tensors();

}  // namespace fastdl
