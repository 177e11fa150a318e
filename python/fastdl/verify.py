"""`fastdl verify`: every kernel of every table against float64, on this machine, offline; here those of GEMM.

Two tiers: small integers, whose sums are exact, must match bit for bit; other data must stay within the bound of
`fastdl.testing`. Sizes lie around the register tile of each kernel, and one product reaches beyond its cache blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdl import _C, functional, verify_attention, verify_conv, verify_cuda, verify_rnn
from fastdl.testing import (
    LAYOUTS,
    GuardedOutput,
    assert_within_bound,
    gemm_reference,
    integer_matrix,
)
from fastdl.verify_attention import Step

_CROSSING_FLOPS = 1e9  # the most a product beyond the cache blocks may take


@dataclass
class Outcome:
    """Checks that ran and failed, by subject: a kernel's name, or an operation's."""

    checks: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # (subject, what, why)
    unavailable: dict[str, str] = field(default_factory=dict)  # kernel -> reason

    @property
    def passed(self) -> bool:
        """Something ran and nothing failed."""
        return bool(self.checks) and not self.failures


# --- one product --------------------------------------------------------------------------------------------------
def _integers(generator: torch.Generator, dtype: torch.dtype, K: int, *shape: int) -> Tensor:
    return integer_matrix(shape, K, generator, dtype)


def _normal(generator: torch.Generator, dtype: torch.dtype, K: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


_DATA = {"exact": _integers, "bound": _normal}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _data(tier: str, dtype: torch.dtype, K: int, seed: int) -> Callable[..., Tensor]:
    """shape -> tensor; one after the other from one generator, such that sums of K products suit the tier."""
    return partial(_DATA[tier], torch.Generator().manual_seed(seed), dtype, K)


_PRECISION = {row["name"]: row["precision"] for row in _C.kernels("gemm")}


def _compare(
    tier: str,
    actual: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    precision: str = "ieee",
) -> None:
    """Within the bound, or bit for bit what the exact sum rounds to."""
    reference = gemm_reference(a, b, bias, initial)
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


def _check_gemm(
    kernel: str,
    dtype: torch.dtype,
    tier: str,
    sizes: tuple[int, int, int],
    layouts: tuple[str, str],
    extra: str,
) -> None:
    """out = a @ b, plus a bias ("bias") or what out held ("accumulate"), into a guarded output."""
    M, N, K = sizes
    data = _data(tier, dtype, K, seed=M * 7919 + N * 104729 + K)
    a, b = LAYOUTS[layouts[0]](data(M, K)), LAYOUTS[layouts[1]](data(K, N))
    bias = data(N) if extra == "bias" else None
    initial = data(M, N) if extra == "accumulate" else None
    out = GuardedOutput((M, N), dtype=dtype)
    if initial is not None:
        out.view.copy_(initial)
    _C.gemm(out.view, a, b, bias, accumulate=initial is not None, kernel=kernel)
    _compare(tier, out.view, a, b, bias, initial, _PRECISION[kernel])
    out.assert_guards_intact()


def _check_special(kernel: str, dtype: torch.dtype, sizes: tuple[int, int, int], layouts: tuple[str, str]) -> None:
    """NaN, infinities, and 0 * infinity surface exactly where float64 has them."""
    M, N, K = sizes
    data = _data("bound", dtype, K, seed=11)
    a, b = data(M, K), data(K, N)
    a[0, 0], a[M - 1, K - 1] = torch.inf, torch.nan
    b[0, N - 1] = 0.0
    a, b = LAYOUTS[layouts[0]](a), LAYOUTS[layouts[1]](b)
    out = torch.empty(M, N, dtype=dtype)
    _C.gemm(out, a, b, kernel=kernel)
    _compare("bound", out, a, b, None, None, _PRECISION[kernel])


def _check_threads(kernel: str, dtype: torch.dtype, sizes: tuple[int, int, int], layouts: tuple[str, str]) -> None:
    """The same bits on one thread and on three."""
    M, N, K = sizes
    data = _data("bound", dtype, K, seed=13)
    a, b = LAYOUTS[layouts[0]](data(M, K)), LAYOUTS[layouts[1]](data(K, N))
    outs = [torch.empty(M, N, dtype=dtype) for _ in range(2)]
    for out, threads in zip(outs, (1, 3), strict=True):
        _C.gemm(out, a, b, kernel=kernel, threads=threads)
    if not torch.equal(*outs):
        raise AssertionError(f"{int((outs[0] != outs[1]).sum())} elements differ between 1 and 3 threads")


def _check_packed(kernel: str, dtype: torch.dtype, tier: str, sizes: tuple[int, int, int]) -> None:
    """A frozen weight gives what the weight gives."""
    M, N, K = sizes
    data = _data(tier, dtype, K, seed=M + N + K)
    x, weight, bias = data(M, K), data(N, K), data(N)
    packed, out = torch.empty(_C.pack_numel(K, N, kernel)), torch.empty(M, N, dtype=dtype)
    _C.pack(packed, weight.mT, kernel)
    _C.linear_packed(out, x, packed, bias, N, kernel)
    _compare(tier, out, x, weight.mT, bias, None, _PRECISION[kernel])


# --- what is checked ----------------------------------------------------------------------------------------------
def _sizes(row: dict[str, Any], quick: bool) -> Iterator[tuple[int, int, int]]:
    """(M, N, K) around the register tile; K of 0 and 1, which leave no stride to speak of, for tiles only."""
    mr, nr = row["mr"], row["nr"]
    rows = (1, mr + 1) if quick else (1, mr - 1, mr, mr + 1, 2 * mr + 1)
    columns = (1, nr - 1, nr + 1) if quick else (1, nr - 1, nr, nr + 1, 2 * nr + 3)
    depths = (0, 1, 2, 19) if quick else (0, 1, 2, 7, 16, 33, 100)
    depths = depths if row["kind"] == "tile" else depths[2:]
    sizes = itertools.product(*(sorted({n for n in values if n > 0}) for values in (rows, columns)), depths)
    yield from sizes


def _crossing(row: dict[str, Any]) -> tuple[int, int, int]:
    """A product one past the kernel's cache blocks, cut down along N and then M to what scalar code can do."""
    large = 1 << 14
    b_strides = (large, 1) if row["kind"] == "tile" else (1, large)
    plan = _C.gemm_plan(
        large,
        large,
        large,
        b_strides=b_strides,
        isa=row["isa"],
        kernel=row["name"],
        threads=1,
        dtype=row["dtype"],
    )
    M, N, K = plan["mc"] + 1, plan["nc"] + 1, plan["kc"] + 1
    N = max(row["nr"] + 1, min(N, int(_CROSSING_FLOPS / (2 * M * K))))
    M = max(row["mr"] + 1, min(M, int(_CROSSING_FLOPS / (2 * N * K))))
    return M, N, K


def _kernel_steps(row: dict[str, Any], quick: bool) -> Iterator[Step]:
    kernel, dtype, tile = row["name"], _DTYPES[row["dtype"]], row["kind"] == "tile"
    plain = ("contiguous", "contiguous" if tile else "transposed")
    layouts = [plain]
    if tile and not quick:
        layouts += [
            ("transposed", "transposed"),
            ("both_strided", "both_strided"),
            ("expanded_rows", "expanded_columns"),
        ]
    for sizes, pair, tier in itertools.product(_sizes(row, quick), layouts, _DATA):
        extras = ("", "bias", "accumulate") if pair == plain else ("",)
        for extra in extras:
            what = f"{tier} {'x'.join(map(str, sizes))} {'/'.join(pair)} {extra}".rstrip()
            yield kernel, what, partial(_check_gemm, kernel, dtype, tier, sizes, pair, extra)
    few = (row["mr"] + 2, row["nr"] + 3, 21)
    yield kernel, "special values", partial(_check_special, kernel, dtype, few, plain)
    many = (4 * row["mr"] + 3, 3 * row["nr"] + 5, 40)
    yield kernel, "threads", partial(_check_threads, kernel, dtype, many, plain)
    if tile:
        for sizes, tier in itertools.product((few, (1, row["nr"], 5), many), _DATA):
            what = f"packed {tier} {'x'.join(map(str, sizes))}"
            yield kernel, what, partial(_check_packed, kernel, dtype, tier, sizes)
    if not quick:
        for tier in _DATA:
            yield (
                kernel,
                f"{tier} beyond the blocks",
                partial(_check_gemm, kernel, dtype, tier, _crossing(row), plain, ""),
            )


def _check_sum_rows(dtype: torch.dtype, tier: str, shape: tuple[int, ...]) -> None:
    x = _data(tier, dtype, 1, seed=sum(shape))(*shape)
    flat = x.reshape(-1, shape[-1])
    out = torch.empty(shape[-1], dtype=dtype)
    _C.sum_rows(out, x)
    _compare(tier, out[None], torch.ones(1, flat.shape[0]), flat, None, None)


def _check_linear(dtype: torch.dtype, tier: str, sizes: tuple[int, int, int]) -> None:
    """functional.linear with all its gradients, as a model calls it."""
    M, N, K = sizes
    data = _data(tier, dtype, max(sizes), seed=max(sizes))
    x, weight, bias, dy = data(M, K), data(N, K), data(N), data(M, N)
    operands = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = functional.linear(*operands)
    dx, dw, db = torch.autograd.grad(out, operands, dy)
    _compare(tier, out.detach(), x, weight.mT, bias, None)
    _compare(tier, dx, dy, weight, None, None)
    _compare(tier, dw, dy.mT, x, None, None)
    _compare(tier, db[None], torch.ones(1, M), dy, None, None)


def _check_epilogue(dtype: torch.dtype, tier: str, sizes: tuple[int, int, int]) -> None:
    """ReLU and a residual, and the gradient through them: what it passes on is a product of masked gradients."""
    M, N, K = sizes
    data = _data(tier, dtype, max(sizes), seed=max(sizes))
    x, weight, bias, residual, dy = data(M, K), data(N, K), data(N), data(M, N), data(M, N)
    leaf = x.clone().requires_grad_()
    z = functional.linear(x, weight, bias)
    out = functional.linear(leaf, weight, bias, activation="relu", residual=residual)
    (dx,) = torch.autograd.grad(out, leaf, dy)
    mask = z > 0
    if tier == "exact":
        exact = gemm_reference(x, weight.mT, bias).expected.relu() + residual.double()
        if not torch.equal(out.detach(), exact.to(dtype)):
            raise AssertionError(f"{int((out != exact.to(dtype)).sum())} of {out.numel()} elements wrong")
    _compare(tier, dx, dy * mask, weight, None, None)


def _check_matmul(dtype: torch.dtype, tier: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    data = _data(tier, dtype, a_shape[-1], seed=sum(a_shape))
    a, b = data(*a_shape), data(*b_shape)
    _compare(tier, functional.matmul(a, b), a, b, None, None)


def _operation_steps(quick: bool) -> Iterator[Step]:
    sums = [(1, 1), (7, 5), (33, 130)] + ([] if quick else [(3, 17, 64), (1000, 257)])
    linears = [(1, 1, 1), (17, 35, 20)] + ([] if quick else [(130, 65, 257), (64, 512, 64), (1, 300, 400)])
    for (name, dtype), tier in itertools.product(_DTYPES.items(), _DATA):
        for shape in sums:
            yield "sum_rows", f"{tier} {name} {shape}", partial(_check_sum_rows, dtype, tier, shape)
        for sizes in linears:
            what = f"{tier} {name} {'x'.join(map(str, sizes))}"
            yield "functional.linear", what, partial(_check_linear, dtype, tier, sizes)
            yield "functional.linear", f"{what} relu residual", partial(_check_epilogue, dtype, tier, sizes)
        shapes = (2, 1, 9, 11), (3, 11, 34)
        yield "functional.matmul", f"{tier} {name} broadcast", partial(_check_matmul, dtype, tier, *shapes)


# Operation -> (the checks of one row of its table, the checks of what stands on it). A new operation adds its row here.
_OPERATIONS: dict[str, tuple[Callable[[dict[str, Any], bool], Iterator[Step]], Callable[[bool], Iterator[Step]]]] = {
    "gemm": (_kernel_steps, _operation_steps),
    "attention": (verify_attention.kernel_steps, verify_attention.operation_steps),
    "rnn": (verify_rnn.kernel_steps, verify_rnn.operation_steps),
    "conv": (verify_conv.kernel_steps, verify_conv.operation_steps),
}


def steps(quick: bool = False, device: str = "cpu") -> Iterator[Step]:
    """Every check of the rows this process can run, and of the operations above them."""
    if device != "cpu":
        yield from verify_cuda.steps(quick, device)
        return
    for operation, (of_kernel, of_operation) in _OPERATIONS.items():
        for row in _C.kernels(operation):
            if row["available"]:
                yield from of_kernel(dict(row), quick)
        yield from of_operation(quick)


def verify(
    quick: bool = False, progress: Callable[[int, int, str], None] | None = None, devices: tuple[str, ...] = ("cpu",)
) -> Outcome:
    """Run all checks; a check that raises anything at all has failed. progress(done, total, subject) before each.

    devices: of "cpu", "cuda" and "twin", the host twin of the CUDA kernels.
    """
    rows = (row for operation in _OPERATIONS for row in _C.kernels(operation))
    outcome = Outcome()
    if "cpu" in devices:
        outcome.unavailable |= {row["name"]: row["reason"] for row in rows if not row["available"]}
    todo = [step for device in devices for step in steps(quick, device)]
    for done, (subject, what, check) in enumerate(todo):
        if progress:
            progress(done, len(todo), subject)
        try:
            check()
        except verify_cuda.NotRun as reason:
            outcome.unavailable[f"{subject}, {what}"] = str(reason)
            continue
        except Exception as error:  # a kernel that refuses a legal call has failed as well
            outcome.failures.append((subject, what, f"{type(error).__name__}: {error}"))
        outcome.checks[subject] = outcome.checks.get(subject, 0) + 1
    return outcome
