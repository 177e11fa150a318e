#include "attention/cpu/kernel.h"
#include "simd/vec_avx2.h"

namespace fastdl::avx2 {

using L = VecAvx2;

extern const AttentionOps attention_f32, attention_bf16, attention_f16;
const AttentionOps attention_f32 = attention_ops<L, FloatRows<L>, float>();
const AttentionOps attention_bf16 = attention_ops<L, FloatRows<L>, bf16>();
const AttentionOps attention_f16 = attention_ops<L, FloatRows<L>, f16>();

}  // namespace fastdl::avx2
