// Tensors of the CUDA modules: views with a device and its current stream. In the host twin the device is the CPU.
#pragma once
#include "bind/tensor.h"
#include "ptx/device.h"

namespace fastdl {

// A tensor on a GPU (the twin: on the CPU) of one of the kernels' dtypes. `device`: -1 takes any and is set, so that
// all arguments of a call are held to the first one's.
TensorView device_view(pybind11::handle object, int* device, const char* op, const char* argument);
TensorView device_view_or_bool(pybind11::handle object, int* device, const char* op, const char* argument,
                               bool* boolean);
// A contiguous tensor of bytes (torch.uint8).
struct DeviceBytes {
  void* data;
  i64 bytes;
};
DeviceBytes device_bytes(pybind11::handle object, int* device, const char* op, const char* argument);
// The memory of argument 'workspace', of at least so many bytes; None where none are needed.
void* workspace_memory(pybind11::handle object, i64 bytes, int* device, const char* op);
// A contiguous 1-D int32 tensor on the device.
struct DeviceIntegers {
  const std::int32_t* data;
  i64 size;
};
DeviceIntegers device_integers(pybind11::handle object, int* device, const char* op, const char* argument);

// torch's current stream there.
Stream current_stream(int device, const char* op);

}  // namespace fastdl
