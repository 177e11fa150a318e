"""The GEMM operations on CUDA tensors, and on CPU tensors under the host twin: outputs, workspace, the kernel.

The CUDA implementations of torch.ops.fastdl.*, with the signatures of `gemm_native`. float64 runs the reference.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastdl.ops import cuda, reference, shapes


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    """input[..., K] @ weight[N, K]^T + bias[N] -> [..., N]; a pack, which is of the CPU's kernels, is not read."""
    if input.dtype is torch.float64:
        return reference.linear(input, weight, bias)
    out = input.new_empty(shapes.linear(input, weight, bias))
    _gemm("linear", *_linear_operands(input, weight, out), bias=bias)
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
    """(activation(z) + residual, z) with z = linear(input, weight, bias); an empty tensor for z unless `save_pre`."""
    shape = shapes.linear_fused(input, weight, bias, residual)
    pre = input.new_empty(shape if save_pre else (0,))
    if input.dtype is torch.float64:
        z = reference.linear(input, weight, bias)
        return reference.epilogue(z, residual, activation), pre.copy_(z) if save_pre else pre
    out = input.new_empty(shape)
    a, b, c = _linear_operands(input, weight, out)
    _gemm(
        "linear",
        a,
        b,
        c,
        bias=bias,
        residual=None if residual is None else residual.contiguous().view(c.shape),
        pre=pre.view(c.shape) if save_pre else None,
        activation=activation or "none",
    )
    return out, pre


def activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """grad * activation'(pre), elementwise; of one shape."""
    if grad.dtype is torch.float64:
        return reference.activation_grad(grad.contiguous(), pre.contiguous(), activation)
    out = pre.new_empty(pre.shape)
    if out.numel():
        cuda.require("activation_grad", pre).activation_grad(grad.contiguous(), pre.contiguous(), out, activation)
    return out


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input[..., M, K] @ other[..., K, N] -> [..., M, N]; 1-D operands as in torch.matmul."""
    if input.dtype is torch.float64:
        return reference.matmul(input, other)
    a, b = _matrices(input, other)
    shape = shapes.matmul(a, b)
    out = input.new_empty(shape)
    if b.ndim == 2 and (rows := _as_rows(a)) is not None:  # one b for the whole batch
        _gemm("matmul", rows, b, out.view(math.prod(shape[:-1]), shape[-1]))
    else:
        _gemm("matmul", *_broadcast(a, b, out), out)
    return out.view(shapes.matmul(input, other))


def linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    """Sum over all leading dimensions of grad[..., N]^T input[..., K] -> [N, K]; rows in no one stride are copied."""
    if grad.dtype is torch.float64:
        return reference.linear_wgrad(grad, input)
    out = grad.new_empty(shapes.linear_wgrad(grad, input))
    _gemm("linear_wgrad", _rows(grad).mT, _rows(input), out)
    return out


def sum_rows(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum of x[..., N] over all leading dimensions -> [N], into `out` where given."""
    if x.dtype is torch.float64:
        return reference.sum_rows(x)
    if out is None:
        out = x.new_empty(shapes.sum_rows(x))
    if x.numel():
        cuda.require("sum_rows", x).sum_rows(x, out)
        return out
    return out.zero_()


# --- what `explain` asks -------------------------------------------------------------------------------------------
def linear_plan(out: Tensor, input: Tensor, weight: Tensor) -> str:
    """The kernel that linear runs for these."""
    return _kernel("linear", *_linear_operands(input, weight, out))


def matmul_plan(out: Tensor, input: Tensor, other: Tensor) -> str:
    """The kernel that matmul runs for these."""
    a, b = _matrices(input, other)
    out = out.view(shapes.matmul(a, b))
    return _kernel("matmul", *_broadcast(a, b, out), out)


def _kernel(op: str, a: Tensor, b: Tensor, out: Tensor) -> str:
    if out.numel() == 0 or a.shape[-1] == 0:
        return "none: empty"
    return cuda.require(op, out).gemm_plan(a, b, out, precision=cuda.precision("matmul"))["kernel"]


# --- one call ------------------------------------------------------------------------------------------------------
def _gemm(
    op: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    activation: str = "none",
) -> None:
    """out[..., M, N] = activation(z) + residual, pre = z, z = a[..., M, K] @ b[..., K, N] + bias[N]."""
    native = cuda.require(op, out)
    if out.numel() == 0:
        return
    if a.shape[-1] == 0:  # sums of nothing
        z = torch.zeros_like(out) if bias is None else bias.expand(out.shape)
        if pre is not None:
            pre.copy_(z)
        out.copy_(reference.epilogue(z, residual, None if activation == "none" else activation))
        return
    precision = cuda.precision("matmul")
    scratch = cuda.workspace(out, native.gemm_workspace(a, b, out, precision=precision))
    native.gemm(a, b, out, bias, residual, pre, activation, precision=precision, workspace=scratch)


# --- shapes --------------------------------------------------------------------------------------------------------
def _as_rows(x: Tensor) -> Tensor | None:
    """[..., K] -> [R, K] as a view, or None where the leading dimensions have no one stride."""
    dims = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if x.numel() and any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(dims)):
        return None
    return x.as_strided((math.prod(x.shape[:-1]), x.shape[-1]), (dims[-1][1] if dims else x.shape[-1], x.stride(-1)))


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [R, K], copied where it is no view."""
    rows = _as_rows(x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if rows is None else rows


def _linear_operands(input: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of linear as a product: all rows as one dimension where they have one stride."""
    b = weight.mT
    rows = _as_rows(input)
    if rows is not None:
        return rows, b, out.view(math.prod(out.shape[:-1]), out.shape[-1])
    return input, b.expand(*input.shape[:-2], *b.shape), out


def _matrices(input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """A 1-D input is a row, a 1-D other a column."""
    return input.unsqueeze(0) if input.ndim == 1 else input, other.unsqueeze(1) if other.ndim == 1 else other


def _broadcast(a: Tensor, b: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """a and b with the batch dimensions of out."""
    return a.expand(*out.shape[:-2], *a.shape[-2:]), b.expand(*out.shape[:-2], *b.shape[-2:])
