"""Checks of attention for `fastdl verify`: every kernel of its table, and the operation with its gradients.

Exact: where one key has all the weight, or all keys have the same and are a power of two, the output is known bit for
bit. Bound: `testing.attention_bound`, and gradients against float64 in rms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdl import _C, functional
from fastdl.ops.attention_reference import UNBOUNDED
from fastdl.testing import (
    UNIT_ROUNDOFF,
    GuardedOutput,
    assert_attention_within_bound,
    attention_reference,
    integer_matrix,
)

Step = tuple[str, str, Callable[[], None]]
"""(subject, what is checked, the check, which raises AssertionError)."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISION = {row["name"]: row["precision"] for row in _C.kernels("attention")}
_GRADIENT_UNITS = 32  # relative rms error of a gradient, in units of roundoff


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _run(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> GuardedOutput:
    """_C.attention into a guarded output."""
    out = GuardedOutput((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    mask = mask if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    options = {"scale": q.shape[3] ** -0.5, "lo": UNBOUNDED[0], "hi": UNBOUNDED[1]} | options
    _C.attention(out.view, None, q, k, v, mask, kernel=kernel, **options)
    out.assert_guards_intact()
    return out


def _assert_equal(actual: Tensor, expected: Tensor) -> None:
    wrong = (actual != expected).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {actual.numel()} elements wrong, first at {where}: "
            f"got {actual[where].item()}, expected {expected[where].item()}"
        )


def _check_selected(kernel: str, dtype: torch.dtype, Lq: int, Lk: int, D: int) -> None:
    """Equal scores, one key in sight, chosen by a bool mask, an additive mask, or a window: O is that row of V."""
    generator = torch.Generator().manual_seed(Lq * 7919 + Lk * 31 + D)
    q, k = _normal(generator, dtype, 2, 2, Lq, D), _normal(generator, dtype, 2, 1, Lk, D)
    v = integer_matrix((2, 1, Lk, D), 1, generator, dtype)
    chosen = torch.randint(Lk, (2, 2, Lq), generator=generator)
    seen = torch.zeros(2, 2, Lq, Lk, dtype=torch.bool).scatter_(3, chosen[..., None], True)
    expected = v.expand(2, 2, Lk, D).gather(2, chosen[..., None].expand(2, 2, Lq, D))
    _assert_equal(_run(kernel, q, k, v, seen, scale=0.0).view, expected)
    added = torch.full(seen.shape, -torch.inf).masked_fill(seen, 0.0).to(dtype)
    _assert_equal(_run(kernel, q, k, v, added, scale=0.0).view, expected)
    rows = torch.arange(Lq)
    diagonal = torch.where(
        (rows < Lk)[:, None], v[:, :, rows.clamp(max=max(Lk - 1, 0))], torch.zeros((), dtype=dtype)
    ).expand(2, 2, Lq, D)
    _assert_equal(_run(kernel, q, k, v, lo=0, hi=0, scale=0.0).view, diagonal)


def _check_mean(kernel: str, dtype: torch.dtype, Lq: int, Lk: int, D: int) -> None:
    """Equal scores of a power of two of keys: O is the mean of V, exact for small integers."""
    n = 1 << (Lk.bit_length() - 1)
    generator = torch.Generator().manual_seed(Lq + Lk)
    q, k = torch.zeros(1, 2, Lq, D, dtype=dtype), _normal(generator, dtype, 1, 2, Lk, D)
    v = integer_matrix((1, 2, Lk, D), 1, generator, torch.float32).to(dtype)
    seen = torch.arange(Lk) < n
    expected = (v.double()[:, :, :n].sum(2, keepdim=True) / n).to(dtype).expand(1, 2, Lq, D)
    _assert_equal(_run(kernel, q, k, v, seen).view, expected)


_BANDS = {"full": {}, "causal": {"hi": 0}, "window": {"lo": -5, "hi": 3}}


def _check_bound(kernel: str, dtype: torch.dtype, Lq: int, Lk: int, D: int, band: str, mask: str) -> None:
    generator = torch.Generator().manual_seed(Lq * 31 + Lk * 7 + D)
    q = _normal(generator, dtype, 1, 4, Lq, D)
    k, v = _normal(generator, dtype, 1, 2, Lk, D), _normal(generator, dtype, 1, 2, Lk, D + 3)
    given = None
    if mask == "bool":
        given = torch.rand(1, 1, Lq, Lk, generator=generator) < 0.7
    elif mask == "float":
        given = _normal(generator, torch.float32, 1, 4, Lq, Lk)
    softcap = 2.0 if mask == "softcap" else 0.0
    out = _run(kernel, q, k, v, given, softcap=softcap, **_BANDS[band])
    distance = torch.arange(Lk) - torch.arange(Lq)[:, None]
    lo, hi = (_BANDS[band].get(name, limit) for name, limit in zip(("lo", "hi"), UNBOUNDED, strict=True))
    seen = (distance >= lo) & (distance <= hi)
    if given is None:
        merged = seen
    else:
        merged = given & seen if given.dtype == torch.bool else given.masked_fill(~seen, -torch.inf)
    reference = attention_reference(q, k, v, merged, scale=D**-0.5, softcap=softcap)
    assert_attention_within_bound(out.view, reference, precision=_PRECISION[kernel])


def _check_threads(kernel: str, dtype: torch.dtype, Lq: int, Lk: int, D: int) -> None:
    """The same bits on one thread and on three."""
    generator = torch.Generator().manual_seed(13)
    q, k, v = (_normal(generator, dtype, 2, 3, n, D) for n in (Lq, Lk, Lk))
    outs = [_run(kernel, q, k, v, threads=threads, hi=0, dropout_p=0.2, seed=5).view for threads in (1, 3)]
    if not torch.equal(*outs):
        raise AssertionError(f"{int((outs[0] != outs[1]).sum())} elements differ between 1 and 3 threads")


def kernel_steps(row: dict[str, Any], quick: bool) -> Iterator[Step]:
    """Lengths around the register tile and the key block."""
    kernel, dtype, mr, nr = row["name"], _DTYPES[row["dtype"]], row["mr"], row["nr"]
    block = row.get("key_block") or 4 * nr
    queries = (1, mr + 1) if quick else (1, mr - 1, mr, mr + 1, 3 * mr + 2)
    keys = (1, nr + 1) if quick else (1, nr - 1, nr, nr + 1, block - 1, block + 1)
    dims = (5,) if quick else (1, 8, 33, 64)
    for Lq, Lk, D in itertools.product(queries, keys, dims):
        what = f"{Lq}x{Lk}x{D}"
        yield kernel, f"exact selection {what}", partial(_check_selected, kernel, dtype, Lq, Lk, D)
        yield kernel, f"exact mean {what}", partial(_check_mean, kernel, dtype, Lq, Lk, D)
        for band, mask in itertools.product(_BANDS, ("none", "bool", "float", "softcap")):
            if quick and mask != "none" and band != "full":
                continue
            yield kernel, f"bound {what} {band} {mask}", partial(_check_bound, kernel, dtype, Lq, Lk, D, band, mask)
    yield kernel, "threads", partial(_check_threads, kernel, dtype, 3 * mr + 1, 2 * nr + 3, 24)
    if not quick:
        for band in _BANDS:
            what = f"bound beyond the blocks {band}"
            yield kernel, what, partial(_check_bound, kernel, dtype, 4 * mr + 3, 2 * block + 7, 40, band, "float")


def _check_operation(dtype: torch.dtype, options: dict[str, Any], with_mask: bool) -> None:
    """functional.scaled_dot_product_attention with all its gradients, as a model calls it, against float64."""
    generator = torch.Generator().manual_seed(3)
    sizes = (2, 4, 37, 24), (2, 2, 45, 24), (2, 2, 45, 20)
    leaves = [_normal(generator, dtype, *s) for s in sizes]
    if with_mask:
        leaves.append(_normal(generator, dtype, 1, 4, 37, 45))
    results = []
    for tensors in (leaves, [x.double() for x in leaves]):
        tensors = [x.clone().requires_grad_() for x in tensors]
        torch.manual_seed(1)
        out = functional.scaled_dot_product_attention(*tensors, enable_gqa=True, **options)
        dy = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
        results.append((out, *torch.autograd.grad(out, tensors, dy.to(out.dtype))))
    for name, actual, expected in zip(("output", "dq", "dk", "dv", "dmask"), *results, strict=False):
        size = expected.square().mean().sqrt()
        error = ((actual.double() - expected).square().mean().sqrt() / size).item()
        limit = _GRADIENT_UNITS * UNIT_ROUNDOFF[dtype]
        if not error <= limit:
            raise AssertionError(f"{name}: relative rms error {error:.2e} exceeds {limit:.2e}")


def operation_steps(quick: bool) -> Iterator[Step]:
    """The operation with gradients, over pairs of options."""
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"is_causal": True},
        "dropout": {"dropout_p": 0.2},
        "window softcap": {"window": (7, 2), "softcap": 1.5},
    }
    for (name, dtype), (case, options), mask in itertools.product(_DTYPES.items(), cases.items(), (False, True)):
        if not (mask and (case == "causal" or quick)):
            what = f"{name} {case}{' mask' if mask else ''}"
            yield "functional.scaled_dot_product_attention", what, partial(_check_operation, dtype, options, mask)
