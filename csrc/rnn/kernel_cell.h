// The cells that kernels know, on the CPU and on GPUs.
#pragma once
#include "base/types.h"

namespace fastdl {

enum class RnnCell : std::uint8_t { lstm, gru, plain };
constexpr int kGates[] = {4, 3, 1};  // by RnnCell

}  // namespace fastdl
