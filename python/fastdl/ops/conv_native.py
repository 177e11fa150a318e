"""The convolutions on plain CPU tensors: allocate the result, call the kernel. float64 runs the reference.

These are the CPU implementations of torch.ops.fastdl.conv*, and what eager code calls; the native functions check their
arguments and refuse every other dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdl import _C
from fastdl.ops import conv_reference, conv_shapes, gemm_native, reference
from fastdl.ops.conv_shapes import Geometry


def _name(weight: Tensor, transposed: bool) -> str:
    return f"conv{'_transpose' * transposed}{weight.ndim - 2}d"


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    extra: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    activation: str | None,
    channels_last: bool,
    save_pre: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(activation(z) + residual, z) with z = conv(input, weight, bias); an empty tensor for z unless `save_pre`.

    input [N, C, ...], weight [K, C/groups, ...], transposed [C, K/groups, ...]; channels_last is the layout of both
    results. packed: the weight's frozen pack.
    """
    g = Geometry(tuple(stride), tuple(padding), tuple(extra), tuple(dilation), groups, transposed)
    shape = conv_shapes.require_fit(_name(weight, transposed), input, weight, bias, residual, g)
    out = conv_shapes.empty(input, shape, channels_last)
    pre = conv_shapes.empty(input, shape, channels_last) if save_pre else input.new_empty(0)
    if input.dtype is torch.float64:
        z = conv_reference.conv(input, weight, bias, g)
        out.copy_(reference.epilogue(z, residual, activation))
        return out, pre.copy_(z) if save_pre else pre
    if residual is not None:
        residual = conv_shapes.as_format(residual, channels_last)
    (_C.conv_dgrad if transposed else _C.conv)(
        out,
        input,
        weight,
        bias,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=groups,
        activation=activation or "none",
        residual=residual,
        pre=pre if save_pre else None,
        pack=packed,
    )
    return out, pre


def conv_wgrad(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    extra: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """(dw [K, C/groups, *kernel], sums of grad [K], empty unless `bias`) of a convolution that is not transposed.

    grad [N, K, ...], input [N, C, ...]. For a transposed one the two change places.
    """
    shape = (grad.shape[1], input.shape[1] // groups, *kernel)
    dw = conv_shapes.empty(grad, shape, channels_last)
    db = grad.new_empty(shape[0] if bias else 0)
    if input.dtype is torch.float64:
        g = Geometry(tuple(stride), tuple(padding), tuple(extra), tuple(dilation), groups, False)
        dw.copy_(conv_reference.conv_wgrad(grad, input, kernel, g))
        return dw, db.copy_(grad.sum([0, *range(2, grad.ndim)])) if bias else db
    options = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}
    _C.conv_wgrad(dw, grad, input, **options, dbias=db if bias else None)
    return dw, db


def bias_grad(grad: Tensor) -> Tensor:
    """Sums of grad [N, K, ...] over all but K."""
    return gemm_native.sum_rows(grad.movedim(1, -1))


def activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """grad * activation'(pre), in the layout of pre."""
    last = pre.movedim(1, -1)
    if last.is_contiguous():
        return gemm_native.activation_grad(grad.movedim(1, -1), last, activation).movedim(-1, 1)
    return gemm_native.activation_grad(grad, pre, activation)
