"""tools/gpu_check: a step that fails, hangs or has nothing to run with ends itself and not the run."""

import argparse
import importlib.machinery
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "gpu_check"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree")


@pytest.fixture(scope="module")
def tool():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.fixture
def check(tool, tmp_path):
    options = argparse.Namespace(out=str(tmp_path / "out"), seconds=20.0, steps="", twin=True, package=None)
    made = tool.Check(options, tmp_path)
    yield made
    made.log.close()


def rows(check):
    return {row["name"]: row for row in json.loads((check.out / "gpu_check.json").read_text())["steps"]}


def test_steps_are_recorded_as_they_end(tool, check):
    def fails(check):
        check.run(sys.executable, "-c", "print('seen'); raise SystemExit(3)")

    def hangs(check):
        check.run(sys.executable, "-c", "import time; time.sleep(60)")

    def absent(check):
        raise tool.Skipped("no such tool")

    def broken(check):
        return 1 / 0

    start = time.monotonic()
    check.step("works", 5, lambda check: check.run(sys.executable, "-c", "print('hello')"))
    check.step("fails", 5, fails)
    check.step("hangs", 1.5, hangs)
    check.step("absent", 5, absent)
    check.step("broken", 5, broken)
    assert time.monotonic() - start < 15
    found = rows(check)
    assert {name: row["status"] for name, row in found.items()} == {
        "works": "passed", "fails": "failed", "hangs": "failed", "absent": "skipped", "broken": "failed",
    }  # fmt: skip
    assert found["works"]["result"] == "hello\n"
    assert "exit status 3" in found["fails"]["why"] and "seen" in found["fails"]["why"]
    assert "no end within" in found["hangs"]["why"]
    assert "ZeroDivisionError" in found["broken"]["why"]


def test_what_a_hanging_step_started_ends_with_it(tool, check):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    check.step("hangs", 1.5, lambda check: check.run(sys.executable, "-c", code))
    assert time.monotonic() - start < 10  # the child holds the pipe: without its end, communicate() would wait


def test_no_time_is_left_after_the_end(tool, check):
    check.end = time.monotonic()
    check.step("late", 5, lambda check: check.run(sys.executable, "-c", ""))
    assert rows(check)["late"]["why"] == "no time left"


def test_the_steps_fit_into_nine_minutes(tool):
    assert tool.SECONDS <= 535
    assert [name for name, _, _ in tool.STEPS][:2] == ["facts", "build"]
