"""tools/gpu_check: what fails, hangs, crashes or is missing costs itself and not the run, and all that is known is
written."""

import argparse
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdl.ops import cuda

SCRIPT = Path(__file__).parent.parent / "tools" / "gpu_check"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree")
PYTHON = sys.executable


@pytest.fixture(scope="module")
def tool():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    before = sys.dont_write_bytecode, list(sys.path)
    loader.exec_module(module)
    sys.dont_write_bytecode, sys.path[:] = before
    return module


@pytest.fixture
def check(tool, tmp_path):
    options = argparse.Namespace(out=str(tmp_path / "out"), seconds=40.0, steps="", twin=True, package=None)
    (tmp_path / "scratch").mkdir()
    made = tool.GpuCheck(options, tmp_path / "scratch")
    yield made
    made.close()


def document(check):
    return json.loads((check.out / "gpu_check.json").read_text())


def rows(check):
    return {row["name"]: row for row in document(check)["steps"]}


def says(text, status=0):
    """A command that prints this and exits so."""
    return PYTHON, "-S", "-c", f"print({text!r}); raise SystemExit({status})"


HANGS = (PYTHON, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)")


# --- steps --------------------------------------------------------------------------------------------------------
def test_steps_are_recorded_as_they_end(tool, check):
    def absent(check):
        raise tool.Skipped("no such tool")

    start = time.monotonic()
    check.step("works", 5, lambda check: check.run(*says("hello")))
    check.step("fails", 5, lambda check: check.run(*says("seen", 3)))
    check.step("hangs", 1.5, lambda check: check.run(*HANGS))
    check.step("absent", 5, absent)
    check.step("broken", 5, lambda check: 1 / 0)
    check.step("not there", 5, lambda check: check.run("no-such-program"))
    assert time.monotonic() - start < 15
    found = rows(check)
    assert {name: row["status"] for name, row in found.items()} == {
        "works": "passed", "fails": "failed", "hangs": "failed", "absent": "skipped", "broken": "failed",
        "not there": "failed",
    }  # fmt: skip
    assert found["works"]["result"] == "hello\n"
    assert found["fails"]["why"].splitlines()[0] == "exit status 3: seen"
    assert "no end within" in found["hangs"]["why"] and "begun" in found["hangs"]["why"]
    assert "ZeroDivisionError" in found["broken"]["why"]
    assert "no-such-program cannot be run" in found["not there"]["why"]
    assert "begun" in (check.out / "gpu_check.log").read_text()


@pytest.mark.parametrize("own_session", [False, True])
def test_what_a_hanging_step_started_keeps_nobody_waiting(check, own_session):
    """It ends with the step; where it made a session of its own, it is left: its output is no pipe to wait for."""
    code = f"""if True:
        import os, subprocess, sys
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(12)"
        subprocess.run([sys.executable, "-S", "-c", code], start_new_session={own_session})
    """
    start = time.monotonic()
    check.step("hangs", 1.5, lambda check: check.run(PYTHON, "-S", "-c", code))
    assert time.monotonic() - start < 8
    if not own_session:
        child = int(rows(check)["hangs"]["why"].split()[-1])
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(child, 0)
                time.sleep(0.05)


def test_time_that_is_left_goes_to_later_steps(check):
    shares = {}
    check.end = time.monotonic() + 100

    def take(name):
        return name, 1, lambda check: shares.update({name: check.left()})

    check.steps([take("a"), take("b"), take("c"), take("d")])
    assert [round(shares[name] / 100, 1) for name in "abcd"] == [0.2, 0.3, 0.5, 1.0]


def test_no_time_is_left_after_the_end(check):
    check.end = time.monotonic()
    check.step("late", 5, lambda check: check.run(*says("")))
    assert rows(check)["late"]["why"] == "no time left"


def test_the_steps_fit_into_nine_minutes_and_the_most_telling_come_first(tool):
    assert tool.SECONDS <= 535
    names = [name for name, _, _ in tool.STEPS]
    assert names[:4] == ["facts", "build", "info", "rows"] and names[-2:] == ["benchmarks", "sanitizers"]


def test_a_signal_ends_the_run_and_leaves_what_is_known(tmp_path):
    """As a time limit from outside sends one."""
    command = (PYTHON, str(SCRIPT), "--twin", "--package", str(tmp_path), "--out", str(tmp_path / "out"))
    process = subprocess.Popen([*command, "--steps", "facts,build"], stdout=subprocess.PIPE, text=True)
    log, end = tmp_path / "out" / "gpu_check.log", time.monotonic() + 20
    while time.monotonic() < end and not (log.exists() and "=== facts" in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "gpu_check.json" in output
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert found["stopped"] == "SIGTERM" and [row["status"] for row in found["steps"]] == ["stopped"]


def test_unknown_steps_are_named():
    done = subprocess.run([PYTHON, str(SCRIPT), "--steps", "buidl"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "no step is called buidl" in done.stderr


# --- the build ----------------------------------------------------------------------------------------------------
@pytest.fixture
def project(tool, check, tmp_path, monkeypatch):
    """project(**commands): a source tree whose targets are these shell commands."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    monkeypatch.setattr(tool, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(tool, "pybind11", lambda check: "/none")
    check.document["machine"] = {}

    def make(**commands):
        (tmp_path / "tree" / "python" / "fastdl").mkdir(parents=True)
        lines = ["cmake_minimum_required(VERSION 3.20)", "project(tree NONE)"]
        for name, command in commands.items():
            lines.append(f'add_custom_target({name} COMMAND sh -c "{command}" VERBATIM)')
        (tmp_path / "tree" / "CMakeLists.txt").write_text("\n".join(lines))

    return make


def test_a_build_that_works(tool, check, project):
    project(_C="touch _C.x.so", _twin="echo ptxas warning: spills; touch _twin.x.so")
    check.step("build", 20, tool.build)
    assert rows(check)["build"]["status"] == "passed", rows(check)
    assert sorted(path.name for path in (check.site / "fastdl").iterdir()) == ["_C.x.so", "_twin.x.so"]


def test_every_error_of_a_build_is_told_and_the_rest_is_kept(tool, check, project):
    project(_C="touch _C.x.so", _twin="echo a.cu: error: one; exit 1")
    check.step("build", 20, tool.build)
    found = rows(check)["build"]
    assert found["status"] == "failed" and "a.cu: error: one" in found["why"]
    assert [path.name for path in (check.site / "fastdl").iterdir()] == ["_C.x.so"]


def test_a_build_that_hangs(tool, check, project):
    project(_C="touch _C.x.so", _twin="sleep 60")
    start = time.monotonic()
    check.step("build", 3, tool.build)
    assert rows(check)["build"]["why"].startswith("no time left") and time.monotonic() - start < 12
    assert [path.name for path in (check.site / "fastdl").iterdir()] == ["_C.x.so"]


def test_steps_without_a_build_are_skipped(tool, check):
    for name, _, function in tool.STEPS:
        if name not in ("facts", "build", "graphs", "sanitizers"):
            check.step(name, 5, function)
            assert rows(check)[name]["why"] == "nothing was built"


@pytest.mark.parametrize("tool_missing", ["cmake", "everything"])
def test_a_build_without_its_tools(tool, check, project, tool_missing, tmp_path, monkeypatch):
    project(_C="true", _twin="true")
    folder = tmp_path / "bin"
    folder.mkdir()
    if tool_missing == "cmake":
        for name in ("sh", "make", "touch"):
            (folder / name).symlink_to(shutil.which(name) or "/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    check.environment["PATH"] = str(folder)
    check.step("build", 20, tool.build)
    assert "cmake cannot be run" in rows(check)["build"]["why"]


def test_pybind11_of_torch_serves_where_none_is_installed(tool, check, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    # What Python finds first: an old pybind11, and a torch that has the headers.
    site = tmp_path / "site"
    for name, text in (("pybind11", "__version__ = '2.13.6'\ndef get_cmake_dir(): return 'old'"), ("torch", "")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(text)
    check.environment["PYTHONPATH"] = str(site)
    with pytest.raises(tool.Failed, match=r"pybind11 3 or newer is needed: installed is 2\.13\.6"):
        tool.pybind11(check)
    (site / "torch" / "include").mkdir()
    (site / "torch" / "include" / "pybind11").symlink_to(Path(pybind11.get_include()) / "pybind11")
    folder = tool.pybind11(check)
    assert folder.startswith(str(check.scratch))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(tree CXX)\nset(CMAKE_CXX_STANDARD 17)\n"
        "set(PYBIND11_FINDPYTHON ON)\nfind_package(pybind11 3.0 CONFIG REQUIRED)\n"
        "pybind11_add_module(_probe MODULE NO_EXTRAS probe.cc)\n"
    )
    (tmp_path / "probe.cc").write_text(
        '#include <pybind11/detail/common.h>\nstatic PyModuleDef d = {PyModuleDef_HEAD_INIT, "_probe"};\n'
        'extern "C" PYBIND11_EXPORT PyObject* PyInit__probe() { return PyModule_Create(&d); }\n'
    )
    build = tmp_path / "build"
    options = (f"-Dpybind11_DIR={folder}", f"-DPython_EXECUTABLE={PYTHON}")
    check.run("cmake", "-S", str(tmp_path), "-B", str(build), *options)
    check.run("cmake", "--build", str(build))
    check.run(PYTHON, "-c", "import _probe", environment={"PYTHONPATH": str(build)})


# --- tests that hang, crash, or lose the GPU ----------------------------------------------------------------------
BAD_TESTS = """
import os, signal, sys, time, types
import pytest

on = pytest.mark.parametrize("gpu", ["twin", "cuda"])

@on
def test_good(gpu):
    assert gpu == "twin"

@on
def test_wrong(gpu):
    assert gpu == "none"

@on
def test_crash(gpu):
    os.kill(os.getpid(), signal.SIGSEGV)

@on
def test_lost(gpu):
    sys.modules["torch"] = types.ModuleType("torch")
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    sys.modules["torch"].cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@on
def test_hang(gpu):
    time.sleep(60)

@on
@pytest.mark.parametrize("n", range(4))
def test_after_all(gpu, n):
    if n == 3:
        pytest.skip("no fourth")

def test_of_no_gpu():
    raise AssertionError
"""


@pytest.fixture
def bad_tests(tool, check, tmp_path, monkeypatch):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "test_bad.py").write_text(BAD_TESTS)
    (folder / "test_unreadable.py").write_text("import no_such_module")
    (check.site / "fastdl").mkdir(parents=True)
    (check.site / "fastdl" / "_C.x.so").touch()
    monkeypatch.setattr(tool, "TEST_SECONDS", 2)
    return folder


def run_bad(tool, check, folder, choice=""):
    more = ("--confcutdir", str(folder), "-c", "/dev/null", "--rootdir", str(folder))
    check.step("tests", 60, lambda check: tool.run_tests(check, "tests", choice, folder, more))
    return document(check)["tests"]["tests"], rows(check)["tests"]


def test_tests_that_end_their_process_cost_only_themselves(tool, check, bad_tests):
    found, step = run_bad(tool, check, bad_tests)
    outcomes = {failure["test"].partition("::")[2]: failure["outcome"] for failure in found["failures"]}
    assert outcomes == {
        "test_wrong[twin]": "failed", "test_crash[twin]": "died", "test_lost[twin]": "failed",
        "test_hang[twin]": "died", "": "failed",
    }, found  # fmt: skip
    assert found["files"]["test_bad.py"] == {"passed": 4, "failed": 2, "died": 2, "skipped": 1}
    assert found["files"]["test_unreadable.py"] == {"failed": 1}
    why = {failure["test"].partition("::")[2]: failure["why"] for failure in found["failures"]}
    assert "time.sleep(60)" in why["test_hang[twin]"] or "test_hang" in why["test_hang[twin]"]
    assert "Segmentation fault" in why["test_crash[twin]"] or "-11" in why["test_crash[twin]"]
    assert "no_such_module" in why[""]
    assert step["status"] == "failed" and "test_bad.py: 2 failed, 2 died" in step["why"]


def test_tests_are_chosen_by_name(tool, check, bad_tests):
    (bad_tests / "test_unreadable.py").unlink()
    found, step = run_bad(tool, check, bad_tests, "test_good,test_after_all")
    assert step["status"] == "passed" and found["ended"] == 5 == found["collected"], found
    check.step("rest", 0.5, lambda check: tool.run_tests(check, "rest", "test_good", bad_tests))
    assert rows(check)["rest"]["status"] == "failed" and "no time left" in rows(check)["rest"]["why"]


def test_the_first_test_of_each_row_and_the_rest(tool, check, bad_tests, monkeypatch):
    (bad_tests / "test_unreadable.py").unlink()
    (bad_tests / "test_bad.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('row', ['a_sm80', 'b_sm80', 'a_sm80_long'])\n"
        "@pytest.mark.parametrize('gpu', ['twin', 'cuda'])\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_rows(gpu, row, n): pass\n"
        "@pytest.mark.parametrize('gpu', ['twin'])\n"
        "def test_tails(gpu): pass\n"
    )
    monkeypatch.setattr(tool, "_row_names", lambda check: "a_sm80,b_sm80,of_no_test_sm80")
    ended = {}
    for choice in ("first", "rest"):
        run_bad(tool, check, bad_tests, choice)
        record = check.scratch / "tests-0.jsonl"
        lines = map(json.loads, record.read_text().splitlines())
        ended[choice] = [line["end"].partition("::")[2] for line in lines if "end" in line]
        record.unlink()
    assert ended["first"] == ["test_rows[1-twin-a_sm80]", "test_rows[1-twin-b_sm80]", "test_tails[twin]"]
    assert len(ended["rest"]) == 4 and not set(ended["rest"]) & set(ended["first"])


def test_every_row_is_in_the_name_of_a_test(request):
    """By which gpu_check finds one to begin with; those of attention's gradients are chosen by dtype and size."""
    module = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
    items = [item for item in request.session.items if "tests/cuda/" in item.nodeid]
    if module is None or len({item.path for item in items}) < 8:
        pytest.skip("no CUDA kernels in this build, or tests/cuda is not among the tests of this run")
    names = [row["name"] for op in ("gemm", "attention", "conv", "rnn") for row in module.kernels(op)]
    names = [name for name in names if not name.startswith(("attention_dq", "attention_dkv"))]
    assert not [name for name in names if not any(name in item.name for item in items)]


# --- cases and benchmarks that end their process ------------------------------------------------------------------
CASES = """
import json, os, sys, time
words = dict(zip(sys.argv[1:], sys.argv[2:]))
rows = []
def write(failure):
    rows.append({"case": str(index), "dtype": "float32", "failure": failure})
    json.dump({"cases": 4, "rows": rows}, open(words["--json"], "w"))
for index in range(int(words["--first"]), 4):
    write("did not end" if index in (1, 2) else "")
    if index == 1:
        os._exit(87)
    if index == 2:
        print("========= Invalid __global__ read of size 4 bytes")
        sys.stdout.flush()
        os.kill(os.getpid(), 11)
"""


def test_cases_that_end_their_process_cost_only_themselves(tool, check, bad_tests, tmp_path, monkeypatch):
    (tmp_path / "gpu_cases.py").write_text(CASES)
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    check.step("bits", 20, tool.bits)
    why = rows(check)["bits"]["why"].splitlines()
    assert why == ["2 of 4 cases failed, of 4", "1 float32: did not end", "2 float32: did not end"]
    assert [row["case"] for row in document(check)["cases"]["bits"]] == ["0", "1", "2", "3"]
    assert document(check)["findings"]["bits"] == ["========= Invalid __global__ read of size 4 bytes"]


@pytest.mark.parametrize("installed", [False, True])
def test_sanitizers_run_side_by_side(tool, check, bad_tests, tmp_path, monkeypatch, installed):
    """A program that stands for compute-sanitizer: racecheck hangs, the others run what they are given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if installed:
        program = folder / "compute-sanitizer"
        program.write_text(
            "#!/bin/sh\n[ $2 = racecheck ] && exec sleep 60\nwhile [ $1 != "
            + PYTHON
            + ' ]; do shift; done\nexec "$@"\n'
        )
        program.chmod(0o755)
    (tmp_path / "gpu_cases.py").write_text(CASES.replace("index in (1, 2)", "False").replace("index == ", "index == 9"))
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    check.environment["PATH"] = os.environ["PATH"]
    check.options.twin = False
    check.step("sanitizers", 6, tool.sanitizers)
    found = rows(check)["sanitizers"]
    if not installed:
        assert (found["status"], found["why"]) == ("skipped", "compute-sanitizer is not installed")
        return
    assert found["status"] == "failed" and found["why"].startswith("racecheck: exit status None"), found
    assert set(document(check)["cases"]) == set(tool.SANITIZERS)
    assert len(document(check)["cases"]["memcheck"]) == 4


BENCH = """
import json, os, sys
from pathlib import Path
jobs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
for i, job in enumerate(jobs):
    if (out / f"{i}.begun").exists():
        continue
    (out / f"{i}.begun").touch()
    if job["dtype"] == "crash":
        os._exit(87)
    if job["dtype"] == "error":
        (out / f"{i}.error").write_text("ValueError: no")
        continue
    row = {"name": "a", "check": {"passed": job["dtype"] != "wrong"}}
    (out / f"{i}.json").write_text(json.dumps({"rows": [row]}))
"""


def test_benchmarks_that_end_their_process_cost_only_themselves(tool, check, bad_tests, tmp_path, monkeypatch):
    (tmp_path / "gpu_bench.py").write_text(BENCH)
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    kinds = ("good", "crash", "error", "wrong", "fine")
    monkeypatch.setattr(tool, "BENCHMARKS", tuple(tool._job("gemm", kind, 1) for kind in kinds))
    check.options.twin = False
    check.step("benchmarks", 30, tool.benchmarks)
    assert rows(check)["benchmarks"]["why"].splitlines() == [
        "3 of 5 failed", "gemm crash: ended its process, or hung", "gemm error: ValueError: no",
        "gemm wrong: wrong or failing: a",
    ]  # fmt: skip
    assert len(document(check)["benchmarks"]) == 3
