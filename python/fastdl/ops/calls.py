"""Where calls went: the record of what was handed to torch, and the hook through which `explain` watches."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Call:
    """One call of an operation, as `explain` sees it."""

    op: str
    kernel: str  # a row of the kernel table, "reference" (float64), or "torch"
    shapes: tuple[tuple[int, ...], ...]  # of the tensor arguments, in order, absent ones left out
    dtype: torch.dtype  # of the result
    reason: str  # why torch ran it, or ""
    recomputed: int = 0  # elements that a split float32 kernel computed again, by FMA


observer: Callable[[Call], None] | None = None  # set by `explain` while it runs a model
handbacks: Counter[tuple[str, str]] = Counter()  # (op, reason) -> calls


def run_while_tracing(function: F) -> F:
    """Have Dynamo call the function while it traces, and take the result as a constant.

    What `torch.compiler.assume_constant_result` does, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def shapes(tensors: Iterable[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """Of a call's tensors, for its record; nested ones have none."""
    return tuple(() if x.is_nested else tuple(x.shape) for x in tensors)


@run_while_tracing  # so that a compiled call leaves its record too, and its graph stays whole
def handback(op: str, reason: str) -> None:
    """Record that a call of `op` is handed to torch. FASTDL_LOG=1 prints each distinct reason once, to stderr."""
    first = (op, reason) not in handbacks
    handbacks[op, reason] += 1
    if first and os.environ.get("FASTDL_LOG", "0") not in ("", "0"):
        print(f"fastdl: {op}: handed to torch: {reason}", file=sys.stderr, flush=True)
