// The activations that operations can apply to their result.
#pragma once
#include <cstdint>

namespace fastdl {

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu };

}  // namespace fastdl
