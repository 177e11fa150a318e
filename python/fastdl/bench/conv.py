"""`fastdl bench conv`: convolutions in 1, 2 and 3 dimensions, forward, backward and both.

A family is one function from a shape and the settings to a `Case`; `FAMILIES` names them. 2-D and 3-D shapes are timed
in both layouts: a row compares fastdl in its faster one with torch in its faster one, and its parts compare the two in
each. 1-D ones have one layout: torch copies every other into it. First layers have data for input, which asks for no
gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdl
from fastdl import functional
from fastdl.bench import place
from fastdl.bench.harness import Call, Case, Check
from fastdl.bench.operands import normal
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import Shape
from fastdl.ops.conv_shapes import as_format
from fastdl.testing import UNIT_ROUNDOFF, assert_special_values, error_measures, gemm_bound

_CHECK_FLOPS = 1e9  # what the float64 reference of one result may cost
_PROBES = 3  # calls that choose a layout
_LAYOUTS = {"contiguous": False, "channels_last": True}

Operands = tuple[Tensor, Tensor, Tensor | None]
Convolution = Callable[..., Tensor]


# --- operands ---------------------------------------------------------------------------------------------------
class Problem:
    """One shape: its tensors, contiguous, and how the two sides are called."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        d = shape.dims
        self.sizes = [d[f"in{i}"] for i in range(3) if f"in{i}" in d]
        self.kernel = [d[f"k{i}"] for i in range(3) if f"k{i}" in d]
        self.groups, self.transposed = d["groups"], "transposed" in shape.tags
        rest = {"stride": d["stride"], "padding": d["padding"], "dilation": d["dilation"], "groups": d["groups"]}
        name = f"conv{'_transpose' * self.transposed}{len(self.sizes)}d"
        self.ours: Convolution = partial(getattr(functional, name), **rest)
        self.theirs: Convolution = partial(getattr(F, name), **rest)
        self.module = partial(getattr(nn, f"Conv{'Transpose' * self.transposed}{len(self.sizes)}d"), **rest)
        N, C, K = shape.sizes("N", "C", "K")
        channels = (C, K // self.groups) if self.transposed else (K, C // self.groups)
        dtype = settings.torch_dtype
        self.depth = (channels[0] // self.groups if self.transposed else channels[1]) * _product(self.kernel)
        self.x = normal(1, dtype, N, C, *self.sizes)
        self.w = normal(2, dtype, *channels, *self.kernel).div_(self.depth**0.5)
        self.b = None if "no bias" in shape.tags else normal(3, dtype, K)
        with torch.no_grad():
            self.y_shape = self.theirs(self.x[:1].to("meta"), self.w.to("meta")).shape
        self.y_shape = (N, *self.y_shape[1:])
        places = self.sizes if self.transposed else self.y_shape[2:]
        self.flops = 2.0 * N * _product(places) * self.w.numel()
        self.bytes = float((self.x.numel() + self.w.numel() + _product(self.y_shape)) * dtype.itemsize)
        self.first = "first" in shape.tags

    @property
    def layouts(self) -> dict[str, bool]:
        return _LAYOUTS if len(self.sizes) > 1 else {"contiguous": False}

    def operands(self, last: bool, grad: bool) -> Operands:
        """(x, w, b) in a layout; all but the data of a first layer require grad where asked."""
        x, w = (as_format(t, last).detach().clone(memory_format=torch.preserve_format) for t in (self.x, self.w))
        b = None if self.b is None else self.b.clone()
        for t in (w, b, None if self.first else x) if grad else ():
            if t is not None:
                t.requires_grad_()
        return x, w, b

    def grad(self, last: bool) -> Tensor:
        """Of the result."""
        return as_format(normal(4, self.x.dtype, *self.y_shape), last)


def _product(values: Sequence[int]) -> int:
    out = 1
    for value in values:
        out *= value
    return out


# --- checks -----------------------------------------------------------------------------------------------------
def _results(run: Convolution, operands: Operands, dy: Tensor | None) -> dict[str, Tensor]:
    """The output; with its gradient, the gradients of the operands that require grad instead."""
    out = run(*operands)
    if dy is None:
        return {"output": out}
    names = [(n, t) for n, t in zip(("dx", "dw", "dbias"), operands, strict=True) if t is not None and t.requires_grad]
    return dict(zip((n for n, _ in names), torch.autograd.grad(out, [t for _, t in names], dy), strict=True))


def _part(p: Problem, name: str) -> tuple[slice, slice, slice]:
    """(images, channels of the input, channels of the output) whose results float64 can afford."""
    whole, N = slice(None), p.x.shape[0]
    images = slice(1) if name in ("output", "dx") else whole
    flops = p.flops / (N if name in ("output", "dx") else 1)
    if p.groups > 1 or flops <= _CHECK_FLOPS:
        return images, whole, whole
    channels = p.x.shape[1] if name == "dx" else p.y_shape[1]
    some = slice(max(1, int(channels * _CHECK_FLOPS / flops)))
    return (images, some, whole) if name == "dx" else (images, whole, some)


def _wide(run: Convolution, operands: Operands, dy: Tensor | None, absolute: bool, dtype: torch.dtype) -> Any:
    given = []
    for t in operands:
        wide = None if t is None else t.detach().to(dtype)
        wide = wide.abs() if absolute and wide is not None else wide
        given.append(wide if wide is None else wide.requires_grad_(t.requires_grad))
    dy = None if dy is None else dy.to(dtype)
    return _results(run, tuple(given), dy.abs() if absolute and dy is not None else dy)


def _check(p: Problem, operands: Operands, dy: Tensor | None, ours: Any, theirs: Any) -> Check:
    """A part of each result within the bound around float64, and every element near torch's."""
    error = torch_error = 0.0
    dtype = p.x.dtype
    u, u_out = UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[dtype]
    places = p.x.shape[0] * _product(p.sizes if p.transposed else p.y_shape[2:])
    scales = _wide(p.theirs, operands, dy, True, torch.float32)
    for name, actual in ours.items():
        depth = 1 + {"output": p.depth, "dx": p.w.numel(), "dw": places, "dbias": _product(p.y_shape)}[name]
        limit = scales[name] * (4 * (min(depth, 4096) * u + u_out))
        wrong = int(((actual.float() - theirs[name].float()).abs() > limit).sum())
        if wrong or not bool(actual.isfinite().all()):
            return Check(error, torch_error, f"{name}: {wrong} elements are far from torch's, or not finite")
        images, given, made = _part(p, name)
        x, w, b = operands
        w = w[given, made] if p.transposed else w[made, given]
        part = (x[images, given], w, None if b is None else b[made])
        part = tuple(None if t is None else t.detach().requires_grad_(dy is not None) for t in part)
        grad = None if dy is None else dy[images, made]
        expected = _wide(p.theirs, part, grad, False, torch.float64)[name].detach()
        scale = _wide(p.theirs, part, grad, True, torch.float64)[name].detach()
        at = {
            "output": (images, made),
            "dx": (images, given),
            "dw": (given, made) if p.transposed else (made, given),
            "dbias": (made,),
        }[name]
        found = actual.detach()[at]
        bound = gemm_bound(depth, scale, expected, dtype)
        beyond = int(((found.double() - expected).abs() > bound).sum())
        if beyond:
            return Check(error, torch_error, f"{name}: {beyond} elements beyond the bound around float64")
        assert_special_values(found, expected)
        error = max(error, error_measures(found, expected, scale).rms)
        torch_error = max(torch_error, error_measures(theirs[name].detach()[at], expected, scale).rms)
    return Check(error, torch_error)


# --- families ---------------------------------------------------------------------------------------------------
def _seconds(call: Call) -> float:
    call()
    return statistics.median(place.seconds(call, 1) for _ in range(_PROBES))


def _case(p: Problem, calls: dict[str, tuple[Call, Call]], check: Callable[[], Check], passes: int) -> Case:
    """Each side in its faster layout; both sides in each as parts."""
    with torch.set_grad_enabled(passes > 1):
        times = {name: [_seconds(call) for call in sides] for name, sides in calls.items()}
    best = [min(calls, key=lambda name, side=side: times[name][side]) for side in (0, 1)]
    return Case(
        calls[best[0]][0],
        calls[best[1]][1],
        check,
        flops=p.flops * passes,
        bytes=p.bytes * passes,
        kernel_calls=passes,
        grad=passes > 1,
        parts=calls if len(calls) > 1 else {},
    )


def forward(shape: Shape, settings: Settings) -> Case:
    """A convolution without grad."""
    p = Problem(shape, settings)
    calls = {}
    for name, last in p.layouts.items():
        operands = p.operands(last, grad=False)
        ours: Call = partial(p.ours, *operands)
        if settings.frozen:
            ours = partial(_frozen(p, operands), operands[0])
        calls[name] = (ours, partial(p.theirs, *operands))

    def check() -> Check:
        checks = [
            _check(p, p.operands(last, grad=False), None, {"output": calls[n][0]()}, {"output": calls[n][1]()})
            for n, last in p.layouts.items()
        ]
        return _worst(checks)

    return _case(p, calls, check, passes=1)


def _worst(checks: list[Check]) -> Check:
    failures = "; ".join(c.failure for c in checks if c.failure)
    return Check(max(c.error for c in checks), max(c.torch_error for c in checks), failures)


def _frozen(p: Problem, operands: Operands) -> nn.Module:
    x, w, b = operands
    K = w.shape[1] * p.groups if p.transposed else w.shape[0]
    layer = p.module(x.shape[1], K, tuple(p.kernel), bias=b is not None, device="meta")
    layer.weight = nn.Parameter(w)
    layer.bias = None if b is None else nn.Parameter(b)
    return fastdl.freeze(fastdl.optimize(layer))


def _training(shape: Shape, settings: Settings, alone: bool) -> Case:
    p = Problem(shape, settings)
    calls = {}

    def given(last: bool) -> tuple[Operands, list[Tensor], Tensor]:
        operands = p.operands(last, grad=True)
        return operands, [t for t in operands if t is not None and t.requires_grad], p.grad(last)

    for name, last in p.layouts.items():
        operands, leaves, dy = given(last)
        sides = []
        for run in (p.ours, p.theirs):
            if alone:
                sides.append(partial(torch.autograd.grad, run(*operands), leaves, dy, retain_graph=True))
            else:
                sides.append(partial(_step, run, operands, leaves, dy))
        calls[name] = tuple(sides)

    def check() -> Check:
        checks = []
        for last in p.layouts.values():
            operands, _, dy = given(last)
            checks.append(_check(p, operands, dy, *(_results(run, operands, dy) for run in (p.ours, p.theirs))))
        return _worst(checks)

    case = _case(p, calls, check, passes=3)
    # A first layer has no gradient of its input.
    case.kernel_calls = case.kernel_calls - p.first - alone
    case.flops, case.bytes = (value * (3 - alone - p.first) / 3 for value in (case.flops, case.bytes))
    return case


def _step(run: Convolution, operands: Operands, leaves: list[Tensor], dy: Tensor) -> Any:
    return torch.autograd.grad(run(*operands), leaves, dy)


def backward(shape: Shape, settings: Settings) -> Case:
    """Gradients of input, weight and bias through autograd, the forward pass left out."""
    return _training(shape, settings, alone=True)


def train(shape: Shape, settings: Settings) -> Case:
    """Forward and backward."""
    return _training(shape, settings, alone=False)


_KINDS = ("dense", "grouped", "conv1d-depthwise", "first", "dilated", "transposed", "conv3d")
FAMILIES: dict[str, Callable[[Shape, Settings], Case]] = {
    f"{kind}{suffix}": function
    for kind in _KINDS
    for suffix, function in (("", forward), ("-backward", backward), ("-train", train))
}
FROZEN = _KINDS  # families in which a frozen weight means something
FORCED = ()
