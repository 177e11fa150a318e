"""Plants one bug at a time in a copy of the sources and demands that the tests notice.

usage: python tests/mutation/run.py [NAME ...]          all bugs of the table, or those named; about 30 minutes

The unmutated copy must pass the same tests first. Exits nonzero when a bug survives, when its line is not found exactly
once (the source has moved on: adapt the table), or when a test selection is empty.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attention
import conv_python
import gemm
import rnn

from mutation import Mutation

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds a selection may take; a hang counts as noticed
TESTS_FAILED = 1  # pytest's exit status; 2 and above: interrupted, internal error, bad usage, nothing collected


MUTATIONS = [*gemm.MUTATIONS, *attention.MUTATIONS, *rnn.MUTATIONS, *conv_python.MUTATIONS]


class Workbench:
    """A copy of the sources, built and tested in place."""

    def __init__(self, folder: Path) -> None:
        self.source, self.build = folder / "source", folder / "build"
        skip = shutil.ignore_patterns("_C.*.so", "__pycache__", ".git", "build", "dist", ".venv", "*_cache")
        shutil.copytree(ROOT, self.source, ignore=skip)
        cmakedir = self._output(sys.executable, "-m", "pybind11", "--cmakedir").strip()
        self._output(
            *("cmake", "-S", self.source, "-B", self.build, "-DCMAKE_BUILD_TYPE=Release", "-DFASTDL_EMULATE_AMX=ON"),
            *(f"-Dpybind11_DIR={cmakedir}", f"-DPython_EXECUTABLE={sys.executable}"),
        )

    def _output(self, *command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def make(self) -> None:
        self._output("cmake", "--build", self.build, "--target", "_C", "--parallel", os.cpu_count() or 1)
        for module in self.build.glob("_C.*.so"):
            target = self.source / "python" / "fastdl" / module.name
            target.unlink(missing_ok=True)  # a running process keeps the old file
            shutil.copy(module, target)

    def test(self, arguments: str) -> str:
        """One of "passed", "failed", "crashed" or "hung"; exits where pytest could not run the selection."""
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {arguments}"
        env = {**os.environ, "PYTHONPATH": str(self.source / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", f"exec {command}"],
                cwd=self.source,
                env=env,
                timeout=TIMEOUT,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return "hung"
        if done.returncode > TESTS_FAILED:
            sys.exit(f"{command}: exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return {0: "passed", TESTS_FAILED: "failed"}.get(done.returncode, "crashed")

    def plant(self, mutation: Mutation) -> str:
        """Apply, build, test, undo."""
        file = self.source / mutation.file
        original = file.read_text()
        if original.count(mutation.old) != 1:
            sys.exit(
                f"{mutation.name}: found {original.count(mutation.old)} times in {mutation.file}: {mutation.old!r}"
            )
        file.write_text(original.replace(mutation.old, mutation.new))
        try:
            self.make()
            return self.test(mutation.tests)
        finally:
            file.write_text(original)


def main(names: list[str]) -> int:
    unknown = set(names) - {m.name for m in MUTATIONS}
    if unknown:
        sys.exit(f"no such bug: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder))
        bench.make()
        for tests in dict.fromkeys(m.tests for m in chosen):
            if (result := bench.test(tests)) != "passed":
                sys.exit(f"the unmutated sources: {tests}: {result}")
        print(f"unmutated: {len({m.tests for m in chosen})} selections pass", flush=True)
        width = max(len(m.name) for m in chosen)
        for mutation in chosen:
            start = time.monotonic()
            result = bench.plant(mutation)
            if result == "passed":
                survivors.append(mutation.name)
            verdict = "SURVIVED" if result == "passed" else f"caught ({result})"
            print(
                f"{mutation.name:{width}}  {verdict:16}  {time.monotonic() - start:4.0f} s  {mutation.tests}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
