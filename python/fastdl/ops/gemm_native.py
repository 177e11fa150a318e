"""The GEMM operations on plain CPU tensors: allocate the output, call the kernel. float64 runs the reference.

"Plain" is `plain.is_plain`; these are both the CPU implementations of torch.ops.fastdl.* and what eager code calls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdl import _C
from fastdl.ops import reference, shapes
from fastdl.ops.plain import linear_shape, matmul_shape


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input[..., K] @ weight[N, K]^T + bias[N] -> [..., N]."""
    shape = linear_shape(input, weight, bias)
    if shape is None:  # float64, or something that does not fit
        shapes.linear(input, weight, bias)
        return reference.linear(input, weight, bias)
    out = input.new_empty(*shape)
    _C.linear(out, input, weight, bias)
    return out


def linear_packed(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    """Linear with a frozen weight: input [..., K], packed 1-D, bias [N] -> [..., N]."""
    out = input.new_empty(shapes.linear_packed(input, out_features, bias))
    _C.linear_packed(out, input, packed, bias, out_features, kernel)
    return out


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input[..., M, K] @ other[..., K, N] -> [..., M, N]; 1-D operands as in torch.matmul."""
    shape = matmul_shape(input, other)
    if shape is None:  # 1-D, float64, or something that does not fit
        return _matmul_uncommon(input, other)
    out = input.new_empty(*shape)
    _C.gemm(out, input, other)
    return out


def _matmul_uncommon(input: Tensor, other: Tensor) -> Tensor:
    shape = shapes.matmul(input, other)
    if input.dtype is torch.float64:
        return reference.matmul(input, other)
    a = input.unsqueeze(0) if input.ndim == 1 else input
    b = other.unsqueeze(1) if other.ndim == 1 else other
    out = input.new_empty(shapes.matmul(a, b))
    _C.gemm(out, a, b)
    return out.view(shape)


def linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    """Sum over all leading dimensions of grad[..., N]^T input[..., K] -> [N, K]."""
    shape = shapes.linear_wgrad(grad, input)
    if grad.dtype is torch.float64:
        return reference.linear_wgrad(grad, input)
    out = grad.new_empty(shape)
    for i, (g, x) in enumerate(_row_blocks(grad, input)):
        _C.gemm(out, g.t(), x, None, i > 0)
    return out


def _row_blocks(grad: Tensor, input: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of matrices that cover all rows, without copies: one pair where the leading dimensions of both collapse."""
    if grad.ndim == 2:
        yield grad, input
    elif grad.ndim == 1:
        yield grad.unsqueeze(0), input.unsqueeze(0)
    elif grad.is_contiguous() and input.is_contiguous():
        yield grad.flatten(0, -2), input.flatten(0, -2)
    else:
        for g, x in zip(grad, input, strict=True):
            yield from _row_blocks(g, x)


def sum_rows(x: Tensor) -> Tensor:
    """Sum of x[..., N] over all leading dimensions -> [N]."""
    shape = shapes.sum_rows(x)
    if x.dtype is torch.float64:
        return reference.sum_rows(x)
    out = x.new_empty(shape)
    _C.sum_rows(out, x)
    return out
