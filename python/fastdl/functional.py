"""Functional forms: the semantics, shapes and exceptions of their namesakes in torch."""

from fastdl.ops.gemm import linear, matmul

__all__ = ["linear", "matmul"]
