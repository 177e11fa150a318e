"""`fastdl bench gemm`: linear forward, backward and both, plain and batched products, small sizes, call overhead.

A family is one function from a shape and the settings to a `Case`; `FAMILIES` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdl
from fastdl import _C, functional
from fastdl.bench.harness import Case, Check
from fastdl.bench.operands import normal
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import Shape
from fastdl.testing import (
    PRODUCT_ERROR,
    UNIT_ROUNDOFF,
    assert_within_bound,
    epilogue_bound,
    error_measures,
    gemm_reference,
)

_FRESH_PAGES = 32 << 20  # bytes of output from which every call gets, and pays for, a fresh mapping
_CHECK_FLOPS = 2e9  # what the float64 reference of one row may cost


# --- checks -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Product:
    """One result of a call, by fastdl and by torch, and the operands it is the product of: a @ b + bias."""

    name: str
    actual: Tensor  # [..., M, N]
    torch_actual: Tensor
    a: Tensor  # [..., M, K]
    b: Tensor  # [..., K, N]
    bias: Tensor | None = None


def _sample(M: int, flops_a_row: float) -> Tensor:
    """Rows to compare with float64: all of them, or as many as the budget allows, evenly spread, ends included."""
    count = max(16, int(_CHECK_FLOPS / flops_a_row))
    return torch.arange(M) if count >= M else torch.linspace(0, M - 1, count).round().long()


def _assert_near_torch(p: Product, precision: str) -> None:
    """Every element within both results' bounds of torch's, by |a_i| |b_j| >= S: what a sample of rows may miss."""
    sums = (p.a.shape[-1] + 1) * UNIT_ROUNDOFF[torch.float32]
    scale = p.a.float().norm(dim=-1)[..., None] * p.b.float().norm(dim=-2)[..., None, :]
    limit = scale.mul_(4 * (sums + UNIT_ROUNDOFF[p.actual.dtype] + PRODUCT_ERROR[precision]))
    wrong = int(((p.actual.float() - p.torch_actual.float()).abs_() > limit).sum())
    if wrong or not bool(p.actual.isfinite().all()):
        raise AssertionError(f"{wrong} of {p.actual.numel()} elements are far from torch's, or not finite")


def check_products(products: list[Product], precision: str = "fma") -> Check:
    """Errors of the worst product; the failure names the product. precision: of the kernel."""
    error = torch_error = 0.0
    for p in products:
        try:
            rows = _sample(p.a.shape[-2], flops_a_row=2 * p.b.numel())
            if len(rows) < p.a.shape[-2]:
                _assert_near_torch(p, precision)
            reference = gemm_reference(p.a[..., rows, :], p.b, p.bias)
            error = max(error, assert_within_bound(p.actual[..., rows, :], reference, precision=precision).rms)
            theirs = error_measures(p.torch_actual[..., rows, :], reference.expected, reference.scale)
            torch_error = max(torch_error, theirs.rms)
        except AssertionError as failure:
            return Check(error, torch_error, f"{p.name}: {failure}")
    return Check(error, torch_error)


# --- operands ---------------------------------------------------------------------------------------------------
def _linear_operands(shape: Shape, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(input, weight, bias); the parameters require grad, as those of a model do."""
    M, N, K = shape.sizes("M", "N", "K")
    x = normal(1, settings.torch_dtype, M, K)
    weight = normal(2, settings.torch_dtype, N, K).div_(math.sqrt(K))
    return x, weight.requires_grad_(), normal(3, settings.torch_dtype, N).requires_grad_()


def _training_operands(shape: Shape, settings: Settings) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((input, weight, bias), gradient of the output): a layer in the middle of a model."""
    x, weight, bias = _linear_operands(shape, settings)
    return (x.requires_grad_(), weight, bias), normal(4, x.dtype, x.shape[0], weight.shape[0])


def _work(shape: Shape, settings: Settings, products: int = 1) -> dict[str, float]:
    batch, M, N, K = shape.sizes("batch", "M", "N", "K")
    values = products * batch * (M * K + K * N + M * N)
    return {"flops": 2.0 * products * batch * M * N * K, "bytes": float(values * settings.torch_dtype.itemsize)}


# --- families ---------------------------------------------------------------------------------------------------
def _forced_linear(kernel: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    _C.linear(out, x, weight.detach(), bias.detach(), kernel)
    return out


def _frozen_pair(weight: Tensor, bias: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A frozen fastdl layer and torch's, over the same parameters."""
    N, K = weight.shape
    layers = []
    for _ in range(2):
        layer = torch.nn.Linear(K, N, device="meta")
        layer.weight, layer.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
        layers.append(layer)
    return fastdl.freeze(fastdl.optimize(layers[0])), layers[1]


def forward(shape: Shape, settings: Settings) -> Case:
    """linear without grad; from 32 MB of output on, also into an output that exists."""
    x, weight, bias = _linear_operands(shape, settings)
    if settings.frozen:
        ours, theirs = _frozen_pair(weight, bias)
        candidate, baseline = partial(ours, x), partial(theirs, x)
    else:
        linear = partial(_forced_linear, settings.kernel) if settings.kernel else functional.linear
        candidate, baseline = partial(linear, x, weight, bias), partial(F.linear, x, weight, bias)
    case = Case(
        candidate,
        baseline,
        lambda: check_products([Product("output", candidate(), baseline(), x, weight.mT, bias)], settings.precision),
        **_work(shape, settings),
    )
    if x.dtype != torch.float32:  # speedup of this part: the time of our own float32 / that of this dtype
        full = [t.detach().float() for t in (x, weight, bias)]
        case.parts["own float32"] = (candidate, partial(functional.linear, *full))
    out = x.new_empty(x.shape[0], weight.shape[0])
    if out.nbytes >= _FRESH_PAGES and not settings.frozen and settings.device == "cpu":
        w, b = weight.detach(), bias.detach()
        case.parts["existing output"] = (
            partial(_C.linear, out, x, w, b, settings.kernel),
            partial(torch.addmm, b, x, w.mT, out=torch.empty_like(out)),
        )
    return case


def _check_gradients(operands: tuple[Tensor, Tensor, Tensor], dy: Tensor, ours: Any, theirs: Any) -> Check:
    x, weight, _ = operands
    dx, dw, db = ours
    torch_dx, torch_dw, torch_db = theirs
    return check_products(
        [
            Product("dx", dx, torch_dx, dy, weight.detach()),
            Product("dw", dw, torch_dw, dy.mT, x.detach()),
            Product("dbias", db[None], torch_db[None], torch.ones_like(dy[:, :1]).mT, dy),
        ]
    )


def backward(shape: Shape, settings: Settings) -> Case:
    """Gradients of input, weight and bias through autograd, the forward pass left out."""
    operands, dy = _training_operands(shape, settings)
    candidate, baseline = (
        partial(torch.autograd.grad, linear(*operands), operands, dy, retain_graph=True)
        for linear in (functional.linear, F.linear)
    )
    return Case(
        candidate,
        baseline,
        lambda: _check_gradients(operands, dy, candidate(), baseline()),
        kernel_calls=2,
        grad=True,
        **_work(shape, settings, products=2),
    )


def train(shape: Shape, settings: Settings) -> Case:
    """Forward and backward."""
    operands, dy = _training_operands(shape, settings)

    def step(linear: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(linear(*operands), operands, dy)

    candidate, baseline = partial(step, functional.linear), partial(step, F.linear)
    return Case(
        candidate,
        baseline,
        lambda: _check_gradients(operands, dy, candidate(), baseline()),
        kernel_calls=3,
        grad=True,
        **_work(shape, settings, products=3),
    )


def overhead_train(shape: Shape, settings: Settings) -> Case:
    """Forward and backward; the forward pass, recording for autograd, is also timed alone."""
    case = train(shape, settings)
    operands, _ = _training_operands(shape, settings)
    case.parts["forward only"] = (partial(functional.linear, *operands), partial(F.linear, *operands))
    return case


def _forced_matmul(kernel: str, a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    _C.gemm(out, a, b, kernel=kernel)
    return out


def matmul(shape: Shape, settings: Settings) -> Case:
    """A product of two contiguous matrices, or of batches of them; B transposed where the shape says so."""
    batch, M, N, K = shape.sizes("batch", "M", "N", "K")
    lead = (batch,) if batch > 1 else ()
    a = normal(1, settings.torch_dtype, *lead, M, K)
    if "transpose_b" in shape.tags:
        b = normal(2, settings.torch_dtype, *lead, N, K).mT
    else:
        b = normal(2, settings.torch_dtype, *lead, K, N)
    multiply = partial(_forced_matmul, settings.kernel) if settings.kernel else functional.matmul
    candidate, baseline = partial(multiply, a, b), partial(torch.matmul, a, b)
    case = Case(
        candidate,
        baseline,
        lambda: check_products([Product("output", candidate(), baseline(), a, b)], settings.precision),
        **_work(shape, settings),
    )
    out = a.new_empty(*lead, M, N)
    if out.nbytes >= _FRESH_PAGES and settings.device == "cpu":
        case.parts["existing output"] = (
            partial(_C.gemm, out, a, b, kernel=settings.kernel),
            partial(torch.matmul, a, b, out=torch.empty_like(out)),
        )
    return case


def _check_gelu(x: Tensor, weight: Tensor, bias: Tensor, ours: Tensor, theirs: Tensor) -> Check:
    """gelu(linear) on a sample of rows against float64; every element near torch's."""
    rows = _sample(x.shape[0], flops_a_row=2 * weight.numel())
    reference = gemm_reference(x[rows], weight.mT, bias)
    expected = F.gelu(reference.expected)
    error, torch_error = (error_measures(t[rows], expected, reference.scale).rms for t in (ours, theirs))
    wrong = int(((ours[rows].double() - expected).abs() > epilogue_bound(reference, expected, 0.0, x.dtype)).sum())
    # torch rounds to the dtype before GELU as well: its error stands for both.
    unit = 4 * (UNIT_ROUNDOFF[x.dtype] + (x.shape[-1] + 1) * UNIT_ROUNDOFF[torch.float32])
    scale = x.float().norm(dim=-1)[:, None] * weight.detach().float().norm(dim=-1) + bias.detach().float().abs()
    far = int(((ours.float() - theirs.float()).abs() > unit * scale).sum())
    return Check(
        error, torch_error, f"gelu: {wrong} elements beyond the bound, {far} far from torch's" * (wrong + far > 0)
    )


def gelu(shape: Shape, settings: Settings) -> Case:
    """linear and GELU without grad: fastdl's one pass against torch's two calls."""
    x, weight, bias = _linear_operands(shape, settings)
    if settings.frozen:
        ours, layer = _frozen_pair(weight, bias)
        candidate, baseline = partial(ours, x, activation="gelu"), lambda: F.gelu(layer(x))
    else:
        candidate = partial(functional.linear, x, weight, bias, activation="gelu")
        baseline = lambda: F.gelu(F.linear(x, weight, bias))  # noqa: E731
    return Case(
        candidate,
        baseline,
        lambda: _check_gelu(x, weight, bias, candidate(), baseline()),
        **_work(shape, settings),
    )


def gelu_train(shape: Shape, settings: Settings) -> Case:
    """Forward and backward of linear and GELU, fused against torch's two calls; checked through the pre-activation."""
    operands, dy = _training_operands(shape, settings)
    x, weight, bias = operands

    def ours() -> Any:
        return torch.autograd.grad(functional.linear(x, weight, bias, activation="gelu"), operands, dy)

    def theirs() -> Any:
        return torch.autograd.grad(F.gelu(F.linear(x, weight, bias)), operands, dy)

    def check() -> Check:
        z = functional.linear(x, weight, bias).detach()
        dz = torch.ops.fastdl.activation_grad(dy, z, "gelu")
        return _check_gradients(operands, dz, ours(), theirs())

    return Case(ours, theirs, check, kernel_calls=3, grad=True, **_work(shape, settings, products=3))


FAMILIES: dict[str, Callable[[Shape, Settings], Case]] = {
    "forward": forward,
    "backward": backward,
    "train": train,
    "matmul": matmul,
    "batched": matmul,
    "one-row": forward,
    "few-rows": forward,
    "gelu": gelu,
    "gelu-train": gelu_train,
    "small": forward,
    "overhead": forward,
    "overhead-train": overhead_train,
}
FROZEN = (
    "forward",
    "one-row",
    "few-rows",
    "gelu",
    "small",
    "overhead",
)  # families in which a frozen weight means something
FORCED = ("forward", "matmul", "batched", "one-row", "few-rows", "small")  # families in which a kernel can be forced
