#include "bind/tensor.h"

#include <algorithm>
#include <string>

#include "base/arena.h"
#include "base/check.h"

namespace py = pybind11;

namespace fastdl {
namespace {

const dlpack::ExchangeApi* g_api = nullptr;
PyTypeObject* g_tensor_type = nullptr;

std::string dtype_string(dlpack::DataType t) {
  const char* name = t.code == dlpack::kInt       ? "int"
                     : t.code == dlpack::kUInt    ? "uint"
                     : t.code == dlpack::kFloat   ? "float"
                     : t.code == dlpack::kBfloat  ? "bfloat"
                     : t.code == dlpack::kComplex ? "complex"
                     : t.code == dlpack::kBool    ? "bool"
                                                  : "type";
  return concat(name, static_cast<int>(t.bits));
}

bool to_dtype(dlpack::DataType t, DType* out) {
  if (t.lanes != 1) return false;
  if (t.code == dlpack::kFloat && t.bits == 32) return *out = DType::f32, true;
  if (t.code == dlpack::kBfloat && t.bits == 16) return *out = DType::bf16, true;
  if (t.code == dlpack::kFloat && t.bits == 16) return *out = DType::f16, true;
  return false;
}

// Elements from the first to one past the last, 0 for an empty tensor.
i64 extent(const TensorView& t) {
  i64 last = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return 0;
    last += (t.shape[i] - 1) * t.strides[i];
  }
  return last + 1;
}

dlpack::Tensor borrow(py::handle object, const char* op, const char* argument, const char* place = "cpu") {
  if (!PyObject_TypeCheck(object.ptr(), g_tensor_type))
    throw TypeMismatch(
        concat(op, ": argument '", argument, "': expected a torch.Tensor, got ", Py_TYPE(object.ptr())->tp_name));
  dlpack::Tensor t;
  if (g_api->tensor_from_object(object.ptr(), &t) != 0)
    fail(op, ": argument '", argument, "': expected a tensor with memory on ", place, ", got: ", take_error());
  return t;
}

}  // namespace

std::string take_error() {
  try {
    throw py::error_already_set();
  } catch (py::error_already_set& e) {
    return e.what();
  }
}

dlpack::Tensor borrowed_tensor(py::handle object, const char* op, const char* argument, const char* place) {
  dlpack::Tensor t = borrow(object, op, argument, place);
  if (t.data) t.data = static_cast<char*>(t.data) + t.byte_offset;
  return t;
}
bool kernel_dtype(dlpack::DataType t, DType* out) { return to_dtype(t, out); }
std::string dlpack_dtype_name(dlpack::DataType t) { return dtype_string(t); }
std::string dlpack_device_name(dlpack::Device d) {
  switch (d.type) {
    case dlpack::kCpu:
      return "cpu";
    case dlpack::kCuda:
      return concat("cuda:", d.id);
    case dlpack::kCudaHost:
      return "cpu, pinned";
    case dlpack::kMetal:
      return "mps";
    case dlpack::kRocm:
      return concat("rocm:", d.id);
    default:
      return concat("device type ", d.type);
  }
}
const dlpack::ExchangeApi& exchange_api() { return *g_api; }

i64 TensorView::numel() const {
  i64 n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

namespace {

// A CPU tensor with memory, of any dtype; `expected` completes "expected a ... tensor on cpu".
dlpack::Tensor raw_view(py::handle object, const char* op, const char* argument, const char* expected) {
  dlpack::Tensor t = borrow(object, op, argument);
  if (t.device.type != dlpack::kCpu && t.device.type != dlpack::kCudaHost)
    fail(op, ": argument '", argument, "': expected a ", expected, " tensor on cpu, got ", dtype_string(t.dtype),
         " on ", dlpack_device_name(t.device));
  const TensorView v = {static_cast<char*>(t.data) + t.byte_offset, DType::f32, t.ndim, t.shape, t.strides};
  if (!t.data && v.numel() > 0)  // fake tensors, freed storages: the exchange API passes them without an error
    fail(op, ": argument '", argument, "': expected a tensor with memory on cpu, got one without, shape ",
         shape_string(v));
  t.data = v.data;
  return t;
}

[[noreturn]] void fail_dtype(const dlpack::Tensor& t, const char* op, const char* argument, const char* expected) {
  fail(op, ": argument '", argument, "': expected a ", expected, " tensor on cpu, got ", dtype_string(t.dtype),
       " on cpu");
}

}  // namespace

TensorView view(py::handle object, const char* op, const char* argument) {
  constexpr const char* kExpected = "float32, bfloat16 or float16";
  const dlpack::Tensor t = raw_view(object, op, argument, kExpected);
  DType dtype = DType::f32;
  if (!to_dtype(t.dtype, &dtype)) fail_dtype(t, op, argument, kExpected);
  return {t.data, dtype, t.ndim, t.shape, t.strides};
}

TensorView view_or_bool(py::handle object, const char* op, const char* argument, bool* boolean) {
  constexpr const char* kExpected = "bool, float32, bfloat16 or float16";
  const dlpack::Tensor t = raw_view(object, op, argument, kExpected);
  DType dtype = DType::f32;
  *boolean = t.dtype.code == dlpack::kBool && t.dtype.bits == 8;
  if (!*boolean && !to_dtype(t.dtype, &dtype)) fail_dtype(t, op, argument, kExpected);
  return {t.data, dtype, t.ndim, t.shape, t.strides};
}

std::vector<i64> read_integers(py::handle object, const char* op, const char* argument) {
  constexpr const char* kExpected = "1-D contiguous int32 or int64";
  const dlpack::Tensor t = raw_view(object, op, argument, kExpected);
  if (t.dtype.code != dlpack::kInt || (t.dtype.bits != 32 && t.dtype.bits != 64))
    fail_dtype(t, op, argument, kExpected);
  const TensorView v = {t.data, DType::f32, t.ndim, t.shape, t.strides};
  if (t.ndim != 1 || (t.shape[0] > 1 && t.strides[0] != 1))
    fail(op, ": argument '", argument, "': expected a ", kExpected, " tensor, got shape ", shape_string(v));
  std::vector<i64> out(static_cast<std::size_t>(t.shape[0]));
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = t.dtype.bits == 32 ? static_cast<const std::int32_t*>(t.data)[i] : static_cast<const i64*>(t.data)[i];
  return out;
}

IndexView index_view(py::handle object, const char* op, const char* argument) {
  const dlpack::Tensor t = borrow(object, op, argument);
  const bool fits = t.device.type == dlpack::kCpu && t.dtype.code == dlpack::kInt && t.dtype.bits == 64 &&
                    t.dtype.lanes == 1 && t.ndim == 1 && (t.data || t.shape[0] == 0);
  if (!fits)
    fail(op, ": argument '", argument, "': expected a 1-D int64 tensor on cpu, got ", t.ndim, "-D ",
         dtype_string(t.dtype));
  return {reinterpret_cast<const i64*>(static_cast<const char*>(t.data) + t.byte_offset), t.shape[0], t.strides[0]};
}

DType dtype_named(const std::string& name, const char* op) {
  for (DType d : {DType::f32, DType::bf16, DType::f16})
    if (name == torch_name(d)) return d;
  if (!name.empty()) fail(op, ": argument 'dtype': no dtype '", name, "'");
  return DType::f32;
}

const char* torch_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

void require_dtype(const TensorView& t, DType dtype, const char* why, const char* op, const char* argument) {
  if (t.dtype != dtype)
    fail(op, ": argument '", argument, "': expected ", torch_name(dtype), ", ", why, ", got ", torch_name(t.dtype));
}

std::string shape_string(const TensorView& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + "]";
}

void require_writable(const TensorView& out, const char* op, const char* written) {
  constexpr int kMax = 64;
  std::pair<i64, i64> dims[kMax];  // (stride, size) of the dimensions that have more than one element
  int n = 0;
  for (int i = 0; i < out.ndim; ++i) {
    if (out.shape[i] == 0) return;
    if (out.shape[i] > 1 && n < kMax) dims[n++] = {out.strides[i], out.shape[i]};
  }
  std::sort(dims, dims + n);
  i64 inner = 1;  // elements spanned by the dimensions so far
  for (int i = 0; i < n; ++i) {
    if (dims[i].first < inner)
      fail(op, ": argument '", written, "': expected elements that do not share memory, got a stride of ",
           dims[i].first, " over a span of ", inner);
    inner = dims[i].first * (dims[i].second - 1) + inner;
  }
}

void require_alike(const TensorView& t, const TensorView& out, const char* op, const char* argument,
                   const char* written) {
  bool alike = t.ndim == out.ndim;
  const bool empty = out.numel() == 0;
  for (int i = 0; alike && i < t.ndim; ++i)
    alike = t.shape[i] == out.shape[i] && (empty || t.shape[i] == 1 || t.strides[i] == out.strides[i]);
  if (!alike)
    fail(op, ": argument '", argument, "': expected the shape and strides of ", written, ", got ", shape_string(t));
}

void require_apart(const TensorView& out, const TensorView& in, const char* op, const char* argument,
                   const char* written) {
  const auto end = [](const TensorView& t) {
    return static_cast<const char*>(t.data) + extent(t) * item_size(t.dtype);
  };
  if (extent(out) == 0 || extent(in) == 0 || end(out) <= in.data || end(in) <= out.data) return;
  fail(op, ": argument '", written, "': expected memory apart from the inputs, got an overlap with '", argument, "'");
}

void advise_huge_pages(const TensorView& out) { advise_huge_pages(out.data, extent(out) * item_size(out.dtype)); }

void init_tensors() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__"))
    throw py::import_error("fastdl needs torch >= 2.10: torch.Tensor has no __dlpack_c_exchange_api__");
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  g_api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!g_api) throw py::error_already_set();
  while (g_api->version.major != dlpack::kMajorVersion && g_api->previous) g_api = g_api->previous;
  if (g_api->version.major != dlpack::kMajorVersion || !g_api->tensor_from_object)
    throw py::import_error(concat("fastdl needs DLPack exchange API version ", dlpack::kMajorVersion,
                                  ".x, this torch has ", g_api->version.major, ".", g_api->version.minor));
  g_tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());  // kept for good
}

}  // namespace fastdl
