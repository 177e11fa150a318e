// What the schedules of the CPU and of GPUs share.
#pragma once
#include "attention/attention.h"

namespace fastdl {

// Where nothing but a positive scale comes between product and exp, the scale waits until exp is taken.
inline bool plain(const AttentionDesc& d) {
  return d.mask == MaskKind::none && !(d.softcap > 0) && d.scale > 1e-30f && d.scale < 1e30f;
}

inline float dropout_factor(const AttentionDesc& d) {
  return d.dropout_p < 1 ? static_cast<float>(1 / (1 - d.dropout_p)) : 0.0f;
}

}  // namespace fastdl
