"""Functional forms: the semantics, shapes and exceptions of their namesakes in torch."""

from fastdl.ops.attention import attention_varlen, scaled_dot_product_attention
from fastdl.ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from fastdl.ops.gemm import linear, matmul

__all__ = [
    "attention_varlen",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
    "matmul",
    "scaled_dot_product_attention",
]
