"""Writes the README's figures from the documents in benchmarks/results/: `python benchmarks/figures.py [--check]`.

With --check nothing is written; the exit status is 1 where the README does not say what the results say.
"""

import sys
from pathlib import Path
from typing import Any

from fastdl.bench import accuracy
from fastdl.bench.report import read_json

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
ACCURACY = (
    "Errors of `linear` against float64 (`fastdl bench accuracy`): err/S, S the same product on absolute values; "
    "M = N = 128.\n"
)
COLUMNS = ("results", "level", "threads", "weights", "family", "rows", "counted", "warm", "cold", "worst row, warm")


def machine_line(document: dict[str, Any]) -> str:
    cpu, versions = document["machine"]["cpu"], document["machine"]["versions"]
    return f"{cpu['brand']}, {cpu['cpus']} CPUs; fastdl {versions['fastdl']}, torch {versions['torch']}"


def table_rows(name: str, document: dict[str, Any]) -> list[str]:
    settings = document["settings"]
    weights = "frozen" if settings["frozen"] else "not frozen"
    lines = []
    for mean in document["means"]:
        warm, cold = ("-" if mean[regime] is None else f"{mean[regime]:.2f}" for regime in ("warm", "cold"))
        worst = mean["worst"]
        cells = [name, settings["isa"], settings["threads"], weights, mean["family"], mean["rows"], mean["counted"]]
        cells += [warm, cold, f"{worst['speedup']:.2f} {worst['name'].partition('/')[2]}" if worst else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def render(folder: Path) -> str:
    """The figures as Markdown: a table a machine, a line a family; rows that torch ran are in no mean."""
    machines: dict[str, list[str]] = {}
    accuracies: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        document = read_json(path)
        if document.get("kind") == "accuracy":
            lines = [f"| {' | '.join(line)} |" for line in accuracy.cells(document)]
            accuracies.setdefault(machine_line(document), []).extend(lines)
            continue
        machines.setdefault(machine_line(document), []).extend(table_rows(path.stem, document))
    if not machines:
        return "No results are recorded yet.\n"
    if not accuracies:
        return tables(COLUMNS, machines)
    return "\n".join([tables(COLUMNS, machines), ACCURACY, tables(accuracy.COLUMNS, accuracies)])


def tables(columns: tuple[str, ...], machines: dict[str, list[str]]) -> str:
    """A table a machine."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return "\n".join(f"{machine}:\n\n{head}{chr(10).join(lines)}\n" for machine, lines in machines.items())


def main(check: bool) -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    updated = before + BEGIN + render(ROOT / "benchmarks" / "results") + END + after
    if check:
        return int(updated != text)
    readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
