"""torch.ops.fastdl.conv, conv_wgrad: schemas, CPU implementations, fakes, vmap rules and FLOP counts.

No autograd here: the autograd.Function stands outside the operation (`ops/conv.py`). Layouts are arguments, so that
they cannot depend on what a compiler makes of the strides of the operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import conv_native, conv_shapes, cuda_conv, reference
from fastdl.ops.conv_shapes import Geometry
from fastdl.ops.library import register

_ops = torch.ops.fastdl


# --- fakes: shapes without arithmetic -----------------------------------------------------------------------------
def _fake_conv(
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
    g = Geometry(tuple(stride), tuple(padding), tuple(extra), tuple(dilation), groups, transposed)
    shape = conv_shapes.result(input, weight, g)
    out = conv_shapes.empty(input, shape, channels_last)
    return out, torch.empty_like(out) if save_pre else input.new_empty(0)


def _fake_conv_wgrad(
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
    shape = (grad.shape[1], input.shape[1] // groups, *kernel)
    return conv_shapes.empty(grad, shape, channels_last), grad.new_empty(shape[0] if bias else 0)


# --- vmap: the mapped dimension V joins the batch, or, where there is a weight for each, channels and groups ---------
def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _into_channels(x: Tensor, dim: int | None, size: int) -> Tensor:
    """[V, N, C, ...] -> [N, V*C, ...]."""
    return _front(x, dim, size).transpose(0, 1).flatten(1, 2)


def _vmap_conv(
    info: Any,
    dims: Sequence[int | None],
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
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    V = info.batch_size
    rest = (stride, padding, extra, dilation)
    form = (transposed, None, channels_last, False, None)
    common = bias if dims[2] is None else None
    if dims[1] is not None:
        x, w = _into_channels(input, dims[0], V), _front(weight, dims[1], V).flatten(0, 1)
        common = None
        z = _ops.conv(x, w, None, None, *rest, V * groups, *form)[0].unflatten(1, (V, -1)).transpose(0, 1)
    elif dims[0] is not None:
        x = _front(input, dims[0], V)
        z = _ops.conv(x.flatten(0, 1), weight, common, None, *rest, groups, *form)[0].unflatten(0, (V, x.shape[1]))
    else:
        z = _ops.conv(input, weight, common, None, *rest, groups, *form)[0]
        z = z.expand(V, *z.shape)
    if bias is not None and common is None:
        b = _front(bias, dims[2], V)
        z = z + b.view(V, 1, -1, *[1] * (z.ndim - 3))
    out = reference.epilogue(z, None if residual is None else _front(residual, dims[3], V), activation)
    out = out.clone() if out is z else out
    return (out, z.clone() if save_pre else z.new_empty(0)), (0, 0 if save_pre else None)


def _vmap_conv_wgrad(
    info: Any,
    dims: Sequence[int | None],
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
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    V = info.batch_size
    dy, x = _into_channels(grad, dims[0], V), _into_channels(input, dims[1], V)
    dw, db = _ops.conv_wgrad(dy, x, kernel, stride, padding, extra, dilation, V * groups, channels_last, bias)
    return (dw.unflatten(0, (V, -1)), db.unflatten(0, (V, -1)) if bias else db), (0, 0 if bias else None)


# --- FLOPs, for torch.utils.flop_counter: a multiply and an add for each product -----------------------------------
def _flops_conv(
    input: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    extra: Any,
    dilation: Any,
    groups: int,
    transposed: bool,
    *args: Any,
    out_shape: Any,
    **kwargs: Any,
) -> int:
    places = input if transposed else out_shape[0]
    return 2 * places[0] * math.prod(places[2:]) * math.prod(weight)


def _flops_conv_wgrad(grad: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * grad[0] * math.prod(grad[2:]) * math.prod(out_shape[0])


# --- the table ----------------------------------------------------------------------------------------------------
register(
    "conv(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding, "
    "SymInt[] extra, SymInt[] dilation, SymInt groups, bool transposed, str? activation, bool channels_last, "
    "bool save_pre, Tensor? packed=None) -> (Tensor, Tensor)",
    conv_native.conv,
    _fake_conv,
    _vmap_conv,
    _flops_conv,
    exact_strides=True,
    cuda=cuda_conv.conv,
)
register(
    "conv_wgrad(Tensor grad, Tensor input, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] extra, "
    "SymInt[] dilation, SymInt groups, bool channels_last, bool bias) -> (Tensor, Tensor)",
    conv_native.conv_wgrad,
    _fake_conv_wgrad,
    _vmap_conv_wgrad,
    _flops_conv_wgrad,
    exact_strides=True,
    cuda=cuda_conv.conv_wgrad,
)
