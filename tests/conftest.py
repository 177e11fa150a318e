"""Fixtures: `kernel` runs a test once for each row of the GEMM kernel table, rows not runnable here skipped.

`@pytest.mark.rows(dtype=("bfloat16", "float16"), kind="tile")` narrows it to the rows that have one of these values.
`gpu` runs a test of CUDA kernels on their host twin and on a GPU, each where it is there.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdl import _C
from fastdl.ops import calls, cuda
from fastdl.testing import LAYOUTS, UNIT_ROUNDOFF, GuardedOutput, integer_matrix, twin

# torch keeps compiled graphs on disk by the names of their operations: another build's shapes must not come back.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

SCRIPTS = Path(__file__).parent / "scripts"
KERNELS = _C.kernels("gemm")
VECTOR_WIDTH = {"scalar": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16, "amx": 16}  # floats in a register of the level
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def exact_product(a, b, *terms):
    """a @ b + terms in float64, rounded once to the dtype of a."""
    return sum((term.double() for term in terms), a.double() @ b.double()).to(a.dtype)


def assert_sums_of_products(run, ours, theirs, args, roundings):
    """run(ours, args) against run(theirs, args) in float64, where each result is a polynomial with coefficients >= 0.

    |err| <= g*S, g = h*u/(1 - h*u): h the roundings on the longest way from an operand to a result, S the results for
    the operands' absolute values.
    """
    doubles = [t.detach().double() for t in args]
    scales = run(theirs, [t.abs() for t in doubles])
    g = roundings * UNIT_ROUNDOFF[torch.float32] / (1 - roundings * UNIT_ROUNDOFF[torch.float32])
    for actual, expected, scale in zip(run(ours, args), run(theirs, doubles), scales, strict=True):
        assert actual.dtype == torch.float32
        error = (actual.double() - expected).abs()
        assert bool((error <= g * scale).all()), f"{(error / (g * scale)).max().item():.2f} times the bound"


def takes(kernel, a, b):
    """Whether the row can be forced on these operands: dot kernels read both contiguous along K."""
    return kernel["kind"] == "tile" or (a.stride(-1) == 1 and b.stride(-2) == 1)


def b_for(kernel, b):
    """b in a layout that the row takes."""
    return b if kernel["kind"] == "tile" else LAYOUTS["transposed"](b)


def layout_pairs(kernel, names=tuple(LAYOUTS)):
    """Names of the layouts of A and B that the row takes."""
    probe = torch.empty(5, 7), torch.empty(7, 9)
    return [(a, b) for a in names for b in names if takes(kernel, LAYOUTS[a](probe[0]), LAYOUTS[b](probe[1]))]


def pytest_configure(config):
    config.addinivalue_line("markers", "rows(**values): the rows of the kernel table that `kernel` goes through")


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("rows")
        wanted = marker.kwargs if marker else {}
        metafunc.parametrize(
            "kernel",
            [
                pytest.param(
                    row, id=row["name"], marks=pytest.mark.skipif(not row["available"], reason=row["reason"] or "-")
                )
                for row in KERNELS
                if all(row[key] in (v if isinstance(v, tuple) else (v,)) for key, v in wanted.items())
            ],
        )


@pytest.fixture(autouse=True)
def no_handbacks_before():
    """What `calls.handbacks` counts is the test's own."""
    calls.handbacks.clear()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20240)


@pytest.fixture
def integers(kernel, generator):
    """integers(shape, K): testing.integer_matrix in the row's dtype."""
    return lambda shape, K: integer_matrix(shape, K, generator, DTYPES[kernel["dtype"]])


@pytest.fixture
def guarded(kernel):
    """guarded(shape, ...): testing.GuardedOutput in the row's dtype."""
    return lambda shape, **options: GuardedOutput(shape, dtype=DTYPES[kernel["dtype"]], **options)


@pytest.fixture
def gemm(kernel):
    """gemm(out, a, b, bias=None, accumulate=False, threads=0): _C.gemm on this row, b in a layout that it takes."""

    def run(out, a, b, bias=None, accumulate=False, threads=0):
        _C.gemm(out, a, b_for(kernel, b), bias, accumulate, kernel=kernel["name"], threads=threads)

    return run


@pytest.fixture
def run_python():
    """run_python(*args, env={}, timeout=60): a fresh interpreter, warnings as errors; returns its stdout.

    args: `"-c", code, ...` or the name of a file in tests/scripts and its arguments. Fails with the exit status
    (negative: the signal) and what was printed.
    """

    def run(first, *args, env=None, timeout=60, status=0):
        first = first if first == "-c" else str(SCRIPTS / first)
        try:
            done = subprocess.run(
                [sys.executable, "-W", "error", first, *map(str, args)],
                capture_output=True,
                text=True,
                timeout=timeout,
                env={**os.environ, **(env or {})},
            )
        except subprocess.TimeoutExpired as hang:
            pytest.fail(f"no end within {timeout} s\n{hang.stdout}\n{hang.stderr}")
        if done.returncode != status:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    return run


@dataclass(frozen=True)
class GpuUnderTest:
    """Where CUDA kernels run in a test: `twin`, with CPU tensors, or `cuda`."""

    name: str
    module: Any  # fastdl._twin or fastdl._cuda
    device: torch.device

    @property
    def is_twin(self) -> bool:
        return self.name == "twin"

    def orders(self) -> Iterator[int]:
        """Runs of one call that must agree bit for bit: the twin's scheduler gets another seed for each."""
        for seed in (0, 1, 2, 1000, 1001):  # from 1000 on, warps run far ahead of each other
            if self.is_twin:
                self.module.set_seed(seed)
            yield seed
        if self.is_twin:
            self.module.set_seed(0)

    def synchronize(self) -> None:
        if not self.is_twin:
            torch.cuda.synchronize(self.device)


def absent_gpu(name: str) -> str:
    """Why tests cannot run on the twin, or on a GPU; "" where they can."""
    module, why = cuda.load("_twin" if name == "twin" else "_cuda")
    if module is None:
        return "the host twin is not built (FASTDL_TWIN=ON)" if name == "twin" else why
    if name == "cuda" and not (torch.cuda.is_available() and module.gpu_count()):
        return "no GPU, or torch is built without CUDA"
    return ""


@pytest.fixture(params=["twin", "cuda"])
def gpu(request, monkeypatch):
    """GpuUnderTest; for the whole test CPU tensors run on the twin, or CUDA tensors on the GPU, from Python too."""
    name = request.param
    if reason := absent_gpu(name):
        pytest.skip(reason)
    module = cuda.load("_twin" if name == "twin" else "_cuda")[0]
    monkeypatch.setattr(cuda, "UNVERIFIED", True)
    with twin() if name == "twin" else nullcontext():
        yield GpuUnderTest(name, module, torch.device("cpu" if name == "twin" else "cuda:0"))
        if name == "cuda":
            torch.cuda.synchronize()  # an error of a kernel belongs to this test
