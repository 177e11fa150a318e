"""`fastdl bench attention`: forward, backward and both, decoding, masks, growing lengths.

A family is one function from a shape and the settings to a `Case`; `FAMILIES` names them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdl import _C, functional
from fastdl.bench import place
from fastdl.bench.harness import Call, Case, Check
from fastdl.bench.operands import normal
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import Shape
from fastdl.ops import attention_reference as plain
from fastdl.ops.attention_native import empty_like
from fastdl.ops.attention_reference import UNBOUNDED, Options
from fastdl.testing import (
    PRODUCT_ERROR,
    UNIT_ROUNDOFF,
    assert_attention_within_bound,
    attention_reference,
    error_measures,
)

_CHECK_SCORES = 1 << 23  # scores that the float64 reference of one row may write out
_GRADIENT_FACTOR = 2.0  # rms error of a gradient against torch's own
FORCED = ("forward", "decode", "masks", "lengths")  # families in which a kernel can be forced
FROZEN = ()  # there is no weight to freeze


# --- operands ---------------------------------------------------------------------------------------------------
def _operands(shape: Shape, settings: Settings, requires_grad: bool = False) -> list[Tensor]:
    """query, key, value as a model has them: [B, L, H, D] in memory, seen as [B, H, L, D]."""
    B, H, Hkv, Lq, Lk, D = shape.sizes("B", "H", "Hkv", "Lq", "Lk", "D")
    sizes = (B, Lq, H, D), (B, Lk, Hkv, D), (B, Lk, Hkv, D)
    tensors = [normal(seed, settings.torch_dtype, *s).transpose(1, 2) for seed, s in enumerate(sizes, 1)]
    return [x.requires_grad_(requires_grad) for x in tensors]


def _mask(shape: Shape, settings: Settings) -> Tensor | None:
    """[B, 1, Lq, Lk], shared by the heads: four fifths of the keys seen, or a bias."""
    B, Lq, Lk = shape.sizes("B", "Lq", "Lk")
    if "bool_mask" in shape.tags:
        return normal(5, torch.float32, B, 1, Lq, Lk) < 0.84
    return normal(5, settings.torch_dtype, B, 1, Lq, Lk) if "float_mask" in shape.tags else None


def _options(shape: Shape) -> dict[str, Any]:
    H, Hkv = shape.sizes("H", "Hkv")
    dropout = 0.1 if "dropout" in shape.tags else 0.0
    return {"is_causal": "causal" in shape.tags, "enable_gqa": Hkv != H, "dropout_p": dropout}


def _pairs(shape: Shape) -> float:
    """Scores that are seen."""
    B, H, Lq, Lk = shape.sizes("B", "H", "Lq", "Lk")
    return float(B * H * (Lq * (2 * Lk - Lq + 1) / 2 if "causal" in shape.tags else Lq * Lk))


def _work(shape: Shape, settings: Settings, products: int) -> dict[str, float]:
    """A product: Q K^T or P V. Forward has 2 of them, backward 5."""
    B, H, Hkv, Lq, Lk, D = shape.sizes("B", "H", "Hkv", "Lq", "Lk", "D")
    values = 2 * B * D * (H * Lq + Hkv * Lk) * (2 if products > 2 else 1)
    return {"flops": 2.0 * products * _pairs(shape) * D, "bytes": float(values * settings.torch_dtype.itemsize)}


# --- checks -----------------------------------------------------------------------------------------------------
def _rows(shape: Shape) -> Tensor:
    """Query rows to compare with float64: all, or as many as the budget allows, evenly spread, ends included."""
    B, H, Lq, Lk = shape.sizes("B", "H", "Lq", "Lk")
    count = max(4, _CHECK_SCORES // (B * H * Lk))
    return torch.arange(Lq) if count >= Lq else torch.linspace(0, Lq - 1, count).round().long()


def _seen(shape: Shape, mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask of some query rows, the causal one included."""
    if mask is not None or "causal" not in shape.tags:
        return mask if mask is None else mask[:, :, rows]
    return (torch.arange(shape.dims["Lk"]) <= rows[:, None]).to(place.device())


def _assert_near_torch(name: str, actual: Tensor, theirs: Tensor, precision: str = "fma") -> None:
    """What a sample may miss: every element finite and near torch's, against the rms of the whole."""
    tolerance = 40 * max(UNIT_ROUNDOFF[actual.dtype], PRODUCT_ERROR[precision]) ** 0.75
    difference = (actual.float() - theirs.float()).abs_()
    size = theirs.float().square().mean().sqrt()
    wrong = int((~(difference <= tolerance * (theirs.float().abs() + size))).sum())
    if wrong:
        raise AssertionError(f"{name}: {wrong} of {actual.numel()} elements are far from torch's, or not finite")


def _check_output(
    shape: Shape, operands: list[Tensor], mask: Tensor | None, ours: Tensor, theirs: Tensor, precision: str
) -> tuple[float, float]:
    """rms(err/S) of both results on a sample of rows; AssertionError beyond the bound."""
    query, key, value = operands
    rows = _rows(shape)
    scale = query.shape[-1] ** -0.5
    reference = attention_reference(query[:, :, rows], key, value, _seen(shape, mask, rows), scale=scale)
    error = assert_attention_within_bound(ours[:, :, rows], reference, precision=precision).rms
    return error, error_measures(theirs[:, :, rows], reference.expected, reference.scale).rms


def _check_forward(
    shape: Shape, operands: list[Tensor], mask: Tensor | None, ours: Tensor, theirs: Tensor, precision: str
) -> Check:
    if "dropout" in shape.tags:  # drawn differently: only that what is kept averages out
        mean, wanted = ours.double().mean().item(), theirs.double().mean().item()
        near = abs(mean - wanted) < 0.05 and bool(ours.isfinite().all())
        return Check(0.0, 0.0, "" if near else f"output: mean {mean}, torch's {wanted}")
    try:
        _assert_near_torch("output", ours, theirs, precision)
        return Check(*_check_output(shape, operands, mask, ours, theirs, precision))
    except AssertionError as failure:
        return Check(0.0, 0.0, f"output: {failure}")


def _check_gradients(shape: Shape, operands: list[Tensor], grad: Tensor, ours: Any, theirs: Any) -> Check:
    """Every element near torch's; one group of heads of the last batch against float64, in rms."""
    group = shape.dims["H"] // shape.dims["Hkv"]
    error = torch_error = 0.0
    try:
        if "dropout" in shape.tags:
            for name, actual in zip(("dq", "dk", "dv"), ours, strict=True):
                if not bool(actual.isfinite().all()):
                    raise AssertionError(f"{name}: not finite")
            return Check(0.0, 0.0)
        query, key, value = (x.detach()[-1:, -n:].double() for x, n in zip(operands, (group, 1, 1), strict=True))
        bounds = (UNBOUNDED[0], 0) if "causal" in shape.tags else UNBOUNDED
        options = Options(query.shape[-1] ** -0.5, *bounds)
        last = grad[-1:, -group:].double()
        expected = plain.attention_backward(last, query, key, value, None, None, None, None, options)
        for name, actual, wanted, exact, n in zip(
            ("dq", "dk", "dv"), ours, theirs, expected, (group, 1, 1), strict=False
        ):
            _assert_near_torch(name, actual, wanted)
            size = exact.square().mean().sqrt()
            mine, yours = (
                ((x[-1:, -n:].double() - exact).square().mean().sqrt() / size).item() for x in (actual, wanted)
            )
            error, torch_error = max(error, mine), max(torch_error, yours)
            limit = _GRADIENT_FACTOR * yours + 4 * UNIT_ROUNDOFF[actual.dtype]
            if not mine <= limit:
                raise AssertionError(f"{name}: relative rms error {mine:.2e} exceeds {limit:.2e} (torch's {yours:.2e})")
    except AssertionError as failure:
        return Check(error, torch_error, str(failure))
    return Check(error, torch_error)


# --- families ---------------------------------------------------------------------------------------------------
def _forced(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, **_: Any
) -> Tensor:
    out = empty_like(query, value.shape[3])
    mask = mask if mask is None else mask.expand(-1, -1, query.shape[2], key.shape[2])
    hi = 0 if is_causal else UNBOUNDED[1]
    _C.attention(out, None, query, key, value, mask, scale=query.shape[3] ** -0.5, hi=hi, kernel=kernel)
    return out


def _backends(candidate: Call, baseline: Call) -> dict[str, tuple[Call, Call]]:
    """On a GPU: torch held to each of its own implementations that takes the call."""
    if place.current != "cuda":
        return {}

    def held(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return baseline()

    parts = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        call = partial(held, getattr(SDPBackend, name))
        try:
            call()
        except RuntimeError:  # it does not take this
            continue
        parts[f"torch's {name}"] = candidate, call
    return parts


def forward(shape: Shape, settings: Settings) -> Case:
    """Without grad; with a mask, also against fastdl's own time without it."""
    operands, mask, options = _operands(shape, settings), _mask(shape, settings), _options(shape)
    attend = partial(_forced, settings.kernel) if settings.kernel else functional.scaled_dot_product_attention
    candidate = partial(attend, *operands, mask, **options)
    baseline = partial(F.scaled_dot_product_attention, *operands, mask, **options)
    case = Case(
        candidate,
        baseline,
        lambda: _check_forward(shape, operands, mask, candidate(), baseline(), settings.precision),
        **_work(shape, settings, 2),
    )
    case.parts |= _backends(candidate, baseline)
    if mask is not None:
        case.parts["without mask"] = (candidate, partial(attend, *operands, None, **options))
    return case


def backward(shape: Shape, settings: Settings) -> Case:
    """Gradients of query, key and value through autograd, the forward pass left out."""
    operands, options = _operands(shape, settings, True), _options(shape)
    grad = normal(4, settings.torch_dtype, *operands[0].transpose(1, 2).shape).transpose(1, 2)
    candidate, baseline = (
        partial(torch.autograd.grad, attend(*operands, **options), operands, grad, retain_graph=True)
        for attend in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    return Case(
        candidate,
        baseline,
        lambda: _check_gradients(shape, operands, grad, candidate(), baseline()),
        grad=True,
        **_work(shape, settings, 5),
    )


def train(shape: Shape, settings: Settings) -> Case:
    """Forward and backward."""
    operands, options = _operands(shape, settings, True), _options(shape)
    grad = normal(4, settings.torch_dtype, *operands[0].transpose(1, 2).shape).transpose(1, 2)

    def step(attend: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(attend(*operands, **options), operands, grad)

    candidate = partial(step, functional.scaled_dot_product_attention)
    baseline = partial(step, F.scaled_dot_product_attention)
    return Case(
        candidate,
        baseline,
        lambda: _check_gradients(shape, operands, grad, candidate(), baseline()),
        kernel_calls=2,
        grad=True,
        **_work(shape, settings, 7),
    )


FAMILIES: dict[str, Callable[[Shape, Settings], Case]] = {
    "forward": forward,
    "backward": backward,
    "train": train,
    "decode": forward,
    "masks": forward,
    "lengths": forward,
}
