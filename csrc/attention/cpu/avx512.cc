#include "attention/cpu/kernel.h"
#include "attention/cpu/kernel_backward.h"
#include "simd/vec_avx512.h"

namespace fastdl::avx512 {

using L = VecAvx512;

extern const AttentionOps attention_f32, attention_bf16, attention_f16;
const AttentionOps attention_f32 = attention_ops<L, FloatRows<L>, float, 4, 4>();
const AttentionOps attention_bf16 = attention_ops<L, FloatRows<L>, bf16, 4, 4>();
const AttentionOps attention_f16 = attention_ops<L, FloatRows<L>, f16, 4, 4>();

extern const AttentionGradOps attention_grad_f32, attention_grad_bf16, attention_grad_f16;
const AttentionGradOps attention_grad_f32 = attention_grad_ops<L, FloatGrads<L>, float>();
const AttentionGradOps attention_grad_bf16 = attention_grad_ops<L, FloatGrads<L>, bf16>();
const AttentionGradOps attention_grad_f16 = attention_grad_ops<L, FloatGrads<L>, f16>();

}  // namespace fastdl::avx512
