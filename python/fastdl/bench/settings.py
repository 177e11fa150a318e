"""What a benchmark run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdl import _C
from fastdl.bench.harness import REGIMES


@dataclass(frozen=True)
class Settings:
    """`threads` 0 is torch's default, `isa` "" the level in use, `kernel` "" the plan's own choice, `families` () all.

    `shapes` keeps the rows whose name contains it (case-insensitive); `seconds` is the time a row, regime and part.
    """

    dtype: str = "float32"
    threads: int = 0
    isa: str = ""
    frozen: bool = False
    kernel: str = ""
    families: tuple[str, ...] = ()
    shapes: str = ""
    regimes: tuple[str, ...] = REGIMES
    seconds: float = 0.4
    device: str = "cpu"  # one of place.PLACES
    limit: float = 0.0  # seconds after which no further row begins; 0: none

    @property
    def precision(self) -> str:
        """What the results are to be as exact as: the forced kernel's precision, else that of float32 sums."""
        rows = (row for op in ("gemm", "attention") for row in _C.kernels(op))
        return next((row["precision"] for row in rows if row["name"] == self.kernel), "fma")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return getattr(torch, self.dtype)
