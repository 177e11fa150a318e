"""The convolutions on CUDA tensors, and on CPU tensors under the host twin: outputs, workspace, the kernel.

The CUDA implementations of torch.ops.fastdl.conv*, with the signatures of `conv_native`. float64 runs the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import conv_reference, conv_shapes, cuda, reference
from fastdl.ops.conv_shapes import Geometry


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
    """As `conv_native.conv`; a pack, which is of the CPU's kernels, is not read."""
    g = Geometry(tuple(stride), tuple(padding), tuple(extra), tuple(dilation), groups, transposed)
    op = f"conv{'_transpose' * transposed}{weight.ndim - 2}d"
    shape = conv_shapes.require_fit(op, input, weight, bias, residual, g)
    out = conv_shapes.empty(input, shape, channels_last)
    pre = conv_shapes.empty(input, shape, channels_last) if save_pre else input.new_empty(0)
    if input.dtype is torch.float64:
        z = conv_reference.conv(input, weight, bias, g)
        out.copy_(reference.epilogue(z, residual, activation))
        return out, pre.copy_(z) if save_pre else pre
    native, precision = cuda.require(op, input), cuda.precision("conv")
    x, y = (out, input) if transposed else (input, out)
    planned = _plan(native, "dgrad" if transposed else "forward", x, weight.shape, y, g, channels_last, precision)
    (native.conv_dgrad if transposed else native.conv)(
        out,
        input,
        weight,
        bias,
        **_options(g),
        activation=activation or "none",
        residual=None if residual is None else conv_shapes.as_format(residual, channels_last),
        pre=pre if save_pre else None,
        precision=precision,
        workspace=cuda.workspace(out, planned["workspace_bytes"]),
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
    """As `conv_native.conv_wgrad`."""
    shape = (grad.shape[1], input.shape[1] // groups, *kernel)
    dw = conv_shapes.empty(grad, shape, channels_last)
    db = grad.new_empty(shape[0] if bias else 0)
    g = Geometry(tuple(stride), tuple(padding), tuple(extra), tuple(dilation), groups, False)
    if input.dtype is torch.float64:
        dw.copy_(conv_reference.conv_wgrad(grad, input, kernel, g))
        return dw, db.copy_(grad.sum([0, *range(2, grad.ndim)])) if bias else db
    native, precision = cuda.require("conv_wgrad", input), cuda.precision("conv")
    planned = _plan(native, "wgrad", input, shape, grad, g, channels_last, precision)
    native.conv_wgrad(
        dw,
        grad,
        input,
        **_options(g),
        dbias=db if bias else None,
        precision=precision,
        workspace=cuda.workspace(dw, planned["workspace_bytes"]),
    )
    return dw, db


def plan(out: Tensor, input: Tensor, weight: Tensor, g: Geometry, channels_last: bool) -> str:
    """The kernel that conv runs for these."""
    native, x, y = cuda.require("conv", out), *((out, input) if g.transposed else (input, out))
    pass_ = "dgrad" if g.transposed else "forward"
    return _plan(native, pass_, x, weight.shape, y, g, channels_last, cuda.precision("conv"))["kernel"]


def _options(g: Geometry) -> dict[str, Any]:
    return {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups": g.groups}


def _plan(
    native: Any,
    pass_: str,
    x: Tensor,
    kernel: Sequence[int],
    y: Tensor,
    g: Geometry,
    channels_last: bool,
    precision: str,
) -> dict[str, Any]:
    dtype = str(x.dtype).removeprefix("torch.")
    shapes = (tuple(x.shape), tuple(kernel), tuple(y.shape))
    return _planned(native, pass_, *shapes, g, dtype, channels_last, precision, x.device.index or 0)


@lru_cache(maxsize=1024)
def _planned(
    native: Any,
    pass_: str,
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    y: tuple[int, ...],
    g: Geometry,
    dtype: str,
    channels_last: bool,
    precision: str,
    device: int,
) -> dict[str, Any]:
    options = {"dtype": dtype, "channels_last": channels_last, "precision": precision, "device": device}
    return native.conv_plan(pass_, x, kernel, y, **_options(g), **options)
