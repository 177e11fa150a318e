"""torch.ops.fastdl.*: schemas, CPU implementations, fakes, vmap rules and FLOP counts of the GEMM operations.

No autograd here: the autograd.Function stands outside the operation (`ops/gemm.py`), at about half the cost of a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import cuda_gemm, gemm_native, reference, shapes
from fastdl.ops.library import register

_ops = torch.ops.fastdl


# --- fakes: shapes without arithmetic -----------------------------------------------------------------------------
def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    return input.new_empty(shapes.linear(input, weight, bias))


def _fake_linear_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    save_pre: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = shapes.linear_fused(input, weight, bias, residual)
    return input.new_empty(shape), input.new_empty(shape if save_pre else (0,))


def _fake_activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    return pre.new_empty(pre.shape)


def _fake_matmul(input: Tensor, other: Tensor) -> Tensor:
    return input.new_empty(shapes.matmul(input, other))


def _fake_linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    return grad.new_empty(shapes.linear_wgrad(grad, input))


def _fake_sum_rows(x: Tensor) -> Tensor:
    return x.new_empty(shapes.sum_rows(x))


# --- vmap: the mapped dimension B becomes a leading dimension of the same operation, or of a batched matmul -------
def _front(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.movedim(dim, 0)


def _rows(x: Tensor, dim: int | None) -> Tensor:
    """[..., K] -> [R, K], mapped [B, ..., K] -> [B, R, K]."""
    x = _front(x, dim)
    kept = 0 if dim is None else 1
    return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:-1]), x.shape[-1])


def _add_mapped_bias(out: Tensor, bias: Tensor, dim: int, leading: int) -> Tensor:
    """out [(B,) ..., N] with `leading` unmapped leading dimensions + bias [B, N] -> [B, ..., N]."""
    bias = _front(bias, dim)
    return out + bias.reshape(bias.shape[0], *[1] * leading, bias.shape[1])


def _vmap_linear(
    info: Any,
    dims: Sequence[int | None],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None = None,
) -> tuple[Tensor, int]:
    input_dim, weight_dim, bias_dim = dims[:3]
    packed = packed if all(dim is None for dim in dims[3:]) else None  # a mapped pack: the weight serves
    x = _front(input, input_dim)
    leading = x.shape[0 if input_dim is None else 1 : -1]
    common_bias = bias if bias_dim is None else None
    if weight_dim is None:
        out = _ops.linear(x, weight, common_bias, packed)
    else:
        out = _ops.matmul(_rows(input, input_dim), _front(weight, weight_dim).mT)
        out = out.reshape(info.batch_size, *leading, out.shape[-1])
        out = out if common_bias is None else out + common_bias
    return out if bias_dim is None else _add_mapped_bias(out, bias, bias_dim, len(leading)), 0


def _vmap_linear_fused(
    info: Any,
    dims: Sequence[int | None],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    save_pre: bool,
    packed: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    if all(dim is None for dim in dims[:3]):
        z = _ops.linear(input, weight, bias)[None]
    else:
        z, _ = _vmap_linear(info, dims[:3], input, weight, bias)
    z = z.expand(info.batch_size, *z.shape[1:])
    out = reference.epilogue(z, None if residual is None else _front(residual, dims[3]), activation)
    out = out.clone() if out is z else out
    return (out, z.clone() if save_pre else z.new_empty(0)), (0, 0 if save_pre else None)


def _vmap_activation_grad(
    info: Any, dims: Sequence[int | None], grad: Tensor, pre: Tensor, activation: str
) -> tuple[Tensor, int]:
    return _ops.activation_grad(*torch.broadcast_tensors(_front(grad, dims[0]), _front(pre, dims[1])), activation), 0


def _vmap_matmul(info: Any, dims: Sequence[int | None], input: Tensor, other: Tensor) -> tuple[Tensor, int]:
    a, b = _front(input, dims[0]), _front(other, dims[1])
    row, column = a.ndim == (1 if dims[0] is None else 2), b.ndim == (1 if dims[1] is None else 2)
    a = a.unsqueeze(-2) if row else a
    b = b.unsqueeze(-1) if column else b
    rank = max(x.ndim - (dim is not None) for x, dim in ((a, dims[0]), (b, dims[1])))
    for _ in range(rank - (a.ndim - 1) if dims[0] is not None else 0):
        a = a.unsqueeze(1)
    for _ in range(rank - (b.ndim - 1) if dims[1] is not None else 0):
        b = b.unsqueeze(1)
    out = _ops.matmul(a, b)
    out = out.squeeze(-1) if column else out
    return out.squeeze(-1 if column else -2) if row else out, 0


def _vmap_linear_wgrad(info: Any, dims: Sequence[int | None], grad: Tensor, input: Tensor) -> tuple[Tensor, int]:
    return _ops.matmul(_rows(grad, dims[0]).mT, _rows(input, dims[1])), 0


def _vmap_sum_rows(info: Any, dims: Sequence[int | None], x: Tensor) -> tuple[Tensor, int]:
    return _rows(x, dims[0]).sum(1), 0


# --- FLOPs, for torch.utils.flop_counter: a multiply and an add for each product -----------------------------------
def _flops_linear(input: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(input) * weight[0]


def _flops_matmul(
    input: Sequence[int], other: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any
) -> int:
    return 2 * math.prod(out_shape) * input[-1]


def _flops_linear_wgrad(grad: Sequence[int], input: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * input[-1]


# --- the table ----------------------------------------------------------------------------------------------------
for _row in (
    (
        "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? packed=None) -> Tensor",
        gemm_native.linear,
        _fake_linear,
        _vmap_linear,
        _flops_linear,
        cuda_gemm.linear,
    ),
    (
        "linear_fused(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str? activation, bool save_pre, "
        "Tensor? packed=None) -> (Tensor, Tensor)",
        gemm_native.linear_fused,
        _fake_linear_fused,
        _vmap_linear_fused,
        _flops_linear,
        cuda_gemm.linear_fused,
    ),
    (
        "activation_grad(Tensor grad, Tensor pre, str activation) -> Tensor",
        gemm_native.activation_grad,
        _fake_activation_grad,
        _vmap_activation_grad,
        None,
        cuda_gemm.activation_grad,
    ),
    (
        "matmul(Tensor input, Tensor other) -> Tensor",
        gemm_native.matmul,
        _fake_matmul,
        _vmap_matmul,
        _flops_matmul,
        cuda_gemm.matmul,
    ),
    (
        "linear_wgrad(Tensor grad, Tensor input) -> Tensor",
        gemm_native.linear_wgrad,
        _fake_linear_wgrad,
        _vmap_linear_wgrad,
        _flops_linear_wgrad,
        cuda_gemm.linear_wgrad,
    ),
    (
        "sum_rows(Tensor x) -> Tensor",
        gemm_native.sum_rows,
        _fake_sum_rows,
        _vmap_sum_rows,
        None,
        cuda_gemm.sum_rows,
    ),
):
    register(*_row[:-1], cuda=_row[-1])
