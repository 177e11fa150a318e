"""Timing fastdl against torch: interleaved in one process, checked, with spread.

A round times the candidate and the baseline once each, in alternating order, so that drift of the machine meets both.
The speed-up is the median over rounds of baseline time / candidate time; spreads are the quartiles.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastdl import _C
from fastdl.bench import place

Call = Callable[[], Any]

_BATCH_S = 1e-3  # calls shorter than this are timed several at a time
_MAX_ROUNDS = 101
_IDLE_S = 0.02  # long enough for the thread team to fall asleep
_SLOW_S = 0.05  # beyond this, a call neither notices a cold cache nor a sleeping team
_LONG_S = 10.0  # beyond this, a side's first call is its measurement, and the other side's second one its own

REGIMES = ("warm", "cold", "idle")
"""warm: operands as the side's own last call left them, a slow call's as the other side's did. cold: caches flushed
before each call. idle: the thread team asleep."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over `rounds`, each the mean of `inner` calls."""

    ms: float
    q1_ms: float
    q3_ms: float
    rounds: int
    inner: int


@dataclass(frozen=True)
class Comparison:
    """Both sides of one regime; `speedup` is torch's time / fastdl's, the median of the paired rounds."""

    fastdl: Timing
    torch: Timing
    speedup: float
    speedup_q1: float
    speedup_q3: float


@dataclass(frozen=True)
class Check:
    """Outcome of comparing both results with float64: rms(err/S) of each, and what failed ("" when nothing did)."""

    error: float
    torch_error: float
    failure: str = ""


@dataclass
class Case:
    """One row to measure: the same work done by fastdl (`candidate`) and by torch (`baseline`).

    `check` calls each once. flops and bytes are the least this work takes, a call. `kernel_calls` is how many kernels
    of fastdl a call must run at least; fewer means that it was handed back to torch. `parts` are timed warm and
    reported beside the row.
    """

    candidate: Call
    baseline: Call
    check: Callable[[], Check]
    flops: float
    bytes: float
    kernel_calls: int = 1
    grad: bool = False
    parts: dict[str, tuple[Call, Call]] = field(default_factory=dict)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def geometric_mean(values: list[float]) -> float:
    """NaN for an empty list."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else math.nan


class CacheFlush:
    """Evicts the caches of all cores by rewriting a buffer of twice the last-level cache."""

    def __init__(self) -> None:
        cpu = _C.cpu_info()
        largest = place.last_level_cache() if place.current == "cuda" else max(cpu["l3"], cpu["l2"] * cpu["cpus"])
        size = 2 * max(largest, 32 << 20)
        self._buffer = torch.zeros(min(size, 1 << 30), dtype=torch.uint8, device=place.device())

    def __call__(self) -> None:
        self._buffer.add_(1)


@contextmanager
def _quiet(grad: bool) -> Any:
    """No garbage collection inside a timed section; autograd as the case needs it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(grad):
            yield
    finally:
        if enabled:
            gc.enable()


def _seconds(call: Call, inner: int) -> float:
    return place.seconds(call, inner)


def _timing(seconds: list[float], inner: int) -> Timing:
    q1, median, q3 = (value * 1e3 for value in quartiles(seconds))
    return Timing(median, q1, q3, len(seconds), inner)


def _comparison(seconds: tuple[list[float], list[float]], inner: int) -> Comparison:
    q1, speedup, q3 = quartiles([baseline / candidate for candidate, baseline in zip(*seconds, strict=True)])
    return Comparison(_timing(seconds[0], inner), _timing(seconds[1], inner), speedup, q1, q3)


def compare(
    calls: tuple[Call, Call], before: Call, inner: int, rounds: int, warm: tuple[bool, bool] = (False, False)
) -> Comparison:
    """Time (candidate, baseline) over `rounds`; `before` runs untimed ahead of every timed section.

    warm: sides that also run once themselves first, for what the other side left in the caches is its own.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for r in range(rounds):
        for side in (0, 1) if r % 2 == 0 else (1, 0):
            before()
            if warm[side]:
                calls[side]()
            seconds[side].append(_seconds(calls[side], inner))
    return _comparison(seconds, inner)


class Stopwatch:
    """Compares pairs of calls within a time budget a regime."""

    def __init__(self, budget_s: float = 0.5) -> None:
        self._budget_s = budget_s
        self._flush: CacheFlush | None = None

    def _before(self, regime: str) -> tuple[Call, float]:
        """What runs ahead of a timed section, and the seconds it takes."""
        if regime == "warm":
            return lambda: None, 0.0
        if regime == "idle":
            return lambda: time.sleep(_IDLE_S), _IDLE_S
        if self._flush is None:
            self._flush = CacheFlush()
        return self._flush, _seconds(self._flush, 1)

    def measure(self, calls: tuple[Call, Call], regime: str = "warm", grad: bool = False) -> Comparison | None:
        """One regime of a pair of calls, None where it makes no difference to calls this long."""
        with _quiet(grad):
            first = [_seconds(call, 1) for call in calls]  # also allocates, packs, fills caches
            if max(first) > _LONG_S and regime == "warm":
                ours, theirs = (t if t > _LONG_S else _seconds(call, 1) for t, call in zip(first, calls, strict=True))
                return _comparison(([ours], [theirs]), 1)
            sides = first if max(first) > _SLOW_S else [_seconds(call, 3) for call in calls]
            once = max(sides)
            if regime != "warm" and (once > _SLOW_S or (regime == "idle" and place.current != "cpu")):
                return None
            before, extra = self._before(regime)
            inner = max(1, min(1000, math.ceil(_BATCH_S / once))) if regime == "warm" else 1
            warm = tuple(regime == "warm" and seconds <= _SLOW_S for seconds in sides)
            a_round = sum((inner + own) * seconds + extra for own, seconds in zip(warm, sides, strict=True))
            rounds = max(3 if once > _SLOW_S else 7, min(_MAX_ROUNDS, int(self._budget_s / a_round)))
            return compare(calls, before, inner, rounds, warm)


def run_check(case: Case) -> tuple[Check, dict[str, int]]:
    """The check, and the kernels of fastdl that ran in it, each with its number of runs."""
    if place.current != "cpu":
        return _run_check_on_gpu(case)
    with torch.set_grad_enabled(case.grad):
        _C.reset_counters()
        check = case.check()
    return check, {name: count for name, count in _C.counters().items() if count}


def _run_check_on_gpu(case: Case) -> tuple[Check, dict[str, int]]:
    """As run_check; one call handed to torch counts as all."""
    with torch.set_grad_enabled(case.grad), place.observed() as seen:
        check = case.check()
    if not seen or any(call.reason for call in seen):
        return check, {}
    kernels = [call.kernel for call in seen]
    return check, {kernel: max(case.kernel_calls, kernels.count(kernel)) for kernel in kernels}


def measure_case(case: Case, stopwatch: Stopwatch, regimes: tuple[str, ...]) -> dict[str, Any]:
    """The measured half of a row (see `report.py` for its fields). A failed check leaves no figures behind."""
    check, kernels = run_check(case)
    row: dict[str, Any] = {
        "kernels": sorted(kernels),
        "handed_back": sum(kernels.values()) < case.kernel_calls,
        "check": asdict(check) | {"passed": not check.failure},
        "parts": {},
    } | dict.fromkeys(REGIMES)
    if check.failure:
        return row
    for regime in regimes:
        measured = stopwatch.measure((case.candidate, case.baseline), regime, case.grad)
        row[regime] = asdict(measured) if measured else None
    for name, calls in case.parts.items():
        part = stopwatch.measure(calls, grad=case.grad)
        row["parts"][name] = asdict(part) if part else None
    return row
