#include "attention/cpu/kernel_amx.h"

namespace fastdl::amx {

extern const AttentionOps attention_bf16, attention_f16, attention_f32_medium, attention_f32_high, attention_f32_split;
const AttentionOps attention_bf16 = attention_part_ops<bf16, 1>();
const AttentionOps attention_f16 = attention_part_ops<f16, 2>();
const AttentionOps attention_f32_medium = attention_part_ops<float, 1>();
const AttentionOps attention_f32_high = attention_part_ops<float, 2>();
const AttentionOps attention_f32_split = attention_part_ops<float, 3>();

extern const AttentionGradOps attention_grad_bf16, attention_grad_f16, attention_grad_f32_medium,
    attention_grad_f32_high, attention_grad_f32_split;
const AttentionGradOps attention_grad_bf16 = attention_part_grads<bf16, 1>();
const AttentionGradOps attention_grad_f16 = attention_part_grads<f16, 2>();
const AttentionGradOps attention_grad_f32_medium = attention_part_grads<float, 1>();
const AttentionGradOps attention_grad_f32_high = attention_part_grads<float, 2>();
const AttentionGradOps attention_grad_f32_split = attention_part_grads<float, 3>();

}  // namespace fastdl::amx
