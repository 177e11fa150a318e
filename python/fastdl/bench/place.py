"""Where a benchmark runs: the CPU, a GPU, or, to try the benchmark itself, the host twin of a GPU's kernels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdl.bench.host import Peaks
from fastdl.ops import calls, cuda
from fastdl.testing import twin

PLACES = ("cpu", "cuda", "twin")
_COPY_BYTES = 1 << 30
_PRODUCT = 8192  # M, N and K of the product that stands for the peak
_PROBES = 10

current = "cpu"


def device() -> torch.device:
    """Of the operands."""
    return torch.device("cuda" if current == "cuda" else "cpu")


def unavailable(name: str) -> str:
    """Why nothing can be measured there, or ""."""
    if name == "cuda":
        built = cuda.load("_cuda")[1]
        return built or _no_gpu() or cuda.reason(torch.device("cuda", 0)) or ""
    return cuda.load("_twin")[1] if name == "twin" else ""


def _no_gpu() -> str:
    """What is to be said before that the kernels are off: turning them on would not help."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch, {torch.__version__}, is built without CUDA"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


@contextmanager
def at(name: str) -> Iterator[None]:
    """Operands are made there inside it, and float32 is float32: neither side uses tf32; cuDNN tries its algorithms."""
    global current
    if name == "cpu":
        yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = current, torch.backends.cudnn.benchmark, [switch.fp32_precision for switch in switches]
    current = name
    try:
        torch.backends.cudnn.benchmark = True
        for switch in switches:
            switch.fp32_precision = "ieee"
        if name == "twin":
            with twin():
                yield
        else:
            yield
    finally:
        current, torch.backends.cudnn.benchmark, precisions = before
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision


def seconds(call: Callable[[], Any], inner: int) -> float:
    """Seconds a call, the mean of `inner`: by the clock, on a GPU by events on the stream around them."""
    if current != "cuda":
        start = time.perf_counter_ns()
        for _ in range(inner):
            call()
        return (time.perf_counter_ns() - start) * 1e-9 / inner
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(inner):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / inner


def last_level_cache() -> int:
    """Bytes."""
    return cuda.load("_cuda")[0].gpu_info(device().index or 0)["l2_bytes"]


def graph(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """Replays the call from a CUDA graph; None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(captured):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return captured.replay


@contextmanager
def observed() -> Iterator[list[calls.Call]]:
    """The calls of fastdl's operations inside it."""
    seen: list[calls.Call] = []
    before, calls.observer = calls.observer, seen.append
    try:
        yield seen
    finally:
        calls.observer = before


def peaks(dtype: torch.dtype) -> Peaks:
    """What torch itself reaches here: FLOP/s of a large product, bytes read and written a second by a large copy."""
    sm = cuda.native(torch.empty(0, device=device())).gpu_named("sm80")["sm"] if current == "twin" else _sm()
    M, size = (_PRODUCT, _COPY_BYTES) if current == "cuda" else (64, 1 << 16)
    a, b = (torch.randn(M, M, device=device()).to(dtype) for _ in range(2))
    source = torch.randn(size // 4, device=device())
    target = torch.empty_like(source)
    product = _best(lambda: torch.matmul(a, b))
    copy = _best(lambda: target.copy_(source))
    return Peaks(0, f"sm{sm}", 2 * M**3 / product, {"memory": 2 * size / copy}, {"memory": 1 << 62})


def _sm() -> int:
    major, minor = torch.cuda.get_device_capability(device())
    return 10 * major + minor


def _best(call: Callable[[], Any]) -> float:
    call()
    return min((seconds(call, 1) for _ in range(_PROBES)), default=math.nan)
