"""Threads: same bits at any count and in every run; fork, nesting, affinity, one OpenMP runtime."""

import ctypes
import os
import re
import sys
import threading

import pytest
import torch

from conftest import DTYPES, every_dtype, exact_product
from fastdl import _C, functional
from fastdl.testing import LAYOUTS, integer_matrix

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
needs_openmp = pytest.mark.skipif(not _C.build_info()["openmp"], reason="built without OpenMP")
TEAMS = (1, 2, 3, 5)
SHAPES = [(1, 2000, 700), (37, 53, 1500), (200, 300, 257), (9, 1100, 64), (700, 9, 64)]


@pytest.fixture
def normal(kernel, generator):
    """normal(shape): normally distributed numbers in the row's dtype."""
    return lambda *shape: torch.randn(shape, generator=generator).to(DTYPES[kernel["dtype"]])


@pytest.fixture
def restore_num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "both_strided"])
def test_any_team_gives_the_same_bits(kernel, gemm, layout, normal):
    if kernel["kind"] == "dot" and layout != "contiguous":
        pytest.skip("not contiguous along K")
    for M, N, K in SHAPES:
        a = LAYOUTS[layout](normal(M, K))
        b = LAYOUTS[layout](normal(K, N))
        bias, before = normal(N), normal(M, N)
        results = []
        for threads in TEAMS:
            out = before.clone()
            gemm(out, a, b, bias, True, threads=threads)
            results.append(out)
        assert all(torch.equal(results[0], other) for other in results[1:]), (M, N, K)


def test_batches_give_the_same_bits(gemm, normal):
    a, b = normal(7, 45, 130), normal(7, 130, 67)
    results = [torch.empty(7, 45, 67, dtype=a.dtype) for _ in TEAMS]
    for out, threads in zip(results, TEAMS, strict=True):
        gemm(out, a, b, threads=threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("threads", [2, 5])
def test_twenty_runs_give_the_same_bits(gemm, threads, normal):
    a, b = normal(150, 700), normal(700, 300)
    first = torch.empty(150, 300, dtype=a.dtype)
    gemm(first, a, b, threads=threads)
    for _ in range(20):
        again = torch.empty(150, 300, dtype=a.dtype)
        gemm(again, a, b, threads=threads)
        assert torch.equal(first, again)


@every_dtype
def test_bias_gradient_gives_the_same_bits(dtype, generator):
    x = torch.randn(3001, 70, generator=generator).to(dtype)
    results = []
    for threads in TEAMS * 5:
        out = torch.empty(70, dtype=dtype)
        _C.sum_rows(out, x, threads=threads)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_forward_and_backward_give_the_same_bits(restore_num_threads, generator):
    x, w, b = (torch.randn(s, generator=generator).requires_grad_() for s in ((120, 400), (300, 400), (300,)))
    dy = torch.randn(120, 300, generator=generator)
    results = []
    for threads in (1, 2) * 10:
        torch.set_num_threads(threads)
        y = functional.linear(x, w, b)
        results.append((y.detach(), *torch.autograd.grad(y, (x, w, b), dy)))
    for other in results[1:]:
        assert all(torch.equal(t, o) for t, o in zip(results[0], other, strict=True))


def test_concurrent_callers(gemm, integers):
    """Several Python threads at once must not share scratch."""
    a, b = integers((150, 300), 300), integers((200, 300), 300).t()  # packed
    expected = exact_product(a, b)
    wrong = []

    def caller(threads):
        for _ in range(25):
            out = torch.full((150, 200), float("nan"), dtype=a.dtype)
            gemm(out, a, b, threads=threads)
            if not torch.equal(out, expected):
                wrong.append(threads)

    callers = [threading.Thread(target=caller, args=(1 + i % 2,)) for i in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not wrong


# --- the team ---------------------------------------------------------------------------------------------------------
@needs_openmp
def test_team_follows_torch(restore_num_threads, run_python):
    torch.set_num_threads(1)
    assert _C.threads()[0] == 1
    assert _C.gemm_plan(1024, 1024, 1024)["threads"] == 1
    assert _C.threads(3) == (3, "as requested")
    run_python(
        "-c",
        "import os, torch\n"
        "from fastdl import _C\n"
        "cpus = len(os.sched_getaffinity(0))\n"
        "for n in range(1, cpus + 1):\n"
        "    torch.set_num_threads(n)\n"
        "    assert _C.threads()[0] == n, (_C.threads(), n)\n"
        "    assert _C.gemm_plan(2048, 2048, 2048)['threads'] == n\n",
    )


@linux_only
def test_serial_where_the_affinity_mask_is_smaller(run_python):
    code = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from fastdl import _C\n"
        "assert torch.get_num_threads() == 2\n"
        "threads, why = _C.threads()\n"
        "assert threads == 1 and 'CPU' in why, (threads, why)\n"
        "x = torch.ones(300, 300)\n"
        "out = torch.empty(300, 300)\n"
        "_C.gemm(out, x, x)\n"
        "assert bool((out == 300).all())\n"
    )
    run_python("-c", code)


@linux_only
def test_long_calls_take_a_thread_a_cpu_where_torch_has_more(run_python):
    code = (
        "import os, torch\n"
        "os.dup2(1, 2)\n"
        "torch.set_num_threads(2 * len(os.sched_getaffinity(0)))\n"
        "from fastdl import _C\n"
        "x = torch.ones(1024, 1024)\n"
        "out = torch.empty(1024, 1024)\n"
        "_C.gemm(out, x, x)\n"
        "assert bool((out == 1024).all())\n"
        "_C.gemm(out[:8, :8], x[:8], x[:, :8])\n"
    )
    log = run_python("-c", code, env={"FASTDL_LOG": "1"})
    cpus = len(os.sched_getaffinity(0))
    threads = [int(n) for n in re.findall(r"threads=(\d+)", log)]
    assert max(threads) <= cpus and (cpus == 1 or threads[0] > 1 == threads[-1]), log


def test_one_openmp_runtime(run_python):
    code = (
        "import torch\n"
        "from fastdl import _C, functional\n"
        "x = torch.ones(500, 500)\n"
        "functional.linear(x, x)\n"
        "_C.gemm(torch.empty(500, 500), x, x, threads=2)\n"
        "x @ x\n"
        "print(open('/proc/self/maps').read())\n"
    )
    runtimes = set(re.findall(r"\S*/lib(?:g|i)?omp\d*[-.]\S*", run_python("-c", code)))
    assert len(runtimes) == 1, runtimes


@linux_only
@needs_openmp
def test_serial_inside_a_foreign_parallel_region(generator):
    """A region opened by other code on the same runtime: the caller's threads must not multiply."""
    gomp = ctypes.CDLL(_C.__file__)  # its symbols and those of the runtime it found: other packages may bundle another
    a, b = integer_matrix((120, 200), 200, generator), integer_matrix((200, 130), 200, generator)
    expected = (a.double() @ b.double()).float()
    seen = []

    def body(_):
        out = torch.empty(120, 130)
        _C.gemm(out, a, b)
        seen.append((*_C.threads(), torch.equal(out, expected)))

    assert _C.threads(2)[0] == 2
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)
    gomp.GOMP_parallel(region, None, 2, 0)
    assert seen == [(1, "serial inside a parallel region", True)] * 2


@linux_only
def test_fork_after_use(run_python):
    """The child of a process whose team has run: right results, serial, no hang, also when its parent goes on.

    Results are compared through NumPy: torch's own loops hang in such a child.
    """
    code = (
        "import os, signal, torch, warnings\n"
        "from fastdl import _C, functional\n"
        "warnings.filterwarnings('ignore', message='.*fork.*', category=DeprecationWarning)\n"
        "x, w = torch.randn(300, 300), torch.randn(300, 300)\n"
        "before = functional.linear(x, w).numpy().tobytes()\n"
        "_C.gemm(torch.empty(300, 300), x, w, threads=2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    out = torch.empty(300, 300)\n"
        "    ok = functional.linear(x, w).numpy().tobytes() == before\n"
        "    ok = ok and _C.threads(2)[0] == 1 and 'fork' in _C.threads()[1]\n"
        "    _C.linear(out, x, w, threads=2)\n"
        "    os._exit(0 if ok and out.numpy().tobytes() == before else 1)\n"
        "for _ in range(10):\n"
        "    assert functional.linear(x, w).numpy().tobytes() == before\n"
        "status = os.waitpid(child, 0)[1]\n"
        "assert status == 0, status\n"
        "assert functional.linear(x, w).numpy().tobytes() == before\n"
    )
    run_python("-c", code)


@linux_only
def test_multiprocessing_fork_pool(run_python):
    """The way data loaders fork: workers that call in while the parent does."""
    code = (
        "import multiprocessing, torch, warnings\n"
        "from fastdl import functional\n"
        "warnings.filterwarnings('ignore', message='.*fork.*', category=DeprecationWarning)\n"
        "x = torch.ones(200, 200)\n"
        "functional.linear(x, x)\n"
        "def work(i):\n"
        "    return float(functional.linear(x, x).numpy().sum()) * i\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    pending = pool.map_async(work, range(4))\n"
        "    functional.linear(x, x)\n"
        "    assert pending.get(timeout=30) == [i * 200.0**3 for i in range(4)]\n"
    )
    run_python("-c", code)
