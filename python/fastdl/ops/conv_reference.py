"""The convolutions as plain torch compositions: what float64 runs, and what calls handed back run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdl.ops import reference
from fastdl.ops.conv_shapes import Geometry


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """input [N, C, ...] -> [N, K, ...], by torch's functions of that rank; `extra` may be negative."""
    n = weight.ndim - 2
    if g.transposed:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
        added = [max(x, 0) for x in g.extra]
        out = function(input, weight, bias, g.stride, g.padding, added, g.groups, g.dilation)
    else:
        function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        input = _pad_after(input, [max(x, 0) for x in g.extra])
        out = function(input, weight, bias, g.stride, g.padding, g.dilation, g.groups)
    for i, x in enumerate(g.extra):  # less padding behind leaves the rest of the result as it is
        if x < 0:
            length = g.size(i, input.shape[i + 2], weight.shape[i + 2])
            out = out.narrow(i + 2, 0, length)
    return out


def conv_fused(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: Geometry, activation: str | None
) -> Tensor:
    """activation(conv(input, weight, bias)) + residual."""
    return reference.epilogue(conv(input, weight, bias, g), residual, activation)


def conv_wgrad(grad: Tensor, input: Tensor, kernel: Sequence[int], g: Geometry) -> Tensor:
    """Gradient of the weight of a convolution that is not transposed: grad [N, K, ...], input [N, C, ...]."""
    shape = (grad.shape[1], input.shape[1] // g.groups, *kernel)
    if 0 in (*grad.shape, *input.shape):
        return grad.new_zeros(shape)
    input = _pad_after(input, [max(x, 0) for x in g.extra])
    whole = g._replace(extra=(0,) * len(kernel))
    missing = [whole.size(i, input.shape[i + 2], k) - grad.shape[i + 2] for i, k in enumerate(kernel)]
    grad = _pad_after(grad, missing)
    zeros = [0] * len(kernel)
    arguments = (None, g.stride, g.padding, g.dilation, False, zeros, g.groups, [False, True, False])
    weight = grad.new_empty(shape)
    return torch.ops.aten.convolution_backward(grad, input, weight, *arguments)[1]


def _pad_after(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros behind the last len(sizes) dimensions."""
    if not any(sizes):
        return x
    return F.pad(x, [n for size in reversed(sizes) for n in (0, size)])
