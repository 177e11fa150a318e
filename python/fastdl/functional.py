"""Functional forms: the semantics, shapes and exceptions of their namesakes in torch."""

from fastdl.ops.attention import attention_varlen, scaled_dot_product_attention
from fastdl.ops.gemm import linear, matmul

__all__ = ["attention_varlen", "linear", "matmul", "scaled_dot_product_attention"]
