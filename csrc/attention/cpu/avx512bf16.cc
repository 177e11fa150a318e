#include "attention/cpu/kernel.h"
#include "attention/cpu/kernel_backward.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

using L = VecAvx512Narrow;

extern const AttentionOps attention_bf16;
const AttentionOps attention_bf16 = attention_ops<L, PairRows<L>, bf16, 4, 4>();

extern const AttentionGradOps attention_grad_bf16;
const AttentionGradOps attention_grad_bf16 = attention_grad_ops<L, PairGrads<L>, bf16>();

}  // namespace fastdl::avx512bf16
