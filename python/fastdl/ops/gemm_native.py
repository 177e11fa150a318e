"""The GEMM operations on plain CPU tensors: allocate the output, call the kernel. float64 runs the reference.

"Plain" is `plain.is_plain`. These are the CPU implementations of torch.ops.fastdl.*, and what eager code calls; the
native functions check their arguments and refuse every other dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import _C
from fastdl.ops import reference, shapes


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    """input[..., K] @ weight[N, K]^T + bias[N] -> [..., N]; packed: the weight's frozen pack."""
    if input.dtype is torch.float64:
        return reference.linear(input, weight, bias)
    out = _C.linear_result(input, weight, bias, packed)
    if out is None:  # these raise, and say why
        out = input.new_empty(shapes.linear(input, weight, bias))
        _C.linear(out, input, weight, bias)
    return out


def linear_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    save_pre: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(activation(z) + residual, z) with z = linear(input, weight, bias); an empty tensor for z unless `save_pre`.

    packed: the weight's frozen pack.
    """
    shape = shapes.linear_fused(input, weight, bias, residual)
    pre = input.new_empty(shape if save_pre else (0,))
    if input.dtype is torch.float64:
        z = reference.linear(input, weight, bias)
        return reference.epilogue(z, residual, activation), pre.copy_(z) if save_pre else pre
    out = input.new_empty(shape)
    residual = residual if residual is None else residual.contiguous()
    _C.linear_fused(out, input, weight, bias, activation or "none", residual, pre if save_pre else None, packed)
    return out, pre


def activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """grad * activation'(pre), elementwise; of one shape."""
    if grad.dtype is torch.float64:
        return reference.activation_grad(grad.contiguous(), pre.contiguous(), activation)
    out = pre.new_empty(pre.shape)
    if out.numel():
        _C.activation_grad(out, grad.contiguous(), pre.contiguous(), activation)
    return out


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input[..., M, K] @ other[..., K, N] -> [..., M, N]; 1-D operands as in torch.matmul."""
    if input.dtype is torch.float64:
        return reference.matmul(input, other)
    if input.ndim == 1 or other.ndim == 1:
        a = input.unsqueeze(0) if input.ndim == 1 else input
        b = other.unsqueeze(1) if other.ndim == 1 else other
        return matmul(a, b).view(shapes.matmul(input, other))
    out = _C.matmul_result(input, other)
    if out is None:
        out = input.new_empty(shapes.matmul(input, other))
        _C.gemm(out, input, other)
    return out


def linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    """Sum over all leading dimensions of grad[..., N]^T input[..., K] -> [N, K]."""
    if grad.dtype is torch.float64:
        return reference.linear_wgrad(grad, input)
    out = grad.new_empty(grad.shape[-1], input.shape[-1])
    _C.linear_wgrad(out, grad, input)
    return out


def sum_rows(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum of x[..., N] over all leading dimensions -> [N], into `out` where given."""
    if x.dtype is torch.float64:
        return reference.sum_rows(x)
    if out is None:
        out = x.new_empty(x.shape[-1])
    _C.sum_rows(out, x)
    return out
