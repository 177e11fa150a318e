"""`fastdl bench compare A.json B.json`: what changed from A to B, and whether it is more than noise.

Two runs meet two states of a machine, so a row's verdict rests on its time as a multiple of torch's time in the same
run, which drift leaves alone: faster or slower when the quartiles of the two runs do not overlap and the medians
differ by more than 2%. The plain ratio of times stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fastdl.bench.harness import geometric_mean
from fastdl.bench.report import make_table

_LEAST_CHANGE = 0.02
_SETTINGS = ("dtype", "threads", "isa", "frozen", "kernel")


@dataclass(frozen=True)
class Change:
    """One row in both documents; ratios above 1: B is faster."""

    name: str
    time_ratio: float  # A's ms / B's
    ratio: float  # the same of the times as multiples of torch's
    verdict: str  # "faster" | "slower" | "within noise"


def _key(document: dict[str, Any], row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["operation"], row["name"], *(document["settings"][name] for name in _SETTINGS))


def _verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    if abs(b["speedup"] / a["speedup"] - 1) > _LEAST_CHANGE:
        if b["speedup_q1"] > a["speedup_q3"]:
            return "faster"
        if b["speedup_q3"] < a["speedup_q1"]:
            return "slower"
    return "within noise"


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Rows with warm times in both documents, matched by name and settings, in A's order."""
    others = {_key(b, row): row for row in b["rows"]}
    found = []
    for row in a["rows"]:
        other = others.get(_key(a, row))
        if other and row["warm"] and other["warm"]:
            before, after = row["warm"], other["warm"]
            time_ratio = before["fastdl"]["ms"] / after["fastdl"]["ms"]
            ratio = after["speedup"] / before["speedup"]
            found.append(Change(row["name"], time_ratio, ratio, _verdict(before, after)))
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What makes the two documents hard to compare: another machine, another torch, other settings."""
    facts = {
        "processor": lambda d: d["machine"]["cpu"]["brand"],
        "processors": lambda d: d["machine"]["cpu"]["cpus"],
        "system": lambda d: d["machine"]["system"],
        "torch": lambda d: d["machine"]["versions"]["torch"],
        **{name: lambda d, name=name: d["settings"][name] for name in _SETTINGS},
    }
    pairs = {name: (fact(a), fact(b)) for name, fact in facts.items()}
    return [f"{name}: {before!r} in A, {after!r} in B" for name, (before, after) in pairs.items() if before != after]


def print_comparison(a: dict[str, Any], b: dict[str, Any], console: Console) -> None:
    """Differences between the runs, a line a row, and the summary."""
    found = changes(a, b)
    for line in differences(a, b):
        console.print(f"NOT ALIKE {line}", markup=False, soft_wrap=True)
    if not found:
        console.print("no rows in common: rows match by name and settings")
        return
    table = make_table("A to B, above 1: B is faster", ("row",), ("time", "against torch's", "verdict"))
    for change in found:
        table.add_row(change.name, f"{change.time_ratio:.2f}", f"{change.ratio:.2f}", change.verdict)
    console.print(table)
    counts = {v: sum(change.verdict == v for change in found) for v in ("faster", "slower", "within noise")}
    missing = len(a["rows"]) + len(b["rows"]) - 2 * len(found)
    console.print(
        f"\n{len(found)} rows in both: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}; "
        f"geometric mean against torch's {geometric_mean([change.ratio for change in found]):.3f}; "
        f"{missing} rows without a counterpart or without times"
    )
