"""The operations as plain torch compositions: what float64 runs, and what is run where a gradient is left to torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input[..., K] @ weight[N, K]^T + bias[N] -> [..., N]."""
    return F.linear(input, weight, bias)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input[..., M, K] @ other[..., K, N] -> [..., M, N]; 1-D operands as in torch.matmul."""
    return torch.matmul(input, other)


def _silu_grad(grad: Tensor, z: Tensor) -> Tensor:
    """Spelled out: torch has no derivative of its own silu_backward."""
    s = torch.sigmoid(z)
    return grad * (s * (1 + z * (1 - s)))


_aten = torch.ops.aten
# name -> the function, and its derivative as grad, z -> grad * f'(z); torch can differentiate both again.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
    ),
    "silu": (F.silu, _silu_grad),
}


def linear_fused(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    """activation(linear(input, weight, bias)) + residual."""
    return epilogue(linear(input, weight, bias), residual, activation)


def epilogue(z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(z) + residual."""
    out = z if activation is None else ACTIVATIONS[activation][0](z)
    return out if residual is None else out + residual


def activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """grad * activation'(pre), elementwise."""
    return ACTIVATIONS[activation][1](grad, pre)


def linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    """Sum over all leading dimensions of grad[..., N]^T input[..., K] -> [N, K]: the weight gradient of linear."""
    return _rows(grad).mT @ _rows(input)


def sum_rows(x: Tensor) -> Tensor:
    """Sum of x[..., N] over all leading dimensions -> [N]: the bias gradient of linear."""
    return _rows(x).sum(0)


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one; spelled out, since reshape(-1, 0) is refused."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
