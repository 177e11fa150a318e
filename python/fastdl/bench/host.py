"""The machine's own peaks: float32 FMA and AMX rates, read bandwidth of every level of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdl import _C

_FMA_LEVELS = ("scalar", "avx2", "avx512")  # AMX multiplies no float32


def fma_level(isa: str = "") -> str:
    """The level whose FMA units do float32 work at level `isa` ("": the level in use)."""
    isa = isa or _C.cpu_info()["isa"]
    return isa if isa in _FMA_LEVELS else _FMA_LEVELS[-1]


def buffer_sizes(threads: int) -> dict[str, int]:
    """Bytes a thread to read for each level of memory: half of a cache (its share of L3), four times L3 for DRAM."""
    cpu = _C.cpu_info()
    sizes = {"L1": cpu["l1d"] // 2, "L2": cpu["l2"] // 2, "L3": cpu["l3"] // 2 // threads}
    sizes = {level: size for level, size in sizes.items() if size}
    if threads > 1 and sizes.get("L3", 0) <= cpu["l2"]:
        sizes.pop("L3", None)  # the share lies within L2: it would measure that
    return sizes | {"DRAM": max(4 * cpu["l3"], 64 << 20) // threads}


@dataclass(frozen=True)
class Peaks:
    """Measured peaks at a thread count: `fma` in FLOP/s, `read` in bytes/s by level of memory, `capacity` in bytes."""

    threads: int
    isa: str
    fma: float
    read: dict[str, float]
    capacity: dict[str, int]

    @classmethod
    def measure(cls, threads: int, seconds: float = 0.05) -> Peaks:
        """Measure at the level in use."""
        isa = fma_level()
        sizes = buffer_sizes(threads)
        read = {level: _C.measure_read_bandwidth(size, threads, seconds) for level, size in sizes.items()}
        cpu = _C.cpu_info()
        capacity = {"L1": cpu["l1d"] * threads, "L2": cpu["l2"] * threads, "L3": cpu["l3"]}
        return cls(threads, isa, _C.measure_fma(isa, threads, seconds), read, capacity)

    def memory(self, size: float) -> str:
        """The fastest measured level of memory that `size` bytes fit in."""
        return next((level for level in self.read if size <= self.capacity.get(level, float("inf"))), "DRAM")


def measure_host(seconds: float = 0.1) -> list[dict[str, Any]]:
    """Every peak on one thread and on all: {"what", "level", "threads", "value", "unit", "note"}.

    `value` is None for what the processor lacks.
    """
    rows: list[dict[str, Any]] = []
    cpu = _C.cpu_info()

    def add(what: str, level: str, threads: int, unit: str, probe: Any, reason: str = "") -> None:
        value = None if reason else probe() / 1e9
        rows.append({"what": what, "level": level, "threads": threads, "value": value, "unit": unit, "note": reason})

    for threads in sorted({1, _C.threads()[0]}):
        for isa in _FMA_LEVELS:
            reason = "" if isa in cpu["isa_supported"] else "not supported by this processor"
            add("float32 FMA", isa, threads, "GFLOP/s", lambda i=isa, t=threads: _C.measure_fma(i, t, seconds), reason)
        reason = "" if "amx" in cpu["isa_supported"] else "not supported by this processor"
        add("bfloat16 AMX", "amx", threads, "GFLOP/s", lambda t=threads: _C.measure_amx(t, seconds), reason)
        for level, size in buffer_sizes(threads).items():
            add("read", level, threads, "GB/s", lambda s=size, t=threads: _C.measure_read_bandwidth(s, t, seconds))
    return rows
