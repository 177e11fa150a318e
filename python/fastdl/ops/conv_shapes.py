"""Arguments of the convolutions: stride, padding and the like as tuples, sizes of results, layouts, errors.

Sizes may be symbolic. A `Geometry` says everything of a convolution but the sizes of its tensors, and its inverse, with
those, is the geometry of the gradient: conv and conv_transpose are each other's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch.compiler import is_compiling

from fastdl.ops.shapes import require

_MOST = 2**31 - 1  # of padding and dilation: sums and products of a few stay in 64 bits
_MOST_ELEMENTS = 2**59  # of a result


class Geometry(NamedTuple):
    """Of 1, 2 or 3 spatial dimensions; the padding after a dimension is padding + extra."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before each dimension
    extra: tuple[int, ...]  # 'same' of an odd total: 1; transposed: output_padding; may be negative in gradients
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    def size(self, index: int, length: int, kernel: int) -> int:
        """Of the result along spatial dimension `index`; not positive where the kernel does not fit."""
        reach = self.dilation[index] * (kernel - 1) + 1
        pads = 2 * self.padding[index]
        if self.transposed:
            return (length - 1) * self.stride[index] - pads + reach + self.extra[index]
        span = length + pads + self.extra[index] - reach
        return span // self.stride[index] + 1

    def inverse(self, source: Sequence[int], result: Sequence[int], kernel: Sequence[int]) -> Geometry:
        """The geometry that leads from spatial sizes `result` back to `source`: that of the gradient."""
        back = self._replace(transposed=not self.transposed, extra=(0,) * len(kernel))
        if self.transposed:  # the convolution that gives `source` again: without what was added behind
            return back._replace(extra=tuple(-x for x in self.extra))
        short = (n - back.size(i, m, k) for i, (n, m, k) in enumerate(zip(source, result, kernel, strict=True)))
        return back._replace(extra=tuple(short))


def _numbers(op: str, name: str, value: Any, n: int) -> tuple[int, ...]:
    """An int, or a sequence of 1 or n ints, as n ints. TypeError, RuntimeError."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    found = []
    for x in values:
        if isinstance(x, bool) or not (isinstance(x, (int, SymInt)) or hasattr(x, "__index__")):
            got = f"{type(value).__name__} {value!r}"
            raise TypeError(f"fastdl.{op}: argument '{name}': expected an int or a tuple of {n} ints, got {got}")
        found.append(x if isinstance(x, (int, SymInt)) else operator.index(x))
    if len(found) == 1:
        found *= n
    if len(found) != n:
        raise RuntimeError(f"fastdl.{op}: argument '{name}': expected an int or {n} ints, got {value!r}")
    return tuple(found)


def _require_range(op: str, name: str, values: tuple[int, ...], least: int, most: int) -> None:
    if any(x < least for x in values):
        raise RuntimeError(f"fastdl.{op}: argument '{name}': expected at least {least}, got {values}")
    if any(x > most for x in values):
        raise RuntimeError(f"fastdl.{op}: argument '{name}': expected at most {most}, got {values}")


def _geometry(
    op: str,
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    transposed: bool,
) -> Geometry:
    n = len(kernel)
    stride, dilation = _numbers(op, "stride", stride, n), _numbers(op, "dilation", dilation, n)
    (groups,) = _numbers(op, "groups", groups, 1)
    _require_range(op, "stride", stride, 1, 2**59)
    _require_range(op, "dilation", dilation, 1, _MOST)
    _require_range(op, "groups", (groups,), 1, _MOST)
    extra = _numbers(op, "output_padding", output_padding, n)
    if isinstance(padding, str) and not transposed:
        if padding not in ("same", "valid"):
            raise RuntimeError(f"fastdl.{op}: argument 'padding': expected 'same', 'valid' or ints, got {padding!r}")
        total = (0,) * n
        if padding == "same":
            if any(s != 1 for s in stride):
                raise RuntimeError(f"fastdl.{op}: argument 'padding': 'same' needs a stride of 1, got {stride}")
            total = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        before, extra = tuple(x // 2 for x in total), tuple(x % 2 for x in total)
    else:
        before = _numbers(op, "padding", padding, n)
    _require_range(op, "padding", before, 0, _MOST)
    if transposed:
        _require_range(op, "output_padding", extra, 0, _MOST)
        if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
            raise RuntimeError(
                f"fastdl.{op}: argument 'output_padding': expected less than stride {stride} or dilation {dilation}, "
                f"got {extra}"
            )
    return Geometry(stride, before, extra, dilation, groups, transposed)


_cached = lru_cache(maxsize=1024, typed=True)(_geometry)


def geometry(
    op: str,
    kernel: Sequence[int],
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    transposed: bool,
) -> Geometry:
    """The arguments as torch takes them. TypeError for what is no int, RuntimeError for values out of range."""
    if is_compiling():
        return _geometry(op, tuple(kernel), stride, padding, output_padding, dilation, groups, transposed)
    try:
        return _cached(op, tuple(kernel), stride, padding, output_padding, dilation, groups, transposed)
    except TypeError:  # lists do not hash; others are refused again
        return _geometry(op, tuple(kernel), stride, padding, output_padding, dilation, groups, transposed)


# --- sizes ------------------------------------------------------------------------------------------------------
def result(input: Tensor, weight: Tensor, g: Geometry) -> tuple[int, ...]:
    """Shape of the result; nothing is checked."""
    shape, kernel = input.shape, weight.shape
    channels = kernel[1] * g.groups if g.transposed else kernel[0]
    return (shape[0], channels, *(g.size(i, shape[i + 2], kernel[i + 2]) for i in range(len(kernel) - 2)))


def require_rank(op: str, n: int, input: Tensor, weight: Tensor) -> None:
    """RuntimeError unless weight has n spatial dimensions, and input those, with or without a batch."""
    require(weight.ndim == n + 2, op, "weight", f"{n + 2} dimensions", weight)
    ranks = f"{n + 1} (unbatched) or {n + 2} dimensions"
    require(input.ndim in (n + 1, n + 2), op, "input", ranks, input)


def require_fit(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: Geometry
) -> tuple[int, ...]:
    """The shape of the result. RuntimeError for shapes that do not fit; nothing is allocated before."""
    kernel, groups = weight.shape[2:], g.groups
    require(all(k > 0 for k in kernel), op, "weight", "a kernel without empty dimensions", weight)
    rows, channels = weight.shape[0], input.shape[1]
    require(rows >= groups, op, "weight", f"at least {groups} (groups) at dimension 0", weight)
    require(rows % groups == 0, op, "weight", f"a multiple of {groups} (groups) at dimension 0", weight)
    if g.transposed:
        require(weight.shape[1] > 0, op, "weight", "at least 1 at dimension 1", weight)
        require(channels == rows, op, "input", f"{rows} channels to match weight {list(weight.shape)}", input)
    else:
        wanted = weight.shape[1] * groups
        why = f"{wanted} channels to match weight {list(weight.shape)} and groups {groups}"
        require(channels == wanted, op, "input", why, input)
    require(all(x > 0 for x in input.shape[2:]), op, "input", "spatial dimensions that are not empty", input)
    shape = result(input, weight, g)
    if g.transposed:
        fit = all(x > 0 for x in shape[2:])
        require(fit, op, "input", f"a size that gives a result, kernel {list(kernel)} gives {list(shape[2:])}", input)
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(g.dilation, kernel, strict=True)]
        spans = [n + 2 * p + e for n, p, e in zip(input.shape[2:], g.padding, g.extra, strict=True)]
        fit = all(x >= r for x, r in zip(spans, reach, strict=True))
        require(fit, op, "input", f"at least the size of the dilated kernel, {reach}, with padding", input)
    if not all(x <= _MOST_ELEMENTS for x in shape) or not math.prod(shape) <= _MOST_ELEMENTS:
        raise RuntimeError(f"fastdl.{op}: the result would have shape {list(shape)}: more than memory can hold")
    if bias is not None:
        require(bias.ndim == 1 and bias.shape[0] == shape[1], op, "bias", f"shape [{shape[1]}]", bias)
    if residual is not None:
        require(tuple(residual.shape) == shape, op, "residual", f"the result's shape {list(shape)}", residual)
    return shape


# --- layouts ----------------------------------------------------------------------------------------------------
def _like_channels_last(x: Tensor) -> bool:
    """Whether torch takes the strides of x for channels_last, as Tensor::suggest_memory_format does.

    3-D tensors count as 4-D ones of height 1. Where sizes of 1 leave it open, contiguous wins.
    """
    sizes, strides = x.shape, x.stride()
    if len(sizes) == 3:
        sizes, strides = (*sizes[:2], 1, sizes[2]), (*strides[:2], sizes[2] * strides[2], strides[2])
    if strides[1] == 0:
        return False
    least = 0
    for i in (1, *range(len(sizes) - 1, 1, -1), 0):
        if sizes[i] == 0 or strides[i] < least or (i == 0 and least == strides[1]):
            return False
        least = strides[i] * sizes[i] if sizes[i] > 1 else strides[i]
    return True


def channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether the result of a convolution is to be channels_last: torch's rule for batched input.

    torch's own slow 3-D paths (float16, and dilated or transposed ones) are contiguous even then.
    """
    if input.dtype == torch.float64:
        return False
    # 1-D input torch makes contiguous first.
    return (input.ndim > 3 and _like_channels_last(input)) or _like_channels_last(weight)


def weight_channels_last(weight: Tensor) -> bool:
    """Whether the gradient of weight is to be channels_last, as the weight is."""
    return weight.dtype != torch.float64 and _like_channels_last(weight)


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def empty(like: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    """A tensor of this shape, contiguous or channels_last, of the dtype and on the device of `like`."""
    if not last:
        return like.new_empty(shape)
    if len(shape) == 3:
        return like.new_empty(shape[0], shape[2], shape[1]).transpose(1, 2)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_FORMATS[len(shape)])


def as_format(x: Tensor, last: bool) -> Tensor:
    """x in that layout, itself where it is."""
    if not last:
        return x.contiguous()
    if x.ndim == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=_FORMATS[x.ndim])
