"""What a benchmark leaves behind: one JSON document, and the tables printed from it.

The document (`schema` 1):

    schema     int
    date       ISO 8601, UTC
    command    list of str, as typed
    machine    {cpu, system, threads, openmp_runtimes, build, versions, ...}, see `fastdl.machine.describe`
    settings   {dtype, threads, isa, frozen, kernel, families, shapes, regimes, seconds, device, limit}; on a GPU
               isa is its compute capability, and fma in `peaks` a large product by torch
    peaks      {threads, isa, fma (FLOP/s), read {memory: bytes/s}, capacity {memory: bytes}}, as measured
    other_load null (unknown) or how many processors other programs kept busy during the run
    rows       list of
        name, operation, family, model, layer, tags
        shape          {size name: int}
        kernels        list of str: fastdl's kernels that ran; empty when none did
        handed_back    bool: torch did the work, or a part of it; such rows enter no mean
        check          {passed, failure (str), error, torch_error}: errors are rms(err/S) against float64
        warm, cold, idle   null (not measured, or the check failed) or
            fastdl, torch  {ms, q1_ms, q3_ms, rounds, inner}: median and quartiles of a call
            speedup, speedup_q1, speedup_q3    torch's time / fastdl's, over paired rounds
        parts          {"existing output" | "forward only" | "contiguous" | "channels_last" | "without mask": null or as
                       `warm`}; "without mask" compares fastdl with one ("fastdl") with fastdl without one ("torch")
        gflops, gbytes fastdl's rates, warm, in 1e9 a second; bytes are the operands and the result once
        fma_percent    of the FMA peak measured beside the row
        read_percent   of the read bandwidth of `memory`, the fastest level that holds the operands and the result
    left_out   int: rows that the time limit left out
    means      list of {family, rows, counted, warm, cold, idle (geometric means of speed-ups), worst {name, speedup}}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_TOLERATED_LOAD = 0.2  # processors; a team that waits for a descheduled thread loses milliseconds
_PLAIN_WIDTH = 170  # of a table that goes to a file or a pipe


def make_console(stderr: bool = False) -> Console:
    """A console whose tables keep their columns when the output is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


def make_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """A table with left-aligned columns followed by right-aligned ones; nothing is cut short."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A benchmark document. ValueError where the file is none, or of another schema."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != 1 or "rows" not in document:
        raise ValueError(f"{path.name}: expected a benchmark document of schema 1")
    return document


def write_json(document: Any, target: str) -> None:
    """Write to the file `target`, or to standard output for "-"."""
    text = json.dumps(document, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def _significant(value: float) -> str:
    """Three digits: 0.00123, 4.56, 789."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(timing: dict[str, Any]) -> str:
    half = (timing["q3_ms"] - timing["q1_ms"]) / 2 / timing["ms"]
    return f"{_significant(timing['ms'])} ±{100 * half:.0f}%"


def _times(comparison: dict[str, Any] | None) -> str:
    return f"{comparison['speedup']:.2f}" if comparison else "-"


def _peak(row: dict[str, Any]) -> str:
    """The nearer of the two peaks: of FMA, or of the memory level the operands fit in."""
    if row["fma_percent"] >= row["read_percent"]:
        return f"{row['fma_percent']:.0f}% FMA"
    return f"{row['read_percent']:.0f}% {row['memory']}"


def _cells(row: dict[str, Any]) -> list[str]:
    head = [row["name"], ", ".join(row["kernels"]) or "torch"]
    errors = [f"{row['check']['error']:.1e}", f"{row['check']['torch_error']:.1e}"]
    if not row["warm"]:
        return [*head, *["-"] * 8, *errors]
    warm = row["warm"]
    rates = [_significant(row["gflops"]), _significant(row["gbytes"]), _peak(row)]
    speedups = [_times(row[regime]) for regime in ("warm", "cold", "idle")]
    return [*head, _spread(warm["fastdl"]), _spread(warm["torch"]), *speedups, *rates, *errors]


_LEFT = ("row", "kernel")
_RIGHT = ("fastdl ms", "torch ms", "x torch", "cold", "idle", "GFLOP/s", "GB/s", "of peak", "error", "torch's")


def _print_rows(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        table = make_table(title, _LEFT, _RIGHT)
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)
        console.print()


def busy(document: dict[str, Any]) -> str:
    """Why the times are not to be trusted, or ""."""
    load = document["other_load"] or 0.0
    return f"other programs kept {load:.1f} processors busy" if load > _TOLERATED_LOAD else ""


def _print_parts(console: Console, rows: list[dict[str, Any]]) -> None:
    parts = [(row["name"], name, part) for row in rows for name, part in row["parts"].items() if part]
    if parts:
        table = make_table("Parts", ("row", "part"), ("fastdl ms", "other ms", "x other"))
        for row_name, name, part in parts:
            table.add_row(row_name, name, _spread(part["fastdl"]), _spread(part["torch"]), _times(part))
        console.print(table)
        console.print()


def _print_means(console: Console, means: list[dict[str, Any]]) -> None:
    table = make_table(
        "Geometric means of x torch", ("family",), ("rows", "counted", "warm", "cold", "idle", "worst", "worst row")
    )
    for mean in means:
        values = ["-" if mean[regime] is None else f"{mean[regime]:.3f}" for regime in ("warm", "cold", "idle")]
        worst = mean["worst"] or {"speedup": float("nan"), "name": "-"}
        table.add_row(
            mean["family"],
            str(mean["rows"]),
            str(mean["counted"]),
            *values,
            f"{worst['speedup']:.2f}",
            worst["name"].partition("/")[2] or "-",
        )
    console.print(table)


def print_document(document: dict[str, Any], console: Console) -> None:
    """Rows, those handed back to torch apart, failed checks, means; losses as plainly as wins."""
    machine, settings = document["machine"], document["settings"]
    if settings.get("device", "cpu") != "cpu":
        names = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "the host twin"
        console.print(
            f"{settings['device']}: {names}, {settings['isa']}, {settings['dtype']}; "
            f"torch's own large product (FMA below) {document['peaks']['fma'] * 1e-12:.3g} TFLOP/s, "
            f"its copy {document['peaks']['read']['memory'] * 1e-9:.0f} GB/s; {document['left_out']} rows left out"
        )
    console.print(
        f"{machine['cpu']['brand']}, {settings['isa']}, {settings['threads']} threads, {settings['dtype']}, "
        f"{'frozen' if settings['frozen'] else 'not frozen'}; fastdl {machine['versions']['fastdl']}, "
        f"torch {machine['versions']['torch']}; FMA peak {document['peaks']['fma'] * 1e-9:.0f} GFLOP/s"
    )
    console.print("x torch: torch's time / fastdl's, above 1 fastdl is faster. error: rms(err/S) against float64.\n")
    failed = [row for row in document["rows"] if not row["check"]["passed"]]
    passed = [row for row in document["rows"] if row["check"]["passed"]]
    _print_rows(console, document["settings"]["dtype"], [row for row in passed if not row["handed_back"]])
    _print_rows(console, "Handed back to torch, in no mean", [row for row in passed if row["handed_back"]])
    _print_parts(console, passed)
    _print_means(console, document["means"])
    if busy(document):
        console.print(f"NOT TO BE TRUSTED: {busy(document)} meanwhile", soft_wrap=True)
    for row in failed:
        console.print(f"CHECK FAILED {row['name']}: {row['check']['failure']}", markup=False, soft_wrap=True)
