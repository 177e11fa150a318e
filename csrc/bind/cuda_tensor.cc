#include "bind/cuda_tensor.h"

#include "base/check.h"

namespace py = pybind11;

namespace fastdl {
namespace {

#if FASTDL_TWIN
constexpr const char* kPlace = "cpu (this is the host twin)";
bool on_device(const dlpack::Tensor& t) { return t.device.type == dlpack::kCpu; }
#else
constexpr const char* kPlace = "cuda";
bool on_device(const dlpack::Tensor& t) { return t.device.type == dlpack::kCuda; }
#endif

dlpack::Tensor borrow(py::handle object, int* device, const char* op, const char* argument, const char* expected) {
  const dlpack::Tensor t = borrowed_tensor(object, op, argument, kPlace);
  if (!on_device(t))
    fail(op, ": argument '", argument, "': expected a ", expected, " tensor on ", kPlace, ", got ",
         dlpack_dtype_name(t.dtype), " on ", dlpack_device_name(t.device));
  if (*device >= 0 && t.device.id != *device)
    fail(op, ": argument '", argument, "': expected a tensor on cuda:", *device, " as the others, got ",
         dlpack_device_name(t.device));
  *device = t.device.id;
  const TensorView v = {t.data, DType::f32, t.ndim, t.shape, t.strides};
  if (!t.data && v.numel() > 0)
    fail(op, ": argument '", argument, "': expected a tensor with memory, got one without, shape ", shape_string(v));
  return t;
}

[[noreturn]] void fail_dtype(const dlpack::Tensor& t, const char* op, const char* argument, const char* expected) {
  fail(op, ": argument '", argument, "': expected a ", expected, " tensor, got ", dlpack_dtype_name(t.dtype));
}

void require_flat(const dlpack::Tensor& t, const char* op, const char* argument, const char* expected) {
  if (t.ndim != 1 || (t.shape[0] > 1 && t.strides[0] != 1))
    fail(op, ": argument '", argument, "': expected a ", expected, " tensor, got ", t.ndim, " dimensions");
}

}  // namespace

TensorView device_view(py::handle object, int* device, const char* op, const char* argument) {
  constexpr const char* kExpected = "float32, bfloat16 or float16";
  const dlpack::Tensor t = borrow(object, device, op, argument, kExpected);
  DType dtype = DType::f32;
  if (!kernel_dtype(t.dtype, &dtype)) fail_dtype(t, op, argument, kExpected);
  return {t.data, dtype, t.ndim, t.shape, t.strides};
}

TensorView device_view_or_bool(py::handle object, int* device, const char* op, const char* argument, bool* boolean) {
  constexpr const char* kExpected = "bool, float32, bfloat16 or float16";
  const dlpack::Tensor t = borrow(object, device, op, argument, kExpected);
  DType dtype = DType::f32;
  *boolean = t.dtype.code == dlpack::kBool && t.dtype.bits == 8;
  if (!*boolean && !kernel_dtype(t.dtype, &dtype)) fail_dtype(t, op, argument, kExpected);
  return {t.data, dtype, t.ndim, t.shape, t.strides};
}

DeviceBytes device_bytes(py::handle object, int* device, const char* op, const char* argument) {
  constexpr const char* kExpected = "1-D contiguous uint8";
  const dlpack::Tensor t = borrow(object, device, op, argument, kExpected);
  if (t.dtype.code != dlpack::kUInt || t.dtype.bits != 8) fail_dtype(t, op, argument, kExpected);
  require_flat(t, op, argument, kExpected);
  return {t.data, t.shape[0]};
}

void* workspace_memory(py::handle object, i64 bytes, int* device, const char* op) {
  constexpr const char* kArgument = "workspace";
  constexpr std::uintptr_t kAlignment = 16;  // of the widest access to it
  if (object.is_none() && bytes > 0) fail(op, ": argument '", kArgument, "': expected ", bytes, " bytes, got None");
  if (object.is_none()) return nullptr;
  const DeviceBytes given = device_bytes(object, device, op, kArgument);
  if (given.bytes < bytes || (bytes > 0 && reinterpret_cast<std::uintptr_t>(given.data) % kAlignment != 0))
    fail(op, ": argument '", kArgument, "': expected ", bytes, " bytes, ", kAlignment, "-byte aligned, got ",
         given.bytes, " at ", given.data);
  return given.data;
}

DeviceIntegers device_integers(py::handle object, int* device, const char* op, const char* argument) {
  constexpr const char* kExpected = "1-D contiguous int32";
  const dlpack::Tensor t = borrow(object, device, op, argument, kExpected);
  if (t.dtype.code != dlpack::kInt || t.dtype.bits != 32) fail_dtype(t, op, argument, kExpected);
  require_flat(t, op, argument, kExpected);
  return {static_cast<const std::int32_t*>(t.data), t.shape[0]};
}

Stream current_stream(int device, const char* op) {
  Stream stream;
  stream.device = device;
#if FASTDL_TWIN
  (void)op;
#else
  const auto ask = exchange_api().current_stream;
  if (!ask) fail(op, ": this torch tells no current stream of cuda:", device);
  if (ask(dlpack::kCuda, device, &stream.handle) != 0)
    fail(op, ": no current stream of cuda:", device, ": ", take_error());
#endif
  return stream;
}

}  // namespace fastdl
