// The direct kernels of a level and dtype: one instantiation for each instruction set.
#pragma once
#include "conv/cpu/kernel_args.h"
#include "conv/cpu/kernel_depthwise.h"
#include "conv/cpu/kernel_grouped.h"

namespace fastdl {
namespace {

template <class L, class T>
constexpr DirectOps direct_ops = {
    L::width,     plane_outputs<L>(), copy_block<L, T>, copy_block<L, float>,
    run_strip<L>, run_strip_grad<L>,  run_plane<L>,     run_plane_grad<L>,
};

template <class L, class T>
constexpr ConvFunctions direct_functions() {
  return {nullptr, nullptr, nullptr, &direct_ops<L, T>};
}

}  // namespace
}  // namespace fastdl
