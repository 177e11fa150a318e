"""Checks of the convolutions for `fastdl verify`: every kernel of their table in each pass, and modules with gradients.

Exact: sums of small integers, bit for bit. Bound: within the bound of `fastdl.testing` around float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdl import _C, functional
from fastdl.ops import conv_shapes
from fastdl.ops.conv_shapes import Geometry
from fastdl.testing import assert_within_bound, integer_matrix, sum_reference
from fastdl.verify_attention import Step

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TERMS = 4000  # of the longest sum
_GUARD = -12345.678  # around what is written
_BAND = 67
_PRECISION = {row["name"]: row["precision"] for row in _C.kernels("conv")}

# (what, input, weight, geometry): stride, padding, extra, dilation, groups
_Problem = tuple[str, tuple[int, ...], tuple[int, ...], Geometry]


def _geometry(n: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Geometry:
    return Geometry((stride,) * n, (padding,) * n, (0,) * n, (dilation,) * n, groups, False)


def _problems(row: dict[str, Any], quick: bool) -> Iterator[_Problem]:
    """Around the register tile in pixels and channels; strides, dilations, paddings, each number of dimensions."""
    mr, nr = max(row["mr"], 2), max(row["nr"], 2)
    C, K = 5, nr + 1
    yield "3x3", (2, C, 5, mr + 1), (K, C, 3, 3), _geometry(2, padding=1)
    yield "3x3 stride 2", (1, C, 7, 2 * mr + 3), (K, C, 3, 3), _geometry(2, 2, 1)
    yield "k4 dilation 3", (1, 3, 2 * mr + 9), (nr - 1, 3, 4), _geometry(1, 1, 2, 3)
    yield "groups", (1, 3 * nr, 4, mr), (3 * nr, nr, 3, 3), _geometry(2, 1, 1, 1, 3)
    yield "depthwise", (2, nr + 3, 6, mr), (nr + 3, 1, 3, 3), _geometry(2, 1, 1, 1, nr + 3)
    if quick:
        return
    yield "1x1", (1, 2 * nr + 3, 3, mr + 2), (2 * nr + 1, 2 * nr + 3, 1, 1), _geometry(2)
    yield "1x1 stride 3", (1, 33, 7, mr + 2), (K, 33, 1, 1), _geometry(2, 3)
    yield "7x7 stem", (1, 3, 23, 30), (K, 3, 7, 7), _geometry(2, 2, 3)
    yield "deep", (1, 210, 3, 4), (K, 210, 3, 3), _geometry(2, padding=1)
    yield "one pixel", (1, C, 1, 1), (K, C, 3, 3), _geometry(2, padding=1)
    yield "3x3x3", (1, C, 3, 4, mr), (K, C, 3, 3, 3), _geometry(3, padding=1)
    yield "depthwise 3x3x3", (1, nr + 1, 3, 4, 5), (nr + 1, 1, 3, 3, 3), _geometry(3, 1, 1, 1, nr + 1)
    yield "depthwise k31", (1, nr + 1, 90), (nr + 1, 1, 31), _geometry(1, 1, 15, 1, nr + 1)
    yield "depthwise 5x5 stride 2", (1, nr - 1, 9, 11), (nr - 1, 1, 5, 5), _geometry(2, 2, 2, 1, nr - 1)
    yield "two outputs a group", (1, nr + 1, 5, 6), (2 * nr + 2, 1, 3, 3), _geometry(2, 1, 1, 1, nr + 1)


def _data(tier: str, dtype: torch.dtype, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if tier == "exact":
        return lambda *shape: integer_matrix(shape, _TERMS, generator, dtype)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def _written(like: Tensor, shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor]:
    """(a tensor of NaN in that layout, the guarded buffer that it lies in)."""
    strides = conv_shapes.empty(like, shape, last).stride()
    size = 1
    for n in shape:
        size *= n
    buffer = torch.full((size + 2 * _BAND,), _GUARD, dtype=like.dtype)
    view = buffer.as_strided(shape, strides, _BAND)
    return view.fill_(torch.nan), buffer


def _require_guards(buffer: Tensor) -> None:
    guard = torch.tensor(_GUARD, dtype=buffer.dtype)
    wrong = int((buffer[:_BAND] != guard).sum() + (buffer[-_BAND:] != guard).sum())
    if wrong:
        raise AssertionError(f"{wrong} elements outside the output were written")


def _theirs(g: Geometry, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[w.ndim - 3]
    return function(x, w, b, g.stride, g.padding, g.dilation, g.groups)


def _reference(pass_: str, g: Geometry, x: Tensor, w: Tensor, dy: Tensor, b: Tensor | None) -> Tensor:
    """Of doubles: the output, or the gradient of x or w."""
    if pass_ == "forward":
        return _theirs(g, x, w, b)
    x, w = (t.clone().requires_grad_() for t in (x, w))
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(_theirs(g, x, w, None), x if pass_ == "dgrad" else w, dy)
    return grad if b is None else grad + b.view(1, -1, *[1] * (w.ndim - 2))


def _compare(
    tier: str, actual: Tensor, run: Any, operands: list[Tensor | None], depth: int, precision: str = "ieee"
) -> None:
    reference = sum_reference(run, operands, depth)
    if tier == "bound":
        assert_within_bound(actual, reference, precision=precision)
        return
    expected = reference.expected.to(actual.dtype)
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        where = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {actual.numel()} elements wrong, first at {where}: "
            f"got {actual[where].item()}, expected {expected[where].item()}"
        )


def _check_kernel(kernel: str, pass_: str, dtype: torch.dtype, tier: str, problem: _Problem, last: bool) -> None:
    """One pass by one row, operands in one layout; normal values also give the same bits on one thread and on three."""
    _, x_shape, w_shape, g = problem
    data = _data(tier, dtype, sum(x_shape) * 31 + sum(w_shape))
    x, w = conv_shapes.as_format(data(*x_shape), last), data(*w_shape)
    dy = conv_shapes.as_format(data(*conv_shapes.result(x, w, g)), last)
    options: dict[str, Any] = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups": g.groups}
    bias = data(w_shape[0] if pass_ != "dgrad" else x_shape[1])
    results = []
    for threads in (1, 3) if tier == "bound" else (0,):
        like, shape = (dy, dy.shape) if pass_ == "forward" else (x, x.shape) if pass_ == "dgrad" else (w, w.shape)
        out, buffer = _written(like, tuple(shape), last)
        options |= {"kernel": kernel, "threads": threads}
        if pass_ == "wgrad":
            sums = torch.empty_like(bias)
            _C.conv_wgrad(out, dy, x, **options, dbias=sums)
        elif pass_ == "dgrad":
            _C.conv_dgrad(out, dy, w, bias, **options)
        else:
            _C.conv(out, x, w, bias, **options)
        _require_guards(buffer)
        results.append(out.clone())
    if not torch.equal(results[0], results[-1]):
        raise AssertionError(f"{int((results[0] != results[-1]).sum())} elements differ between 1 and 3 threads")
    places = dy.shape[0] * dy.shape[2:].numel()
    depth = {"forward": w[0].numel(), "dgrad": w.numel() // w.shape[1], "wgrad": places}[pass_]
    given = None if pass_ == "wgrad" else bias
    _compare(tier, results[0], partial(_reference, pass_, g), [x, w, dy, given], depth + 1, _PRECISION[kernel])
    if pass_ == "wgrad":
        _compare(tier, sums, lambda dy: dy.sum([0, *range(2, dy.ndim)]), [dy], places, _PRECISION[kernel])


def _runs(row: dict[str, Any], pass_: str, problem: _Problem, last: bool) -> bool:
    """Whether this row can be forced on the problem."""
    _, x, w, g = problem
    y = (x[0], w[0], *(g.size(i, x[i + 2], w[i + 2]) for i in range(len(x) - 2)))
    where = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups": g.groups}
    try:
        _C.conv_plan(pass_, x, w, y, **where, dtype=row["dtype"], channels_last=last, kernel=row["name"])
    except RuntimeError:
        return False
    return True


def kernel_steps(row: dict[str, Any], quick: bool) -> Iterator[Step]:
    """Each pass that the row is for, in both layouts."""
    dtype = _DTYPES[row["dtype"]]
    for problem in _problems(row, quick):
        for pass_, last in itertools.product(("forward", "dgrad", "wgrad"), (True, False)):
            if _runs(row, pass_, problem, last):
                for tier in ("exact",) if quick and not last else ("exact", "bound"):
                    what = f"{tier} {pass_} {problem[0]}{' channels_last' * last}"
                    check = partial(_check_kernel, row["name"], pass_, dtype, tier, problem, last)
                    yield row["name"], what, check


# --- as a model calls them ----------------------------------------------------------------------------------------
_CALLS = {
    "conv1d": ((2, 6, 40), (6, 2, 5), {"padding": 4, "dilation": 2, "groups": 3}),
    "conv2d": ((2, 7, 12, 11), (9, 7, 3, 3), {"padding": "same"}),
    "conv3d": ((1, 3, 5, 6, 7), (8, 3, 2, 3, 3), {"stride": 2, "padding": 1}),
    "conv_transpose1d": ((2, 5, 13), (5, 6, 4), {"stride": 3}),
    "conv_transpose2d": ((1, 6, 7, 5), (6, 4, 4, 4), {"stride": 2, "padding": 1}),
    "conv_transpose3d": ((1, 4, 3, 4, 3), (4, 2, 2, 2, 2), {"stride": 2, "output_padding": 1}),
}


def _check_call(name: str, dtype: torch.dtype, tier: str, last: bool) -> None:
    """A function of fastdl.functional with all its gradients, and, exactly, with ReLU and a residual."""
    x_shape, w_shape, options = _CALLS[name]
    data = _data(tier, dtype, 5)
    x, w = conv_shapes.as_format(data(*x_shape), last), data(*w_shape)
    b = data(w_shape[1] if "transpose" in name else w_shape[0])
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with torch.enable_grad():
        out = getattr(functional, name)(*leaves, **options)
        dy = data(*out.shape)
        grads = torch.autograd.grad(out, leaves, dy)

    def theirs(x: Tensor, w: Tensor, b: Tensor, dy: Tensor, index: int) -> Tensor:
        with torch.enable_grad():
            given = [t.clone().requires_grad_() for t in (x, w, b)]
            y = getattr(F, name)(*given, **options)
            return (y, *torch.autograd.grad(y, given, dy))[index].detach()

    for index, actual in enumerate((out.detach(), *grads)):
        _compare(tier, actual, partial(theirs, index=index), [x, w, b, dy], 1 + max(w.numel(), dy.numel()))
    if tier == "exact":
        fused = getattr(functional, name)(x, w, b, **options, activation="relu", residual=dy)
        expected = (getattr(F, name)(x.double(), w.double(), b.double(), **options).relu() + dy.double()).to(dtype)
        if not torch.equal(fused, expected):
            raise AssertionError(f"relu, residual: {int((fused != expected).sum())} of {fused.numel()} elements wrong")


def operation_steps(quick: bool) -> Iterator[Step]:
    """functional.conv*, with gradients, in both layouts."""
    for name, (dtype_name, dtype), tier, last in itertools.product(
        _CALLS, _DTYPES.items(), ("exact", "bound"), (False, True)
    ):
        if not (quick and (dtype == torch.float16 or last)):
            what = f"{tier} {dtype_name}{' channels_last' * last}"
            yield f"functional.{name}", what, partial(_check_call, name, dtype, tier, last)
