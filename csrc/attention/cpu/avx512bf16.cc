#include "attention/cpu/kernel_backward.h"
#include "attention/cpu/kernel_pairs.h"
#include "simd/vec_avx512bf16.h"

namespace fastdl::avx512bf16 {

extern const AttentionOps attention_bf16;
const AttentionOps attention_bf16 = attention_pair_ops<VecAvx512Bf16, VecAvx512Narrow>();

extern const AttentionGradOps attention_grad_bf16;
const AttentionGradOps attention_grad_bf16 = attention_grad_ops<VecAvx512Narrow, PairGrads<VecAvx512Narrow>, bf16>();

}  // namespace fastdl::avx512bf16
