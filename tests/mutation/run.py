"""Plants one bug at a time in a copy of the sources and demands that the tests notice.

usage: python tests/mutation/run.py [--part I/N] [NAME ...]     all bugs of the table (about 40 minutes) or those named,
                                                                with --part every N-th of them, from the I-th on

The unmutated copy must pass the same tests first. Exits nonzero when a bug survives, when its line is not found exactly
once (the source has moved on: adapt the table), or when a test selection is empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import attention
import conv
import conv_direct
import conv_python
import conv_wgrad
import cuda_gemm
import cuda_ptx
import gemm
import rnn

from mutation import Mutation

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds a selection may take; a hang counts as noticed
BENCHES = 2  # bugs at a time: one compiles while another's tests start
TESTS_FAILED = 1  # pytest's exit status; 2 and above: interrupted, internal error, bad usage, nothing collected

OPERATIONS = (attention, conv, conv_direct, conv_python, conv_wgrad, cuda_gemm, cuda_ptx, gemm, rnn)
MUTATIONS = [mutation for operation in OPERATIONS for mutation in operation.MUTATIONS]
# Modules and the options to build them with.
MODULES = {
    "_C": ["-DCMAKE_BUILD_TYPE=Release", "-DFASTDL_CUDA=OFF", "-DFASTDL_EMULATE_AMX=ON"],
    "_twin": ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DFASTDL_CUDA=OFF", "-DFASTDL_TWIN=ON"],
}


def module_of(mutation: Mutation) -> str:
    """The module to build with this bug: that of the CPU, or the host twin of the CUDA kernels."""
    cuda = mutation.file.startswith(("csrc/ptx/", "csrc/bind/cuda_")) or "/cuda/" in mutation.file
    return "_twin" if cuda else "_C"


class Workbench:
    """A copy of the sources, one module of which is built and tested in place."""

    def __init__(self, folder: Path, module: str) -> None:
        self.source, self.build, self.pristine = folder / "source", folder / "build", folder / "pristine"
        self.module, self.package = module, self.source / "python" / "fastdl"
        skip = shutil.ignore_patterns("*.so", "__pycache__", ".git", "build", "dist", ".venv", "*_cache")
        shutil.copytree(ROOT, self.source, ignore=skip)
        cmakedir = self._output(sys.executable, "-m", "pybind11", "--cmakedir").strip()
        self._output(
            *("cmake", "-S", self.source, "-B", self.build, *MODULES[module]),
            *(f"-Dpybind11_DIR={cmakedir}", f"-DPython_EXECUTABLE={sys.executable}"),
        )
        if module != "_C":
            self._take_installed("_C")
        self.make()
        shutil.copytree(self.build, self.pristine)

    def _take_installed(self, module: str) -> None:
        spec = importlib.util.find_spec(f"fastdl.{module}")
        if spec is None or spec.origin is None:
            sys.exit(f"fastdl.{module}: install fastdl first, this part of the table builds another module")
        shutil.copy(spec.origin, self.package)

    def _output(self, *command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def make(self) -> None:
        self._output("cmake", "--build", self.build, "--target", self.module, "--parallel", os.cpu_count() or 1)
        for module in self.build.rglob(f"{self.module}.*.so"):
            target = self.package / module.name
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
        times = file.stat()
        file.write_text(original.replace(mutation.old, mutation.new))
        try:
            self.make()
            return self.test(mutation.tests)
        finally:  # as it was, objects and times too: nothing is compiled a second time
            file.write_text(original)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            shutil.rmtree(self.build)
            shutil.copytree(self.pristine, self.build)


def choose(arguments: list[str]) -> list[Mutation]:
    parser = argparse.ArgumentParser(description="Plants bugs that the tests must notice.")
    parser.add_argument("--part", metavar="I/N", default="0/1", help="every N-th bug, from the I-th (from 0) on")
    parser.add_argument("names", metavar="NAME", nargs="*", help="bugs of the table; all of them if none is given")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {m.name for m in MUTATIONS}
    if unknown:
        sys.exit(f"no such bug: {', '.join(sorted(unknown))}")
    part, parts = map(int, options.part.split("/"))
    if not 0 <= part < parts:
        sys.exit(f"--part: expected I/N with 0 <= I < N, got {options.part}")
    return [m for m in MUTATIONS if not options.names or m.name in options.names][part::parts]


def survivors(module: str, chosen: list[Mutation]) -> list[str]:
    """Names of the bugs that no test noticed."""
    found = []
    width = max(len(m.name) for m in chosen)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pool = ThreadPoolExecutor(BENCHES)
        stack.callback(pool.shutdown, cancel_futures=True)  # the first that cannot be tested ends it
        free: SimpleQueue[Workbench] = SimpleQueue()

        def on_a_bench(work: Callable[[Workbench], str]) -> tuple[str, float]:
            bench = free.get()
            start = time.monotonic()
            try:
                return work(bench), time.monotonic() - start
            finally:
                free.put(bench)

        for bench in pool.map(lambda i: Workbench(Path(folder) / str(i), module), range(BENCHES)):
            free.put(bench)
        selections = list(dict.fromkeys(m.tests for m in chosen))
        tested = pool.map(lambda tests: on_a_bench(lambda bench: bench.test(tests)), selections)
        for tests, (result, _) in zip(selections, tested, strict=True):
            if result != "passed":
                sys.exit(f"the unmutated sources: {tests}: {result}")
        print(f"{module}, unmutated: {len(selections)} selections pass", flush=True)
        planted = pool.map(lambda mutation: on_a_bench(lambda bench: bench.plant(mutation)), chosen)
        for mutation, (result, seconds) in zip(chosen, planted, strict=True):
            if result == "passed":
                found.append(mutation.name)
            verdict = "SURVIVED" if result == "passed" else f"caught ({result})"
            print(f"{mutation.name:{width}}  {verdict:16}  {seconds:4.0f} s  {mutation.tests}", flush=True)
    return found


def main(arguments: list[str]) -> int:
    chosen = choose(arguments)
    survived = []
    for module in MODULES:
        if those := [mutation for mutation in chosen if module_of(mutation) == module]:
            survived += survivors(module, those)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} planted bugs caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
