"""`fastdl verify` on a GPU, or on the host twin of its kernels: every operation as a model calls it, against float64.

A call that was handed to torch is no check: it is reported as not run, with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastdl
from fastdl import functional
from fastdl.ops import calls
from fastdl.testing import (
    UNIT_ROUNDOFF,
    assert_attention_within_bound,
    assert_within_bound,
    attention_reference,
    gemm_reference,
    integer_matrix,
    twin,
)
from fastdl.verify_attention import Step

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NotRun(Exception):
    """torch ran the call, for this reason."""


class Place:
    """Makes operands on a device, and sees that fastdl's kernels ran."""

    def __init__(self, name: str) -> None:
        self._twin = name == "twin"
        self.device = torch.device("cpu" if self._twin else "cuda")

    def normal(self, seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(self.device)

    def integers(self, seed: int, dtype: torch.dtype, K: int, *shape: int) -> Tensor:
        return integer_matrix(shape, K, torch.Generator().manual_seed(seed), dtype).to(self.device)

    def run(self, call: Callable[[], Any]) -> Any:
        """The call's result; NotRun where a part of it was handed to torch."""
        seen: list[calls.Call] = []
        before, calls.observer = calls.observer, seen.append
        try:
            with twin() if self._twin else nullcontext():
                result = call()
        finally:
            calls.observer = before
        reasons = sorted({made.reason for made in seen if made.reason})
        if reasons or not seen:
            raise NotRun("; ".join(reasons) or "fastdl was not called")
        return result


def _gradients(run: Callable[..., Tensor], operands: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in operands]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def _check_linear(place: Place, dtype: torch.dtype, exact: bool, sizes: tuple[int, int, int]) -> None:
    """Output and all gradients."""
    M, N, K = sizes
    shapes = (M, K), (N, K), (N,), (M, N)
    x, w, b, dy = (
        place.integers(i, dtype, max(sizes), *s) if exact else place.normal(i, dtype, *s) for i, s in enumerate(shapes)
    )
    y, dx, dw, db = place.run(lambda: _gradients(functional.linear, [x, w, b], dy))
    ones = torch.ones(1, M, dtype=dtype, device=place.device)
    products = ((y, x, w.mT, b), (dx, dy, w, None), (dw, dy.mT, x, None), (db[None], ones, dy, None))
    for name, (actual, *operands) in zip(("y", "dx", "dw", "db"), products, strict=True):
        reference = gemm_reference(*operands)
        if not exact:
            assert_within_bound(actual, reference, precision="ieee" if dtype == torch.float32 else "fma")
        elif not torch.equal(actual, reference.expected.to(dtype)):
            wrong = int((actual != reference.expected.to(dtype)).sum())
            raise AssertionError(f"{name}: {wrong} of {actual.numel()} elements wrong")


def _check_attention(place: Place, dtype: torch.dtype, Lq: int, Lk: int, D: int) -> None:
    q, k, v = (place.normal(i, dtype, 1, 2, L, D) for i, L in enumerate((Lq, Lk, Lk)))
    out = place.run(lambda: functional.scaled_dot_product_attention(q, k, v))
    assert_attention_within_bound(out, attention_reference(q, k, v, None, scale=D**-0.5))


def _check_near(
    place: Place, run: Callable[..., Tensor], theirs: Callable[..., Tensor], operands: list[Tensor]
) -> None:
    """Output and gradients against torch in float64, by the largest element: what has no bound of its own here."""
    dtype = operands[0].dtype
    with torch.no_grad():
        shape = theirs(*(t.double() for t in operands)).shape
    dy = place.normal(9, dtype, *shape)
    actual = place.run(lambda: _gradients(run, operands, dy))
    expected = _gradients(theirs, [t.double() for t in operands], dy.double())
    limit = 64 * (UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF[torch.float32])
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = ((a.double() - e).abs().max() / e.abs().max()).item()
        if not error <= limit:
            raise AssertionError(f"result {number}: off by {error:.1e} of the largest element, allowed {limit:.1e}")


def _recurrent(library: Any, cls: str, H: int, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    layer = getattr(library, cls)(x.shape[-1], H, bias=False, device="meta")
    layer._parameters.update(weight_ih_l0=w, weight_hh_l0=u)
    layer._flat_weights = [w, u]
    return layer(x)[0]


def _check_conv(place: Place, dtype: torch.dtype, groups: int) -> None:
    options = {"padding": 1, "groups": groups}
    operands = [place.normal(1, dtype, 2, 8, 7, 6), place.normal(2, dtype, 16, 8 // groups, 3, 3)]
    with torch.backends.cudnn.flags(allow_tf32=False):
        _check_near(place, partial(functional.conv2d, **options), partial(F.conv2d, **options), operands)


def _check_recurrent(place: Place, dtype: torch.dtype, cls: str) -> None:
    H, gates = 12, {"LSTM": 4, "GRU": 3}[cls]
    shapes = (4, 3, 10), (gates * H, 10), (gates * H, H)
    operands = [place.normal(i, dtype, *s).div_(2) for i, s in enumerate(shapes)]
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours, theirs = (partial(_recurrent, library, cls, H) for library in (fastdl.nn, torch.nn))
        _check_near(place, ours, theirs, operands)


def steps(quick: bool, name: str) -> Iterator[Step]:
    """Every check, on the device "cuda" or on the "twin"."""
    place = Place(name)
    linears = [(1, 20, 17), (17, 35, 20)] + ([] if quick else [(130, 65, 257), (64, 300, 64), (3, 7, 2000)])
    lengths = [(5, 33, 16)] + ([] if quick else [(70, 70, 64), (1, 300, 128), (65, 129, 40)])
    for dtype in _DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for sizes, exact in itertools.product(linears, (True, False)):
            what = f"{'exact' if exact else 'bound'} {kind} {'x'.join(map(str, sizes))}"
            yield f"{name}: linear", what, partial(_check_linear, place, dtype, exact, sizes)
        for L in lengths:
            yield f"{name}: attention", f"{kind} {'x'.join(map(str, L))}", partial(_check_attention, place, dtype, *L)
        for groups in (1, 2, 8):
            yield f"{name}: conv2d", f"{kind} groups {groups}", partial(_check_conv, place, dtype, groups)
        for cls in ("LSTM", "GRU"):
            yield f"{name}: {cls.lower()}", kind, partial(_check_recurrent, place, dtype, cls)
