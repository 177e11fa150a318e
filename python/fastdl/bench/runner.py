"""Runs the families of an operation over their shapes and collects one document; `report.py` states its fields."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from fastdl import _C
from fastdl.bench import attention, conv, gemm, place, rnn
from fastdl.bench.harness import REGIMES, Stopwatch, geometric_mean, measure_case
from fastdl.bench.host import Peaks
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import Shape, load
from fastdl.machine import OtherLoad, describe

SCHEMA = 1
OPERATIONS = {"gemm": gemm, "attention": attention, "rnn": rnn, "conv": conv}

Progress = Callable[[int, int, str], None]
"""Called with (rows done, rows in all, name of the next row)."""


def _validate(operation: str, settings: Settings) -> None:
    """ValueError for what this build, machine or operation cannot do."""
    if settings.device not in place.PLACES:
        raise ValueError(f"{operation}: device: expected one of {place.PLACES}, got {settings.device!r}")
    if why := place.unavailable(settings.device):
        raise ValueError(f"{operation}: device {settings.device}: {why}")
    if settings.device != "cpu":
        for name in ("threads", "isa", "frozen", "kernel"):
            if getattr(settings, name):
                raise ValueError(f"{operation}: {name} has a meaning on the CPU only, got device {settings.device!r}")
    module, table = OPERATIONS[operation], _C.kernels(operation)
    dtypes = sorted({row["dtype"] for row in table})
    names = {row["name"]: row for row in table if row["dtype"] == settings.dtype}
    if settings.dtype not in dtypes:
        raise ValueError(
            f"{operation}: dtype: expected one of {dtypes} (kernels of this build), got {settings.dtype!r}"
        )
    if settings.kernel and settings.kernel not in names:
        raise ValueError(f"{operation}: kernel: expected one of {sorted(names)}, got {settings.kernel!r}")
    if settings.kernel and not names[settings.kernel]["available"]:
        raise ValueError(f"{operation}: kernel {settings.kernel}: {names[settings.kernel]['reason']}")
    if settings.kernel and settings.frozen:
        raise ValueError(f"{operation}: kernel: a frozen weight is laid out for one kernel, got {settings.kernel!r}")
    if settings.isa and settings.isa != _C.cpu_info()["isa"]:
        raise ValueError(f"{operation}: isa: this machine runs at {_C.cpu_info()['isa']}, got {settings.isa!r}")
    for family in settings.families:
        if family not in module.FAMILIES:
            raise ValueError(f"{operation}: family: expected one of {sorted(module.FAMILIES)}, got {family!r}")


def families(operation: str, settings: Settings) -> list[str]:
    """The families to run: the asked ones, or all that the other settings leave a meaning."""
    module = OPERATIONS[operation]
    chosen = settings.families or tuple(module.FAMILIES)
    for name, wanted, able in (("frozen", settings.frozen, module.FROZEN), ("kernel", settings.kernel, module.FORCED)):
        if wanted:
            if settings.families and not set(chosen) <= set(able):
                raise ValueError(f"{operation}: {name} has a meaning for {list(able)} only, got {list(chosen)}")
            chosen = tuple(family for family in chosen if family in able)
    return list(chosen)


def _selected(operation: str, settings: Settings) -> list[tuple[str, Shape]]:
    pairs = [(family, shape) for family in families(operation, settings) for shape in load(operation, family)]
    return [(f, s) for f, s in pairs if settings.shapes.lower() in f"{f}/{s.name}".lower()]


def _rates(row: dict[str, Any], work: tuple[float, float], peaks: Peaks, fma: float) -> dict[str, Any]:
    """GFLOP/s, GB/s and shares of the measured peaks, warm; None for a row without times."""
    if not row["warm"]:
        return dict.fromkeys(("gflops", "gbytes", "fma_percent", "read_percent", "memory"))
    seconds = row["warm"]["fastdl"]["ms"] * 1e-3
    flops, size = work
    memory = peaks.memory(size)
    return {
        "gflops": flops / seconds * 1e-9,
        "gbytes": size / seconds * 1e-9,
        "fma_percent": 100 * flops / seconds / fma,
        "read_percent": 100 * size / seconds / peaks.read[memory],
        "memory": memory,
    }


def _row(
    operation: str, family: str, shape: Shape, settings: Settings, peaks: Peaks, watch: Stopwatch
) -> dict[str, Any]:
    case = OPERATIONS[operation].FAMILIES[family](shape, settings)
    if settings.device == "cuda" and not case.grad:
        graphs = place.graph(case.candidate), place.graph(case.baseline)
        if None not in graphs:
            case.parts["CUDA graph"] = graphs
    # The peak of this very moment: the clock of a busy or warm machine moves.
    probes = [_peak(peaks)]
    measured = measure_case(case, watch, settings.regimes)
    probes.append(_peak(peaks))
    return _head(operation, family, shape) | measured | _rates(measured, (case.flops, case.bytes), peaks, max(probes))


def _head(operation: str, family: str, shape: Shape) -> dict[str, Any]:
    return {
        "name": f"{family}/{shape.name}",
        "operation": operation,
        "family": family,
        "model": shape.model,
        "layer": shape.layer,
        "shape": dict(shape.dims),
        "tags": list(shape.tags),
    }


def _failed_row(operation: str, family: str, shape: Shape, error: Exception, peaks: Peaks) -> dict[str, Any]:
    """A row that could not be measured: a failed check, no figures."""
    failure = {"error": math.nan, "torch_error": math.nan, "failure": f"{type(error).__name__}: {error}"}
    row = {"kernels": [], "handed_back": False, "check": failure | {"passed": False}, "parts": {}}
    row |= dict.fromkeys(REGIMES)
    return _head(operation, family, shape) | row | _rates(row, (0.0, 0.0), peaks, 1.0)


def _peak(peaks: Peaks) -> float:
    return _C.measure_fma(peaks.isa, peaks.threads, 0.02) if place.current == "cpu" else peaks.fma


def _rows(operation: str, settings: Settings, peaks: Peaks, progress: Progress) -> Iterator[dict[str, Any]]:
    selected = _selected(operation, settings)
    watch = Stopwatch(settings.seconds)
    start = time.monotonic()
    for done, (family, shape) in enumerate(selected):
        if settings.limit and time.monotonic() - start > settings.limit:
            break
        progress(done, len(selected), f"{family}/{shape.name}")
        try:
            row = _row(operation, family, shape, settings, peaks, watch)
        except RuntimeError as error:
            if settings.device == "cpu":
                raise
            row = _failed_row(operation, family, shape, error, peaks)  # on a GPU: the rows before it are kept
        yield row
    progress(len(selected), len(selected), "")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a family: geometric means of the speed-up over rows that ran fastdl's kernels and passed their check."""
    means = []
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        counted = [row for row in members if row["warm"] and not row["handed_back"]]
        worst = min(counted, key=lambda row: row["warm"]["speedup"], default=None)
        mean: dict[str, Any] = {"family": family, "rows": len(members), "counted": len(counted)}
        for regime in ("warm", "cold", "idle"):
            speedups = [row[regime]["speedup"] for row in counted if row[regime]]
            mean[regime] = geometric_mean(speedups) if speedups else None
        mean["worst"] = worst and {"name": worst["name"], "speedup": worst["warm"]["speedup"]}
        means.append(mean)
    return means


def run(operation: str, settings: Settings, progress: Progress = lambda done, total, name: None) -> dict[str, Any]:
    """Measure and return the document. ValueError for settings that this build or machine cannot serve."""
    _validate(operation, settings)
    before = torch.get_num_threads()
    try:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        threads, why = _C.threads()
        if settings.threads and threads != settings.threads:
            raise ValueError(f"{operation}: threads: {settings.threads} asked, {threads} possible ({why})")
        with place.at(settings.device):
            if settings.device == "cpu":
                peaks = Peaks.measure(threads, min(0.05, settings.seconds))
                settings = replace(settings, threads=threads, isa=_C.cpu_info()["isa"])
            else:
                peaks = place.peaks(settings.torch_dtype)
                settings = replace(settings, isa=peaks.isa)
            others = OtherLoad()
            rows = list(_rows(operation, settings, peaks, progress))
            other_load = others.processors()
        machine = describe()
    finally:
        torch.set_num_threads(before)
    if not rows:
        raise ValueError(
            f"{operation}: no row matches families {settings.families or 'all'}, shapes {settings.shapes!r}"
        )
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["fastdl", *sys.argv[1:]],
        "machine": machine,
        "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()},
        "peaks": asdict(peaks),
        "other_load": other_load,
        "rows": rows,
        "left_out": len(_selected(operation, settings)) - len(rows),
        "means": summarise(rows),
    }
