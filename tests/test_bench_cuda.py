"""The benchmarks, `fastdl verify` and `fastdl info` on the host twin: the ways that only a GPU would take otherwise."""

import json

import pytest
import torch
from click.testing import CliRunner

from fastdl import verify_cuda
from fastdl.bench import place, runner, shapes
from fastdl.bench.report import make_console, print_document
from fastdl.bench.settings import Settings
from fastdl.cli import main
from fastdl.ops import cuda

needs_twin = pytest.mark.skipif(cuda.load("_twin")[0] is None, reason="the host twin is not built (FASTDL_TWIN=ON)")
TINY = {
    "gemm": {"batch": 1, "M": 9, "N": 10, "K": 12},
    "attention": {"B": 1, "H": 2, "Hkv": 2, "Lq": 5, "Lk": 7, "D": 16},
    "rnn": {"T": 2, "B": 2, "I": 6, "H": 8, "proj": 0, "layers": 1, "directions": 1},
    "conv": {"N": 1, "C": 4, "in0": 5, "in1": 5, "K": 6, "k0": 3, "k1": 3, "stride": 1, "padding": 1, "dilation": 1,
             "groups": 1},
}  # fmt: skip


def test_the_cpu_is_where_benchmarks_run_by_default():
    assert place.current == "cpu" and Settings().device == "cpu"
    with pytest.raises(ValueError, match="device: expected one of"):
        runner.run("gemm", Settings(device="tpu"))


@needs_twin
@pytest.mark.parametrize("name", ["threads", "frozen", "kernel"])
def test_settings_of_the_cpu_are_refused(name):
    values = {"threads": 1, "frozen": True, "kernel": runner._C.kernels("gemm")[0]["name"]}
    if name == "kernel":
        values["kernel"] = next(row["name"] for row in runner._C.kernels("gemm") if row["available"])
    with pytest.raises(ValueError, match=f"{name} has a meaning on the CPU only"):
        runner.run("gemm", Settings(device="twin", dtype="float32", **{name: values[name]}))


@needs_twin
@pytest.mark.parametrize(
    ("operation", "families"),
    [("gemm", ("forward", "backward", "gelu-train")), ("attention", ("forward", "train")), ("rnn", ("lstm-train",)),
     ("conv", ("dense", "dense-train"))],
)  # fmt: skip
def test_each_family_runs_on_the_twin(operation, families, monkeypatch):
    """Checked, timed and reported; what has no CUDA kernels counts as handed back."""
    row = shapes.Shape("tiny", "layer", families, (), TINY[operation])
    monkeypatch.setattr(runner, "load", lambda *args: [row])
    settings = Settings(device="twin", families=families, regimes=("warm",), seconds=0.001)
    document = runner.run(operation, settings)
    assert [r["family"] for r in document["rows"]] == list(families)
    for r in document["rows"]:
        assert r["check"]["passed"], r["check"]["failure"]
        assert r["warm"]["fastdl"]["ms"] > 0
        assert r["handed_back"] != bool(r["kernels"])
        if operation == "gemm":
            assert r["kernels"] and not r["handed_back"]
    assert document["left_out"] == 0
    assert place.current == "cpu" and not cuda.twin_active
    json.dumps(document)


@needs_twin
def test_the_limit_leaves_rows_out(monkeypatch):
    rows = [shapes.Shape("tiny", str(i), ("small",), (), TINY["gemm"]) for i in range(3)]
    monkeypatch.setattr(runner, "load", lambda *args: rows)
    settings = Settings(device="twin", families=("small",), regimes=("warm",), seconds=0.001, limit=1e-9)
    with pytest.raises(ValueError, match="no row"):
        runner.run("gemm", settings)
    document = runner.run("gemm", Settings(device="twin", families=("small",), regimes=("warm",), seconds=0.001))
    assert len(document["rows"]) == 3


@pytest.mark.parametrize("words", [("bench", "gemm"), ("verify",)], ids=" ".join)
@pytest.mark.parametrize("unverified", [False, True])
def test_a_gpu_that_cannot_be_used_is_refused(words, unverified, monkeypatch):
    """With what is to be done first: without a GPU, turning kernels on would not help."""
    monkeypatch.setattr(cuda, "UNVERIFIED", unverified)
    if cuda.load("_cuda")[0] is None:
        said = "no CUDA kernels in this build"
    elif not torch.cuda.is_available():
        said = "torch sees no GPU" if torch.version.cuda else "is built without CUDA"
    elif unverified:
        pytest.skip("there is a GPU, and its kernels are on")
    else:
        said = "FASTDL_CUDA_UNVERIFIED=1"
    done = CliRunner().invoke(main, [*words, "--device", "cuda"])
    assert done.exit_code == 1 and "device cuda: " in done.output and said in done.output, done.output
    assert "Traceback" not in done.output


def test_each_reason_in_its_turn(monkeypatch):
    """A torch without CUDA, no GPU, kernels that are off, a GPU that is too old."""

    class Module:
        gpu_count = staticmethod(lambda: 1)
        gpu_info = staticmethod(lambda index: {"sm": 75})

    monkeypatch.setattr(cuda, "load", lambda name: (Module, ""))
    monkeypatch.setattr(cuda, "UNVERIFIED", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in place.unavailable("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place.unavailable("cuda") == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place.unavailable("cuda") == cuda.OFF
    monkeypatch.setattr(cuda, "UNVERIFIED", True)
    cuda.gpu_reason.cache_clear()
    assert "cuda:0 is sm_75" in place.unavailable("cuda")
    cuda.gpu_reason.cache_clear()


@needs_twin
def test_a_row_that_raises_leaves_the_others(monkeypatch):
    rows = [shapes.Shape("tiny", str(i), ("small",), (), TINY["gemm"]) for i in range(3)]
    monkeypatch.setattr(runner, "load", lambda *args: rows)
    right, calls = runner.measure_case, []

    def measure(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("CUDA: launch of a kernel: an illegal memory access was encountered")
        return right(*args)

    monkeypatch.setattr(runner, "measure_case", measure)
    settings = Settings(device="twin", families=("small",), regimes=("warm",), seconds=0.001)
    document = runner.run("gemm", settings)
    assert [row["check"]["passed"] for row in document["rows"]] == [True, False, True]
    assert "illegal memory access" in document["rows"][1]["check"]["failure"]
    assert document["means"][0]["counted"] == 2
    print_document(document, make_console())  # with such a row in it


@needs_twin
def test_verify_runs_the_operations_and_says_what_it_did_not(monkeypatch):
    steps = list(verify_cuda.steps(True, "twin"))
    assert {subject for subject, _, _ in steps} == {
        f"twin: {n}" for n in ("linear", "attention", "conv2d", "lstm", "gru")
    }
    for subject, what, check in steps:
        if subject == "twin: linear" and "17x35x20" in what:
            check()
    from fastdl.ops import gemm

    off = gemm.LINEAR.__class__(**{**vars(gemm.LINEAR), "unsupported_on_cuda": None})
    monkeypatch.setattr(gemm, "LINEAR", off)
    with pytest.raises(verify_cuda.NotRun, match="no CUDA kernels"):
        steps[0][2]()


@needs_twin
def test_verify_finds_a_wrong_result(monkeypatch):
    from fastdl.ops import cuda_gemm

    right = cuda_gemm.cuda.require

    class Wrong:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            return getattr(self.module, name)

        def gemm(self, a, b, out, *args, **kwargs):
            self.module.gemm(a, b, out, *args, **kwargs)
            out.view(-1)[-1] += 1

    monkeypatch.setattr(cuda_gemm.cuda, "require", lambda op, x: Wrong(right(op, x)))
    with pytest.raises(AssertionError):
        next(verify_cuda.steps(True, "twin"))[2]()


def test_info_says_that_the_kernels_are_unverified():
    done = CliRunner().invoke(main, ["info"])
    assert done.exit_code == 0, done.output
    if cuda.load("_cuda")[0] or cuda.load("_twin")[0]:
        assert "unverified: off by default" in done.output and "gemm_bf16_" in done.output
    if cuda.load("_cuda")[0]:
        assert "built by nvcc" in done.output and "sm_80" in done.output and cuda.OFF in done.output
    assert torch.cuda.is_available() or "cuda:0" not in done.output
