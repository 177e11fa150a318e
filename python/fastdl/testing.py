"""What "correct" means: float64 references, error measures, exact-integer data, layouts and guard bands.

Shared by the tests, `fastdl verify` and `fastdl bench`; needs torch only, but for `twin`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What a product of float32 operands may be off by, of its size, by the precision of the kernel: operands are cut to
# one, two or three parts of 8 bits, rounded, and products of small parts are left out.
PRODUCT_ERROR = {"fma": 0.0, "ieee": 2.0**-24, "tf32": 3 * 2.0**-16, "bf16": 2.0**-7 + 2.0**-16}
QUALITY_FACTOR = 1.25  # rms(err/S) against torch's own
ROW_QUALITY_FACTOR = 2.0  # low precision: rms(err/S) of every row against torch's own
EXACT_BITS = 23  # sums of integer_matrix products stay below 2^23; the 24th bit is left to bias and accumulate


# --- references ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GemmReference:
    """The product in float64 on the operands as they are, and S, the same on absolute values."""

    expected: Tensor  # [..., M, N] float64
    scale: Tensor  # [..., M, N] float64
    depth: int  # roundings on the way to one element: K products and the bias and accumulate adds


def gemm_reference(a: Tensor, b: Tensor, bias: Tensor | None = None, initial: Tensor | None = None) -> GemmReference:
    """Float64 reference of `initial + a @ b + bias`: a [..., M, K], b [..., K, N], bias [N], initial [..., M, N]."""
    a64, b64 = a.detach().double(), b.detach().double()
    expected, scale, depth = a64 @ b64, a64.abs() @ b64.abs(), a.shape[-1]
    for term in (bias, initial):
        if term is not None:
            expected = expected + term.detach().double()
            scale = scale + term.detach().double().abs()
            depth += 1
    return GemmReference(expected, scale, depth)


def sum_reference(run: Callable[..., Tensor], operands: Sequence[Tensor | None], depth: int) -> GemmReference:
    """Float64 reference of any sums of products, run(*operands), of at most `depth` terms each: a convolution, say."""
    doubles = [None if x is None else x.detach().double() for x in operands]
    return GemmReference(run(*doubles), run(*(None if x is None else x.abs() for x in doubles)), depth)


# --- error measures -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ErrorMeasures:
    """Measures of err/S over the elements whose reference, rounded to the result's dtype, is finite."""

    max: float
    rms: float
    rms_per_row_max: float  # the worst row: rms over the last dimension


def _relative_error(actual: Tensor, expected64: Tensor, scale64: Tensor) -> Tensor:
    """err/S in float64; 0 where the reference is not finite, inf where an error stands against S = 0."""
    err = (actual.detach().double() - expected64).abs()
    ratio = torch.where(err == 0, torch.zeros_like(err), err / scale64)
    return torch.where(torch.isfinite(expected64.to(actual.dtype)), ratio, torch.zeros_like(ratio))


def _rms_per_row(ratio: Tensor) -> Tensor:
    return ratio.square().mean(dim=-1).sqrt()


def error_measures(actual: Tensor, expected64: Tensor, scale64: Tensor) -> ErrorMeasures:
    """Max, rms and worst row rms of |actual - expected64| / scale64; all 0 for an empty result."""
    if actual.numel() == 0:
        return ErrorMeasures(0.0, 0.0, 0.0)
    ratio = _relative_error(actual, expected64, scale64)
    rows = _rms_per_row(ratio.reshape(-1, ratio.shape[-1]) if ratio.dim() else ratio.reshape(1, 1))
    return ErrorMeasures(ratio.max().item(), ratio.square().mean().sqrt().item(), rows.max().item())


def gemm_bound(
    K: int, S: Tensor, C: Tensor, dtype: torch.dtype, *, flush_denormal: bool = False, precision: str = "fma"
) -> Tensor:
    """Elementwise bound g*S + u_out*(|C| + g*S), g = h*u/(1 - h*u), for a sum of float32 products.

    K is h, the depth of the sum: the inner dimension plus one for each bias or accumulate add. S and C are float64.
    The last terms are what gradual underflow may cost each float32 rounding and the one to `dtype`; with
    `flush_denormal`, what flushing a product or a sum to zero may cost (operands being normal numbers); a kernel whose
    `precision` is not "fma" does that too, in each of up to six products, and g grows by its PRODUCT_ERROR.
    """
    u, u_out = UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[dtype]
    g = K * u / (1 - K * u) + PRODUCT_ERROR[precision]
    split = precision != "fma"
    underflow = (K + 1) * (2.0**-126 if flush_denormal or split else 2.0**-150) * (6 if split else 1)
    info = torch.finfo(dtype)
    return g * S + u_out * (C.abs() + g * S) + underflow + info.smallest_normal * info.eps / 2


SLOPE_MAX = 1.13  # of any activation: what an error of its argument becomes
ACTIVATION_ERROR = 3e-7  # of |z| + |residual|: exp, the division and the last additions in float32


def epilogue_bound(
    reference: GemmReference,
    expected: Tensor,
    added: Tensor | float,
    dtype: torch.dtype,
    *,
    precision: str = "fma",
) -> Tensor:
    """Elementwise bound for `expected` = activation(z) + added, z the product of `reference`, rounded once to dtype."""
    z = reference.expected
    bound = SLOPE_MAX * gemm_bound(reference.depth, reference.scale, z, torch.float32, precision=precision)
    bound += ACTIVATION_ERROR * (z.abs() + (added.abs() if isinstance(added, Tensor) else abs(added)))
    if dtype == torch.float32:
        return bound
    info = torch.finfo(dtype)
    return bound + UNIT_ROUNDOFF[dtype] * (expected.abs() + bound) + info.smallest_normal * info.eps / 2


def assert_special_values(actual: Tensor, expected64: Tensor) -> None:
    """NaN and signed Inf stand where the reference, rounded to actual's dtype, has them, and nowhere else."""
    rounded = expected64.to(actual.dtype)
    for name, found, wanted in (
        ("NaN", actual.isnan(), rounded.isnan()),
        ("+Inf", actual == math.inf, rounded == math.inf),
        ("-Inf", actual == -math.inf, rounded == -math.inf),
    ):
        wrong = (found != wanted).nonzero()
        if len(wrong):
            where = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name} differs from the reference in {len(wrong)} of {actual.numel()} elements, first at {where}: "
                f"got {actual[where].item()}, expected {rounded[where].item()}"
            )


def assert_within_bound(
    actual: Tensor, reference: GemmReference, *, flush_denormal: bool = False, precision: str = "fma"
) -> ErrorMeasures:
    """Design bound without violations, special values as the reference. Returns the measures of err/S."""
    if actual.shape != reference.expected.shape:
        raise AssertionError(f"shape: got {tuple(actual.shape)}, expected {tuple(reference.expected.shape)}")
    assert_special_values(actual, reference.expected)
    bound = gemm_bound(
        reference.depth,
        reference.scale,
        reference.expected,
        actual.dtype,
        flush_denormal=flush_denormal,
        precision=precision,
    )
    err = (actual.detach().double() - reference.expected).abs()
    violated = (err > bound) & torch.isfinite(reference.expected.to(actual.dtype))
    if violated.any():
        where = tuple(violated.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(violated.sum())} of {actual.numel()} elements beyond the bound, first at {where}: "
            f"got {actual[where].item()!r}, expected {reference.expected[where].item()!r}, "
            f"error {err[where].item():.3e}, bound {bound[where].item():.3e}"
        )
    return error_measures(actual, reference.expected, reference.scale)


def assert_gemm_close(
    actual: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    torch_result: Tensor | None = None,
    precision: str = "fma",
) -> ErrorMeasures:
    """Check `actual` = initial + a @ b + bias against float64: special values, bound, quality against torch.

    Quality: rms(err/S) at most 1.25 times that of `torch_result` (computed here when None) plus 3*u/numel, without
    which a handful of elements fail by chance; low precision also row by row, at most twice torch's.
    precision is that of the kernel; "tf32" and "bf16" promise the bound alone.
    Returns the measures of err/S. Raises AssertionError.
    """
    reference = gemm_reference(a, b, bias, initial)
    ours = assert_within_bound(actual, reference, precision=precision)
    if actual.numel() == 0 or precision in ("tf32", "bf16"):
        return ours
    if torch_result is None:
        torch_result = torch.matmul(a.detach(), b.detach())
        for term in (bias, initial):
            torch_result = torch_result if term is None else torch_result + term.detach()
    theirs = error_measures(torch_result, reference.expected, reference.scale)
    u = UNIT_ROUNDOFF[actual.dtype]
    limit = QUALITY_FACTOR * theirs.rms + 3 * u / actual.numel()
    if not ours.rms <= limit:
        raise AssertionError(f"rms(err/S) {ours.rms:.3e} exceeds {limit:.3e} (torch's own {theirs.rms:.3e})")
    if actual.dtype != torch.float32:
        rows_ours, rows_theirs = (
            _rms_per_row(_relative_error(t, reference.expected, reference.scale)) for t in (actual, torch_result)
        )
        row_limit = ROW_QUALITY_FACTOR * rows_theirs + 3 * u / actual.shape[-1]
        if not bool((rows_ours <= row_limit).all()):
            worst = int((rows_ours - row_limit).argmax())
            raise AssertionError(
                f"row {worst}: rms(err/S) {rows_ours.flatten()[worst]:.3e} exceeds {row_limit.flatten()[worst]:.3e}"
            )
    return ours


# --- operands -----------------------------------------------------------------------------------------------------
def integer_matrix(
    shape: Sequence[int], K: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integers in [-m, m] without 0, m <= 15, exact in every dtype, such that any sum of K products is in float32.

    No zeros: a dropped, doubled or misplaced term always changes the sum. Raises ValueError for K > 2^23.
    """
    if K > 2**EXACT_BITS:
        raise ValueError(f"integer_matrix: sums of K = {K} products do not fit {EXACT_BITS} bits")
    m = min(15, math.isqrt(2**EXACT_BITS // max(K, 1)))
    values = torch.randint(1, 2 * m + 1, tuple(shape), generator=generator).float()
    return torch.where(values > m, m - values, values).to(dtype)


def tails(tile: int) -> list[int]:
    """Sizes around the multiples of a tile: 1, tile - 1, tile, tile + 1, 2*tile - 1, 2*tile + 1."""
    return sorted({n for n in (1, tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile + 1) if n > 0})


# --- layouts: the same matrix in another place; gaps hold NaN, so that an element read from one shows ---------------
def _strided(x: Tensor, row_gap: int, col_gap: int, offset: int) -> Tensor:
    """Copy x [..., R, C] into the middle of a NaN buffer, at every row_gap-th row and col_gap-th column."""
    *batch, rows, cols = x.shape
    width = cols * col_gap + 3
    buffer = torch.full((offset + math.prod(batch) * rows * row_gap * width + 8,), math.nan, dtype=x.dtype)
    view = buffer[offset : offset + math.prod(batch) * rows * row_gap * width]
    view = view.view(*batch, rows * row_gap, width)[..., ::row_gap, : cols * col_gap : col_gap]
    return view.copy_(x)


def _hankel(x: Tensor) -> Tensor:
    """Overlapping windows: element (i, j) is line[i + j], both strides 1."""
    *batch, rows, cols = x.shape
    line = torch.cat([x.flatten(-2), x.flatten(-2)], dim=-1)[..., : rows + cols]
    return line.as_strided((*batch, rows, cols), (*line.stride()[:-1], 1, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "transposed": lambda x: x.mT.clone(memory_format=torch.contiguous_format).mT,
    "wide_rows": lambda x: _strided(x, 1, 1, 0),
    "wide_columns": lambda x: _strided(x.mT, 1, 1, 0).mT,
    "both_strided": lambda x: _strided(x, 2, 3, 0),
    "both_strided_transposed": lambda x: _strided(x.mT, 3, 2, 0).mT,
    "offset_1": lambda x: _strided(x, 1, 1, 1),
    "offset_3_transposed": lambda x: _strided(x.mT, 1, 1, 3).mT,
    "expanded_rows": lambda x: x[..., :1, :].contiguous().expand_as(x),
    "expanded_columns": lambda x: x[..., :, :1].contiguous().expand_as(x),
    "expanded_both": lambda x: x[..., :1, :1].contiguous().expand_as(x),
    "overlapping": _hankel,
}
"""Name -> function giving a [..., R, C] tensor of the same shape in that layout.

Expanded and overlapping layouts repeat elements, so take the reference from what comes back.
"""


def broadcast_batches() -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Batch shapes of A and B: equal, missing, 1 on either side, crosswise, empty."""
    yield from (
        ((3,), (3,)),
        ((3,), ()),
        ((), (3,)),
        ((1,), (3,)),
        ((3,), (1,)),
        ((2, 3), (2, 3)),
        ((2, 1), (1, 3)),
        ((1, 3), (2, 1)),
        ((2, 3), (3,)),
        ((3,), (2, 3)),
        ((2, 1, 2), (3, 1)),
        ((0,), (0,)),
        ((0,), (1,)),
    )


# --- outputs ------------------------------------------------------------------------------------------------------
GUARD = -12345.678  # never a result of integer operands


@dataclass
class GuardedOutput:
    """An output [..., M, N] inside a larger buffer: rows `row_gap` elements apart, a band before and behind.

    `fill` is what the output itself holds before the call: NaN shows an element never written.
    """

    shape: tuple[int, ...]
    row_gap: int = 5
    band: int = 67  # odd: the rows are not aligned either
    fill: float = math.nan
    dtype: torch.dtype = torch.float32
    view: Tensor = field(init=False)
    _buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        *batch, M, N = self.shape
        stride = N + self.row_gap
        self._buffer = torch.full((2 * self.band + math.prod(batch) * M * stride,), GUARD, dtype=self.dtype)
        body = self._buffer[self.band : self.band + math.prod(batch) * M * stride]
        self.view = body.view(*batch, M, stride)[..., :N]
        self.view.fill_(self.fill)

    def assert_guards_intact(self) -> None:
        """Raise AssertionError where an element outside the view was written."""
        inside = torch.zeros_like(self._buffer, dtype=torch.bool)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        guard = torch.tensor(GUARD, dtype=self.dtype)
        touched = ((self._buffer != guard) & ~inside).nonzero().flatten()
        if len(touched):
            raise AssertionError(
                f"{len(touched)} elements outside the output were written, first {int(touched[0]) - self.band} "
                f"elements from its start"
            )


# --- attention ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AttentionReference:
    """softmax(S) V in float64 on the operands as they are, and what bounds the error of computing it."""

    expected: Tensor  # [B, H, Lq, Dv] float64
    scale: Tensor  # [B, H, Lq, Dv] float64: P |V|
    score: Tensor  # [B, H, Lq, 1] float64: the largest scale * sum_d |Q| |K| + |mask| of the row
    depth: int  # of the longest sum: over D, or over Lk


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> AttentionReference:
    """Float64 reference: query [B, H, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv].

    mask: None, bool or additive, broadcasts to [B, H, Lq, Lk]; causal and windowed attention come as bool masks.
    """
    q, k, v = (x.detach().double() for x in (query, key, value))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores, size = (q @ k.mT) * scale, (q.abs() @ k.abs().mT) * abs(scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        added = torch.zeros(mask.shape).double().masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        scores = scores + added.double()
        size = size + torch.nan_to_num(added.double(), neginf=0.0).abs()
    dead = (scores == -math.inf).all(-1, keepdim=True)
    P = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    seen = size.masked_fill(scores == -math.inf, 0.0)
    largest = seen.amax(-1, keepdim=True) if seen.shape[-1] else seen.sum(-1, keepdim=True)
    return AttentionReference(P @ v, P @ v.abs(), largest, max(q.shape[-1], k.shape[-2]))


def attention_bound(reference: AttentionReference, dtype: torch.dtype, *, precision: str = "fma") -> Tensor:
    """Elementwise bound on |O - expected| for scores and sums in float32 and P rounded once to `dtype`.

    A kernel whose `precision` is not "fma" cuts operands to parts: each product is off by its PRODUCT_ERROR.

    An error e of the scores changes P by at most exp(2e) - 1, about 2e, of itself, and so the sums P V and P 1; each
    of those sums has `depth` roundings, exp a few units of its own, and the result is rounded once.
    """
    u, u_out = UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[dtype]
    cut = PRODUCT_ERROR[precision]
    e = torch.expm1(2 * ((reference.depth + 8) * u + cut) * reference.score)
    factor = 2 * (e + (reference.depth + 16) * u + cut) + (2 * u_out if dtype != torch.float32 else 0)
    info = torch.finfo(dtype)
    underflow = (reference.depth + 1) * 2.0**-126 + info.smallest_normal * info.eps
    return factor * reference.scale + u_out * (reference.expected.abs() + factor * reference.scale) + underflow


def assert_attention_within_bound(
    actual: Tensor, reference: AttentionReference, *, precision: str = "fma"
) -> ErrorMeasures:
    """`attention_bound` without violations. Returns the measures of err/S, S = P |V|."""
    if actual.shape != reference.expected.shape:
        raise AssertionError(f"shape: got {tuple(actual.shape)}, expected {tuple(reference.expected.shape)}")
    err = (actual.detach().double() - reference.expected).abs()
    violated = ~(err <= attention_bound(reference, actual.dtype, precision=precision))  # NaN violates it
    if violated.any():
        where = tuple(violated.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(violated.sum())} of {actual.numel()} elements beyond the bound, first at {where}: "
            f"got {actual[where].item()!r}, expected {reference.expected[where].item()!r}"
        )
    return error_measures(actual, reference.expected, reference.scale)


# --- CUDA kernels without a GPU ------------------------------------------------------------------------------------
def twin(seed: int = 0) -> AbstractContextManager[Any]:
    """Inside it CPU tensors go where CUDA tensors go: through the same Python, to the kernels' host twin.

    `seed` is the order in which the threads of a block run. Gives the module `fastdl._twin`; RuntimeError where it is
    not built (FASTDL_TWIN=ON). Process-wide: for tests.
    """
    from fastdl.ops.cuda import use_twin

    return use_twin(seed)
