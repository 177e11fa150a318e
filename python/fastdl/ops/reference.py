"""The operations as plain torch compositions: what float64 runs, and what is run where a gradient is left to torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input[..., K] @ weight[N, K]^T + bias[N] -> [..., N]."""
    return F.linear(input, weight, bias)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input[..., M, K] @ other[..., K, N] -> [..., M, N]; 1-D operands as in torch.matmul."""
    return torch.matmul(input, other)


def linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    """Sum over all leading dimensions of grad[..., N]^T input[..., K] -> [N, K]: the weight gradient of linear."""
    return _rows(grad).mT @ _rows(input)


def sum_rows(x: Tensor) -> Tensor:
    """Sum of x[..., N] over all leading dimensions -> [N]: the bias gradient of linear."""
    return _rows(x).sum(0)


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one; spelled out, since reshape(-1, 0) is refused."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
