"""pytest plugin of tools/gpu_check: a part of the tests, and a record of each that began and of how it ended.

A test that hangs, crashes or loses the GPU takes its process along, and only that: started again with the same record,
pytest goes on behind it.

GPU_TESTS_RECORD   file of JSON lines, read and written; tests that began there are left out
GPU_TESTS_ON       cuda or twin: tests whose fixture `gpu` is that one; no others
GPU_TESTS_PART     "2/8": every eighth of them, beginning with the third
GPU_TESTS_CHOICE   names of test functions, separated by commas; "first": the first test of each row of
                   GPU_TESTS_ROWS, and those of tails; "rest": all others; "": all
GPU_TESTS_ROWS     names of kernels, separated by commas: parts of the names of tests that run them
GPU_TESTS_SECONDS  what a test may take
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_lost import LOST, gpu_is_lost

RECORD = Path(os.environ["GPU_TESTS_RECORD"])
ON = os.environ["GPU_TESTS_ON"]
SECONDS = float(os.environ["GPU_TESTS_SECONDS"])
_stderr = os.dup(2)  # before pytest captures it
_last: dict[str, Any] = {}


def write(**row: Any) -> None:
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that was being written when the process ended is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _chosen(items: list[pytest.Item]) -> list[pytest.Item]:
    choice = os.environ["GPU_TESTS_CHOICE"]
    ours = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("gpu") == ON]
    if choice not in ("first", "rest"):
        return [item for item in ours if not choice or item.originalname in choice.split(",")]
    first = {item for item in ours if "tails" in item.originalname}
    for row in filter(None, os.environ.get("GPU_TESTS_ROWS", "").split(",")):
        name = re.compile(rf"\b{row}(?!\w)")
        first |= {next((item for item in ours if name.search(item.name)), None)}
    return [item for item in ours if (item in first) == (choice == "first")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, _, parts = os.environ["GPU_TESTS_PART"].partition("/")
    mine = _chosen(items)[int(part) :: int(parts)]
    rows = read(RECORD)
    begun = {row["begin"] for row in rows if "begin" in row}
    if not any("collected" in row for row in rows):
        write(collected=len(mine))
    items[:] = [item for item in mine if item.nodeid not in begun]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, said once."""
    first = os.environ["GPU_TESTS_PART"].startswith("0/")
    if report.failed and first and not any(row.get("end") == report.nodeid for row in read(RECORD)):
        write(end=report.nodeid, outcome="failed", why=report.longreprtext[-1500:], seconds=0.0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _last.clear()
    _last.update(outcome="passed", why="", seconds=0.0)
    write(begin=item.nodeid)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    lost = _last["outcome"] == "failed" and gpu_is_lost()
    write(end=item.nodeid, lost=lost, **_last)
    if lost:
        os.write(_stderr, f"{item.nodeid}: the GPU is lost to this process\n{_last['why']}\n".encode())
        os._exit(LOST)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _last["seconds"] = round(_last["seconds"] + report.duration, 2)
    if report.failed or (report.skipped and _last["outcome"] == "passed"):
        _last["outcome"] = report.outcome
        _last["why"] += report.longreprtext[-1500:] if report.failed else str(report.longrepr)[-300:]
