"""`fastdl bench check`: measures every figure of `benchmarks/bars.toml` and says which are met.

Bars with the same settings share one run of `fastdl bench`, in a process of its own, since torch reads its limits
only when it is loaded. A bar that cannot be measured here counts as missing.
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastdl import _C
from fastdl.bench.harness import geometric_mean
from fastdl.bench.report import busy, make_table, read_json
from fastdl.bench.rnn import padding
from fastdl.bench.shapes import tomllib
from fastdl.machine import CAP_VARIABLES, capped_environment

_MOST_HANDED_BACK = 0.1  # of a bar's rows
_SECONDS = 0.25  # a row
_LACKS = "the processor lacks"


def _fastdl_ms(comparison: dict[str, Any]) -> float:
    return comparison["fastdl"]["ms"]


_METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "speedup": lambda row: row["warm"]["speedup"],
    "time_ratio": lambda row: 1 / row["warm"]["speedup"],
    "fma_percent": lambda row: row["fma_percent"],
    "float32_ratio": lambda row: 1 / row["parts"]["own float32"]["speedup"],
    "read_percent": lambda row: row["read_percent"],
    "mask_ratio": lambda row: 1 / row["parts"]["without mask"]["speedup"],
    "rate_spread": lambda row: row["gflops"],
    "padded_ratio": lambda row: padding(row["shape"]) * _fastdl_ms(row["warm"]) / _fastdl_ms(row["parts"]["padded"]),
}

_OVER_ROWS: dict[str, Callable[[list[float]], float]] = {  # where it is not the geometric mean
    "mask_ratio": max,
    "padded_ratio": max,
    "rate_spread": lambda rates: max(rates) / min(rates),
}
_AT_MOST = ("time_ratio", "float32_ratio", "mask_ratio", "rate_spread", "padded_ratio")  # metrics where less is better


@dataclass(frozen=True)
class Bar:
    """One row of bars.toml."""

    name: str
    issue: int
    operation: str
    families: list[str]
    tag: str
    dtype: str
    threads: int
    isa: str
    frozen: bool
    kernel: str
    metric: str
    must: float
    aim: float
    over: str = "mean"  # of the rows: their geometric mean, or the worst of them

    def __post_init__(self) -> None:
        if self.over not in ("mean", "worst"):
            raise ValueError(f"bar {self.name!r}: over: expected 'mean' or 'worst', got {self.over!r}")
        if self.metric not in _METRICS:
            raise ValueError(f"bar {self.name!r}: metric: expected one of {list(_METRICS)}, got {self.metric!r}")

    @property
    def run(self) -> tuple[Any, ...]:
        """Settings of the run that measures it; equal for bars that share one."""
        return (self.operation, self.dtype, self.threads, self.isa, self.frozen, self.kernel)

    def reached(self, value: float, limit: float) -> bool:
        """Whether `value` is on the good side of `limit`."""
        return value <= limit if self.metric in _AT_MOST else value >= limit


@dataclass(frozen=True)
class Verdict:
    """What came of a bar: `value` None when nothing could be measured; `problem` why it does not count."""

    bar: Bar
    value: float | None
    problem: str = ""
    note: str = ""

    @property
    def met(self) -> bool:
        """Measured, free of problems, and at least as good as `must`."""
        return self.value is not None and not self.problem and self.bar.reached(self.value, self.bar.must)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict and its bar as one object."""
    outcome = {"value": verdict.value, "met": verdict.met, "problem": verdict.problem, "note": verdict.note}
    return asdict(verdict.bar) | outcome


def find_bars(start: Path) -> Path:
    """benchmarks/bars.toml in `start` or the nearest directory above; FileNotFoundError where there is none."""
    for directory in (start, *start.parents):
        path = directory / "benchmarks" / "bars.toml"
        if path.is_file():
            return path
    raise FileNotFoundError(f"no benchmarks/bars.toml in {start} or above: run in the source tree, or give --bars")


def load_bars(path: Path, only: str = "") -> list[Bar]:
    """Bars whose name contains or matches `only`. ValueError for a malformed row or when none is left."""
    try:
        bars = [Bar(**row) for row in tomllib.loads(path.read_text(encoding="utf-8")).get("bar", [])]
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}") from None
    names = [bar.name for bar in bars]
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name}: names repeat")
    chosen = [bar for bar in bars if only in bar.name or fnmatch.fnmatchcase(bar.name, only)]
    if not chosen:
        raise ValueError(f"{path.name}: no bar matches {only!r}, there are {names}")
    return chosen


def obstacle(bar: Bar) -> str:
    """Why this machine cannot measure a bar, or ""."""
    cpu = _C.cpu_info()
    if bar.isa and bar.isa not in cpu["isa_supported"]:
        return f"not measurable here: {_LACKS} {bar.isa}"
    if bar.threads > cpu["cpus"]:
        return f"not measurable here: {bar.threads} threads on {cpu['cpus']} processors"
    return ""


def command(bars: list[Bar], target: str) -> list[str]:
    """The `fastdl bench` command that measures bars of one run."""
    bar = bars[0]
    families = dict.fromkeys(family for bar in bars for family in bar.families)
    options = ["--dtype", bar.dtype, "--threads", str(bar.threads), "--regime", "warm", "--seconds", str(_SECONDS)]
    for family in families:
        options += ["--family", family]
    if bar.isa:
        options += ["--isa", bar.isa]
    if bar.frozen:
        options += ["--frozen"]
    if bar.kernel:
        options += ["--kernel", bar.kernel]
    return [sys.executable, "-m", "fastdl.cli", "bench", bar.operation, *options, "--json", target]


def measure(bars: list[Bar]) -> dict[str, Any]:
    """Run the benchmark that bars share and return its document. RuntimeError when it fails."""
    isa = bars[0].isa
    plain = {key: value for key, value in os.environ.items() if key not in CAP_VARIABLES}
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "rows.json"
        done = subprocess.run(
            command(bars, str(target)),
            env=capped_environment(isa) if isa else plain,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if not target.is_file():  # a run with failed checks ends with status 1 and has its rows
            raise RuntimeError(f"fastdl bench {bars[0].operation} ended with status {done.returncode}")
        return read_json(target)


def judge(bar: Bar, document: dict[str, Any]) -> Verdict:
    """The figure of a bar from the rows of its run.

    It counts when no check failed, few rows were handed back to torch, and the machine had nothing else to do.
    """
    rows = [row for row in document["rows"] if row["family"] in bar.families]
    rows = [row for row in rows if not bar.tag or bar.tag in row["tags"]]
    if not rows:
        return Verdict(bar, None, "no row was measured")
    failed = [row["name"] for row in rows if not row["check"]["passed"]]
    if failed:
        return Verdict(bar, None, f"check failed: {', '.join(failed)}")
    handed = [row for row in rows if row["handed_back"]]
    counted = [row for row in rows if not row["handed_back"]]
    problem = busy(document)
    if len(handed) > _MOST_HANDED_BACK * len(rows) or any("named" in row["tags"] for row in handed):
        problem = f"handed back to torch: {', '.join(row['name'] for row in handed)}"
    if not counted:
        return Verdict(bar, None, problem)
    metric = _METRICS[bar.metric]
    worst = (max if bar.metric in _AT_MOST else min)(counted, key=metric)
    note = f"{len(counted)} row{'s' * (len(counted) > 1)}"
    if len(rows) > 1:
        note += f", worst {metric(worst):.2f} {worst['name']}"
    if handed:
        note += f", {len(handed)} handed back"
    for name, part in counted[0]["parts"].items() if len(rows) == 1 else ():
        note += f", {name} {1 / part['speedup']:.2f} of torch's time"
    over_rows = _OVER_ROWS.get(bar.metric, geometric_mean)
    value = metric(worst) if bar.over == "worst" else over_rows([metric(row) for row in counted])
    return Verdict(bar, value, problem, note)


def check(
    bars: list[Bar],
    measure_run: Callable[[list[Bar]], dict[str, Any]],
    after_run: Callable[[list[Verdict], list[dict[str, Any]]], None] = lambda verdicts, documents: None,
) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """Verdicts in the order of `bars`, and the documents of the runs behind them.

    after_run: called after each run with those there are, for all of them may take more than an hour.
    """
    verdicts: dict[str, Verdict] = {}
    documents = []
    for run in dict.fromkeys(bar.run for bar in bars):
        members = [bar for bar in bars if bar.run == run]
        problem = obstacle(members[0])
        if not problem:
            try:
                documents.append(measure_run(members))
            except RuntimeError as error:
                problem = str(error)
        for bar in members:
            verdicts[bar.name] = Verdict(bar, None, problem) if problem else judge(bar, documents[-1])
        after_run([verdicts[bar.name] for bar in bars if bar.name in verdicts], documents)
    return [verdicts[bar.name] for bar in bars], documents


def print_verdicts(verdicts: list[Verdict], console: Console) -> None:
    """A line a bar, then the count."""
    table = make_table("Bars", ("bar", "metric"), ("must", "aim", "measured", "verdict"))
    table.add_column("rows", overflow="fold")
    for v in verdicts:
        if v.met:
            word = "aim met" if v.value is not None and v.bar.reached(v.value, v.bar.aim) else "met"
        else:
            word = f"NEEDS {v.bar.isa}" if _LACKS in v.problem else "MISSING" if v.value is None else "UNMET"
        value = "-" if v.value is None else f"{v.value:.3f}"
        note = "; ".join(part for part in (v.problem, v.note) if part)
        table.add_row(v.bar.name, v.bar.metric, f"{v.bar.must:g}", f"{v.bar.aim:g}", value, word, escape(note))
    console.print(table)
    console.print(f"\n{sum(v.met for v in verdicts)} of {len(verdicts)} met")
