"""The command `fastdl`: what it prints, what it exits with, and that `verify` finds broken kernels."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import fastdl
from fastdl import _C, cli, demo, machine, verify
from fastdl.bench import check

NATIVE = {name: getattr(_C, name) for name in ("gemm", "linear_packed", "sum_rows", "attention")}
KERNELS = [row for operation in ("gemm", "attention") for row in _C.kernels(operation)]


def run(*arguments):
    return CliRunner().invoke(cli.main, arguments)


def test_help_and_version():
    assert run("--version").output == f"fastdl, version {fastdl.__version__}\n"
    listed = run("--help").output
    assert all(command in listed for command in ("info", "bench", "verify", "demo"))
    assert run("--no-such-option").exit_code == 2


# --- info ---------------------------------------------------------------------------------------------------------
def test_info_names_levels_libraries_and_every_kernel():
    result = run("info")
    assert result.exit_code == 0, result.output
    cpu, build = _C.cpu_info(), _C.build_info()
    lines = dict(line.split("  ", 1) for line in result.output.splitlines() if "  " in line)
    assert lines["fastdl"].strip().startswith(fastdl.__version__)
    assert lines["levels in use"].split(",")[0].strip() == cpu["isa"]
    assert lines["levels compiled"].strip() == ", ".join(build["isa_compiled"])
    assert torch.__version__ in lines["torch"]
    assert build["cuda"]["reason"] in lines["CUDA"]
    for row in KERNELS:
        assert row["name"] in result.output
        assert row["available"] or row["reason"] in result.output


def test_info_explains_levels_that_were_not_compiled(monkeypatch):
    build = _C.build_info() | {"isa_compiled": ["scalar"], "isa_missing": {"amx": "the compiler lacks -mamx-tile"}}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    assert "the compiler lacks -mamx-tile" in run("info").output


def maps(tmp_path, *names):
    path = tmp_path / "maps"
    path.write_text(
        "".join(f"7f00-7f01 r-xp 00000000 fe:00 42    /usr/lib/{n}\n7f02-7f03 rw-p 0 0:0 0\n" for n in names)
    )
    return path


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), []),
        (("libgomp.so.1", "libgomp.so.1", "libc.so.6"), ["libgomp.so.1"]),
        (("libgomp-a3.so.1", "libiomp5.so", "libomp.so.5"), ["libgomp-a3.so.1", "libiomp5.so", "libomp.so.5"]),
        (("libompanion.so", "libgompertz.so", "notlibgomp.so"), []),
    ],
)
def test_openmp_runtimes_in_a_memory_map(tmp_path, names, found):
    assert machine.openmp_runtimes(maps(tmp_path, *names)) == [f"/usr/lib/{name}" for name in found]


def test_openmp_runtimes_without_a_memory_map(tmp_path, monkeypatch):
    assert machine.openmp_runtimes(tmp_path / "absent") is None
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: None)
    assert "does not show a process its memory map" in run("info").output


def test_info_warns_of_two_openmp_runtimes(monkeypatch):
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    output = run("info").output
    assert "/a/libgomp.so.1" in output and "/b/libiomp5.so" in output and "WARNING: 2 runtimes" in output


# --- verify -------------------------------------------------------------------------------------------------------
def test_verify_quick_covers_every_kernel_that_runs_here():
    result = run("verify", "--quick")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].endswith(" 0 failed")
    for row in KERNELS:
        wanted = row["name"] if row["available"] else f"not run: {row['name']}: {row['reason']}"
        assert wanted in result.output


@pytest.mark.slow
def test_verify_in_full():
    quick, full = (sum(1 for _ in verify.steps(quick)) for quick in (True, False))
    result = run("verify")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"{full} checks, 0 failed"
    assert full > 5 * quick


@pytest.mark.slow
@pytest.mark.parametrize("isa", machine.ISA_LEVELS)
def test_verify_at_every_level_from_another_directory(tmp_path, isa):
    command = [sys.executable, "-W", "error", "-m", "fastdl.cli", "verify", "--quick"]
    done = subprocess.run(
        command, cwd=tmp_path, env=machine.capped_environment(isa), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    levels = machine.ISA_LEVELS[: machine.ISA_LEVELS.index(isa) + 1]
    for row in KERNELS:
        assert (f"not run: {row['name']}:" in done.stdout) == (not row["available"] or row["isa"] not in levels)


def _drop_last_k(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    K = max(a.shape[-1] - 1, 0)
    NATIVE["gemm"](out, a[..., :K], b[..., :K, :], bias, accumulate, "", threads)


def _lose_accumulate(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out, a, b, bias, False, kernel, threads)


def _wrong_bias(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out, a, b, None if bias is None else bias.roll(1), accumulate, kernel, threads)


def _write_past_the_row(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out, a, b, bias, accumulate, kernel, threads)
    if out.storage_offset():
        out.as_strided((1,), (1,), out.storage_offset() + out.shape[-1]).zero_()


def _skip_last_row(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out[:-1], a[:-1], b, bias, accumulate, kernel, threads)


def _hide_nan(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out, a, b, bias, accumulate, kernel, threads)
    out.nan_to_num_(0.0, torch.inf, -torch.inf)


def _differ_by_threads(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out, a, b, bias, accumulate, kernel, threads)
    if threads > 1:
        out.mul_(1 + 2.0**-23)


def _lose_precision(out, a, b, bias=None, accumulate=False, kernel="", threads=0):
    NATIVE["gemm"](out, a, b, bias, accumulate, kernel, threads)
    out.mul_(1 + 2.0**-15) if not torch.equal(out, out.round()) else None


def _refuse(*arguments, **options):
    raise RuntimeError("no")


def _stale_pack(out, input, packed, bias, N, kernel, **options):
    NATIVE["linear_packed"](out, input, torch.ones_like(packed), bias, N, kernel, **options)


def _sum_one_row_less(out, x, threads=0):
    NATIVE["sum_rows"](out, x.reshape(-1, x.shape[-1])[:-1], threads)


def _attend(change):
    """A broken _C.attention: `change` alters its arguments."""

    def broken(out, lse, query, key, value, mask=None, **options):
        given = {"query": query, "key": key, "value": value, "mask": mask} | options
        NATIVE["attention"](out, lse, **given | change(given))

    return broken


_lose_mask = _attend(lambda given: {"mask": None})
_lose_band = _attend(lambda given: {"hi": 2**63 - 1})
_lose_softcap = _attend(lambda given: {"softcap": 0.0})


def _without_last_key(given):
    Lk = given["key"].shape[2] - 1
    mask = given["mask"]
    return {
        "key": given["key"][:, :, :Lk],
        "value": given["value"][:, :, :Lk],
        "mask": mask if mask is None else mask[..., :Lk],
    }


_lose_last_key = _attend(_without_last_key)


def _attend_past_the_row(out, *args, **options):
    NATIVE["attention"](out, *args, **options)
    if out.storage_offset():
        out.as_strided((1,), (1,), out.storage_offset() + out.shape[-1]).zero_()


def _attend_differently_by_threads(out, *args, threads=0, **options):
    NATIVE["attention"](out, *args, threads=threads, **options)
    if threads > 1:
        out.mul_(1.5)


@pytest.mark.parametrize(
    ("function", "broken", "symptom"),
    [
        ("gemm", _drop_last_k, "elements wrong"),
        ("gemm", _lose_accumulate, "accumulate: AssertionError"),
        ("gemm", _wrong_bias, "bias: AssertionError"),
        ("gemm", _write_past_the_row, "outside the output were written"),
        ("gemm", _skip_last_row, "nan"),
        ("gemm", _hide_nan, "special values: AssertionError: NaN differs"),
        ("gemm", _differ_by_threads, "differ between 1 and 3 threads"),
        ("gemm", _lose_precision, "beyond the bound"),
        ("gemm", _refuse, "RuntimeError: no"),
        ("linear_packed", _stale_pack, ": packed exact"),
        ("sum_rows", _sum_one_row_less, "FAILED sum_rows: exact"),
        ("attention", _lose_mask, "exact selection"),
        ("attention", _lose_band, "exact selection"),
        ("attention", _lose_softcap, "full softcap: AssertionError"),
        ("attention", _lose_last_key, "exact"),
        ("attention", _attend_past_the_row, "outside the output were written"),
        ("attention", _attend_differently_by_threads, "differ between 1 and 3 threads"),
    ],
)
def test_verify_finds_a_broken_kernel(monkeypatch, function, broken, symptom):
    monkeypatch.setattr(_C, function, broken)
    result = run("verify", "--quick")
    assert result.exit_code == 1
    assert symptom in "\n".join(line for line in result.output.splitlines() if line.startswith("FAILED"))


def test_verify_that_checks_nothing_fails(monkeypatch):
    monkeypatch.setattr(verify, "steps", lambda quick, device: iter(()))
    assert run("verify").exit_code == 1


# --- bench --------------------------------------------------------------------------------------------------------
def test_bench_host_as_json():
    result = run("bench", "host", "--quick", "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["machine"]["versions"]["fastdl"] == fastdl.__version__
    assert {row["level"] for row in document["peaks"]} >= {"scalar", "avx2", "avx512", "amx", "L1", "DRAM"}


TINY = ("bench", "gemm", "--family", "overhead", "--seconds", "0.001")


def test_bench_gemm_as_table_and_json(tmp_path):
    result = run(*TINY, "--json", str(tmp_path / "a.json"))
    assert result.exit_code == 0, result.output
    assert "overhead/square 8x8x8" in result.stdout
    assert "[1/1] overhead/square 8x8x8" in result.stderr
    row = json.loads((tmp_path / "a.json").read_text())["rows"][0]
    assert f"{row['warm']['speedup']:.2f}" in result.stdout
    compared = run("bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"))
    assert compared.exit_code == 0 and "1 within noise" in compared.output


def test_bench_gemm_json_on_standard_output_stands_alone():
    result = run(*TINY, "--json", "-")
    assert json.loads(result.stdout)["rows"][0]["name"] == "overhead/square 8x8x8"


def test_bench_gemm_always_measures_warm():
    row = json.loads(run(*TINY, "--regime", "cold", "--json", "-").stdout)["rows"][0]
    assert row["warm"] and row["cold"] and row["idle"] is None


def test_bench_gemm_fails_where_a_check_fails(monkeypatch):
    monkeypatch.setattr(fastdl.functional, "linear", lambda x, w, b: torch.nn.functional.linear(x, w, b) + 1)
    result = run(*TINY)
    assert result.exit_code == 1 and "CHECK FAILED overhead/square 8x8x8" in result.stdout


def test_bench_errors_are_one_line(tmp_path):
    result = run(*TINY, "--kernel", "gemm_abacus")
    assert result.exit_code == 1 and "Error: gemm: kernel: expected one of" in result.output
    (tmp_path / "a.json").write_text("{}")
    result = run("bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"))
    assert result.exit_code == 1 and "a.json: expected a benchmark document" in result.output


@pytest.mark.parametrize(("speedup", "status"), [(0.5, 1), (2.0, 0)])
def test_bench_check_exits_by_its_bars(tmp_path, monkeypatch, speedup, status):
    bars = tmp_path / "bars.toml"
    bars.write_text(
        '[[bar]]\nname = "x"\nissue = 0\noperation = "gemm"\nfamilies = ["overhead"]\ntag = ""\ndtype = "float32"\n'
        'threads = 0\nisa = ""\nfrozen = false\nkernel = ""\nmetric = "speedup"\nmust = 1.0\naim = 3.0\n'
    )
    row = {"family": "overhead", "tags": [], "check": {"passed": True}, "handed_back": False, "parts": {}}
    document = {"other_load": None, "rows": [row | {"name": "row", "warm": {"speedup": speedup}}]}
    monkeypatch.setattr(check, "measure", lambda members: document)
    result = run("bench", "check", "--bars", str(bars), "--json", str(tmp_path / "out.json"))
    assert result.exit_code == status, result.output
    (written,) = json.loads((tmp_path / "out.json").read_text())["bars"]
    assert written["met"] == (status == 0) and written["value"] == pytest.approx(speedup)


def test_bench_check_outside_the_source_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("bench", "check")
    assert result.exit_code == 1 and "--bars" in result.output


# --- demo ---------------------------------------------------------------------------------------------------------
def test_demo_trains_alike(tmp_path):
    pytest.importorskip("sklearn", reason="extra fastdl[demo]")
    result = run("demo", "--epochs", "3", "--json", str(tmp_path / "demo.json"))
    assert result.exit_code == 0, result.output
    assert "The same losses" in result.output
    course = json.loads((tmp_path / "demo.json").read_text())
    assert course["steps"] == len(course["stock"]["losses"]) == len(course["optimised"]["losses"]) == 18
    assert course["stock"]["losses"][-1] < 0.5 * course["stock"]["losses"][0]
    assert course["first_difference"] <= 1e-4


def test_demo_says_when_losses_differ(monkeypatch):
    pytest.importorskip("sklearn", reason="extra fastdl[demo]")

    def spoil(model, strict):
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        return model

    monkeypatch.setattr(demo.fastdl, "optimize", spoil)
    result = run("demo", "--epochs", "1")
    assert "THE LOSSES DIFFER" in result.output


def test_demo_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = run("demo")
    assert result.exit_code == 1 and "pip install 'fastdl[demo]'" in result.output
