// Names in messages and logs.
#pragma once
#include <string>

#include "base/types.h"

namespace fastdl {

const char* dtype_name(DType dtype);
const char* precision_name(Precision precision);
std::string dtype_name(DType dtype, Precision precision);  // and how float32 is multiplied, if not as ieee

}  // namespace fastdl
