"""What this process runs on: the facts behind `fastdl info` and the head of every benchmark file."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdl import _C
from fastdl._version import __version__
from fastdl.ops import cuda

ISA_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16", "amx")

# fastdl's cap and the settings that hold torch's own libraries to the same instructions (none needed at "amx").
# They are read once, when torch is loaded.
_CAPS: dict[str, dict[str, str]] = {
    "scalar": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "amx": {},
}
CAP_VARIABLES = ("FASTDL_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

_OPENMP_LIBRARY = re.compile(r"^(libgomp|libomp|libiomp5|vcomp\d*)[-.]")


def capped_environment(isa: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment` with fastdl and torch both held to level `isa`; ValueError for an unknown level."""
    if isa not in _CAPS:
        raise ValueError(f"isa: expected one of {', '.join(ISA_LEVELS)}, got {isa!r}")
    kept = {key: value for key, value in environment.items() if key not in CAP_VARIABLES}
    return {**kept, "FASTDL_ISA": isa, **_CAPS[isa]}


def is_capped(isa: str) -> bool:
    """Whether this process was started under exactly the caps of level `isa`."""
    wanted = {"FASTDL_ISA": isa, **_CAPS[isa]}
    return all(os.environ.get(key) == wanted.get(key) for key in CAP_VARIABLES)


def openmp_runtimes(memory_map: Path = Path("/proc/self/maps")) -> list[str] | None:
    """Paths of the OpenMP runtimes mapped into this process; None where the system does not show its memory map."""
    try:
        lines = memory_map.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = {fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}
    return sorted(path for path in paths if _OPENMP_LIBRARY.match(Path(path).name))


class OtherLoad:
    """Counts from its creation on what other programs do on the processors of this process."""

    def __init__(self, statistics: Path = Path("/proc/stat")) -> None:
        self._statistics = statistics
        self._start = self._now()

    def _now(self) -> tuple[float, float] | None:
        """(wall clock, busy seconds of our processors less our own), None where the system does not tell."""
        try:
            lines = self._statistics.read_text(encoding="ascii").splitlines()
            mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        except (OSError, AttributeError):
            return None
        ticks = 0
        for name, *counts in (line.split() for line in lines):
            if name in mine:
                user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, counts[:8])
                ticks += user + nice + system + sum(interrupts_and_stolen)
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()

    def processors(self) -> float | None:
        """How many processors' worth of time others took, on average; None where the system does not tell."""
        now = self._now()
        if now is None or self._start is None:
            return None
        return max(0.0, (now[1] - self._start[1]) / max(now[0] - self._start[0], 1e-9))


def gpus() -> list[dict[str, Any]]:
    """The GPUs that the CUDA kernels of this build see, as their module describes them; none without the module."""
    module, _ = cuda.load("_cuda")
    return [
        {"index": i, "name": module.gpu_name(i), **module.gpu_info(i)}
        for i in range(module.gpu_count() if module else 0)
    ]


def describe() -> dict[str, Any]:
    """The machine and the versions, as JSON: processor, caches (bytes), levels, threads, software, environment."""
    cpu, build = _C.cpu_info(), _C.build_info()
    threads, why = _C.threads()
    return {
        "cpu": cpu,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": {"torch": torch.get_num_threads(), "fastdl": threads, "why": why},
        "openmp_runtimes": [Path(path).name for path in openmp_runtimes() or ()],
        "build": build,
        "gpus": gpus(),
        "versions": {
            "fastdl": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key in CAP_VARIABLES or key.startswith(("FASTDL_", "OMP_", "GOMP_", "MKL_", "KMP_"))
        },
    }
