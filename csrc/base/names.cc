#include "base/names.h"

namespace fastdl {

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"f32", "bf16", "f16"};
  return kNames[static_cast<int>(dtype)];
}

const char* precision_name(Precision precision) {
  constexpr const char* kNames[] = {"fma", "ieee", "tf32", "bf16"};
  return kNames[static_cast<int>(precision)];
}

std::string dtype_name(DType dtype, Precision precision) {
  const bool usual = dtype != DType::f32 || precision == Precision::ieee;
  return std::string(dtype_name(dtype)) + (usual ? "" : " ") + (usual ? "" : precision_name(precision));
}

}  // namespace fastdl
