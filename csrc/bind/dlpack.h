// The part of the DLPack 1.x C ABI that fastdl uses: viewing a Python tensor as a DLTensor through the exchange API
// (a capsule named "dlpack_exchange_api" on torch.Tensor). Layouts follow the DLPack specification.
#pragma once
#include <cstdint>

namespace fastdl::dlpack {

constexpr std::uint32_t kMajorVersion = 1;

struct Version {
  std::uint32_t major, minor;
};
enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kMetal = 8, kRocm = 10 };
struct Device {
  std::int32_t type, id;
};
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {  // borrowed: shape and strides point into the owner
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // an older major version, or null
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python error set
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace fastdl::dlpack
