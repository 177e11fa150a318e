"""`fastdl bench accuracy`: errors of linear against float64, beside torch's, by dtype, kind of data and depth K.

The document (`schema` 1, `kind` "accuracy"):

    date, command, machine   as in `report.py`
    settings   {isa, threads}
    rows       list of {mode, dtype, data, K, kernel, fastdl {rms, max}, torch {rms, max}}: err/S over all elements,
               S the same product on absolute values
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastdl import _C, functional
from fastdl.bench.report import make_table
from fastdl.machine import describe
from fastdl.testing import assert_within_bound, error_measures, gemm_reference

SCHEMA = 1
DEPTHS = (256, 1024, 4096, 16384)
DTYPES = ("float32", "bfloat16", "float16")
DATA: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "positive": torch.rand}
_M = _N = 128  # 16384 elements a row; enough rows for the packing kernels


def _row(dtype: str, data: str, K: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(K)
    scale = 1 / math.sqrt(K)  # results of order 1 to 100: in the range of float16
    x, weight = (DATA[data](n, K, generator=generator).to(getattr(torch, dtype)) for n in (_M, _N))
    weight = weight.mul_(scale)
    reference = gemm_reference(x, weight.mT)
    ours, theirs = functional.linear(x, weight), F.linear(x, weight)
    assert_within_bound(ours, reference)
    errors = {
        name: error_measures(result, reference.expected, reference.scale)
        for name, result in (("fastdl", ours), ("torch", theirs))
    }
    return {
        "mode": "ieee",  # torch's fp32_precision; 16-bit types have no other
        "dtype": dtype,
        "data": data,
        "K": K,
        "kernel": _C.linear_plan(ours, x, weight)["kernel"],
        **{name: {"rms": e.rms, "max": e.max} for name, e in errors.items()},
    }


def _rows() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for data in DATA:
            for K in DEPTHS:
                yield _row(dtype, data, K)


def run() -> dict[str, Any]:
    """Measure and return the document. AssertionError where a result leaves its bound."""
    with torch.no_grad():
        rows = list(_rows())
    return {
        "schema": SCHEMA,
        "kind": "accuracy",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["fastdl", *sys.argv[1:]],
        "machine": describe(),
        "settings": {"isa": _C.cpu_info()["isa"], "threads": _C.threads()[0]},
        "rows": rows,
    }


COLUMNS = ("level", "mode", "dtype", "data", "K", "rms", "torch's rms", "max", "torch's max")


def cells(document: dict[str, Any]) -> list[list[str]]:
    """A line a row, in the order of COLUMNS."""
    lines = []
    for row in document["rows"]:
        errors = [f"{row[side][measure]:.1e}" for measure in ("rms", "max") for side in ("fastdl", "torch")]
        lines.append([document["settings"]["isa"], row["mode"], row["dtype"], row["data"], str(row["K"]), *errors])
    return lines


def print_document(document: dict[str, Any], console: Console) -> None:
    """The table, a line a row."""
    table = make_table("err/S against float64", COLUMNS[:4], COLUMNS[4:])
    for line in cells(document):
        table.add_row(*line)
    console.print(table)
