// The direct kernels of a level and dtype: one instantiation for each instruction set.
#pragma once
#include "conv/cpu/kernel_args.h"
#include "conv/cpu/kernel_depthwise.h"
#include "conv/cpu/kernel_grouped.h"
#include "conv/cpu/kernel_slide.h"

namespace fastdl {
namespace {

template <class L, class T>
constexpr DirectOps direct_ops = {
    1,
    L::width,
    plane_outputs<L>(),
    copy_block<L, T>,
    copy_block<L, float>,
    copy_block<L, T>,
    run_strip<L>,
    StripSplit<L, T>::run,
    run_slide<L, SlideArgs>,
    SlideSplit<L, T, SlideArgs>::run,
    run_strip_grad<L>,
    run_slide<L, SlideGradArgs>,
    SlideSplit<L, T, SlideGradArgs>::run,
    run_plane<L>,
    run_plane_grad<L>,
};

template <class L, class T>
constexpr ConvFunctions direct_functions() {
  ConvFunctions f = {};
  f.direct = &direct_ops<L, T>;
  return f;
}

// See DirectOps::image.
template <class L, class Plain>
void copy_pairs(const void* source, i64 i_step, i64 j_step, i64 m, i64 n, float* dst, i64 row) {
  const bf16* const src = static_cast<const bf16*>(source);
  // Pairs that lie side by side are moved as the 32 bits that they are.
  if (i_step == 1 && j_step % 2 == 0) return copy_block<Plain, float>(source, 1, j_step / 2, m, n, dst, row);
  for (i64 i = 0; i < m; ++i) {
    const bf16 *const a = src + 2 * i * i_step, *const b = a + i_step;
    float* const d = dst + i * row;
    if (j_step == 1) {
      for (i64 j = 0; j < n; j += L::width) {
        const Lanes<Plain> lanes(n - j);
        lanes.store(d + j, L::pair(a + j, b + j, lanes.mask));
      }
    } else {
      for (i64 j = 0; j < n; ++j) {
        const bf16 two[2] = {a[j * j_step], b[j * j_step]};
        __builtin_memcpy(d + j, two, sizeof two);
      }
    }
  }
}

// Of a level L whose fma multiplies pairs; Plain: the one in which it is what it says.
template <class L, class Plain>
constexpr DirectOps direct_ops_pairs = {
    2,
    L::width,
    plane_outputs<L>(),
    copy_block<Plain, bf16>,
    copy_block<Plain, float>,
    copy_pairs<L, Plain>,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    run_plane<L>,
    nullptr,
};

template <class L, class Plain>
constexpr ConvFunctions direct_functions_pairs() {
  ConvFunctions f = {};
  f.direct = &direct_ops_pairs<L, Plain>;
  return f;
}

}  // namespace
}  // namespace fastdl
