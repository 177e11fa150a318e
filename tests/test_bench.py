"""The benchmark harness: what it measures and what it refuses to count."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench_documents import printed, small_document
from fastdl import _C, machine
from fastdl.bench import accuracy, attention, compare, conv, gemm, harness, host, runner
from fastdl.bench.report import print_document, read_json, write_json
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def document():
    return small_document()


# --- shapes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("operation", runner.OPERATIONS)
def test_shapes_have_unique_names_in_every_family(operation):
    for family in runner.OPERATIONS[operation].FAMILIES:
        names = [shape.name for shape in load(operation, family)]
        assert names and len(names) == len(set(names)), family


@pytest.mark.parametrize("operation", runner.OPERATIONS)
def test_shapes_name_no_unknown_family(operation):
    families = {family for shape in load(operation) for family in shape.families}
    assert families <= set(runner.OPERATIONS[operation].FAMILIES)


def test_small_shapes_are_small():
    assert all(max(shape.sizes("M", "N", "K")) <= 128 for shape in load("gemm", "small"))


def test_training_families_share_their_shapes():
    assert load("gemm", "train") == load("gemm", "backward")
    assert set(shape.name for shape in load("gemm", "train")) < set(shape.name for shape in load("gemm", "forward"))


def test_peak_squares_are_those_the_figure_is_over():
    sizes = [shape.sizes("M", "N", "K") for shape in load("gemm", "matmul", "peak")]
    assert sizes == [(n, n, n) for n in (256, 512, 1024, 2048, 4096)]


def test_shapes_of_an_unknown_operation():
    with pytest.raises(ValueError, match="operation: expected one of"):
        load("fft")


# --- timing -------------------------------------------------------------------------------------------------------
def test_compare_interleaves_in_alternating_order(monkeypatch):
    order = []
    seconds = iter([1.0, 2.0, 6.0, 2.0, 4.0, 8.0])  # round 2 times the baseline first
    monkeypatch.setattr(harness, "_seconds", lambda call, inner: (call(), next(seconds))[1])
    result = harness.compare((lambda: order.append("a"), lambda: order.append("b")), lambda: None, inner=1, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert result.fastdl.ms == 2000 and result.torch.ms == 6000  # medians of 1, 2, 4 and of 2, 6, 8
    assert result.speedup == 2  # of the paired ratios 2, 3, 2
    assert (result.speedup_q1, result.speedup_q3) == (2, 2.5)


def test_every_timed_section_is_prepared():
    prepared, calls = [], []
    harness.compare((lambda: calls.append(0), lambda: calls.append(1)), lambda: prepared.append(1), inner=1, rounds=5)
    assert len(prepared) == len(calls) == 10


def test_a_warm_side_runs_once_itself_ahead(monkeypatch):
    order = []
    calls = (lambda: order.append("a"), lambda: order.append("b"))
    monkeypatch.setattr(harness, "_seconds", lambda call, inner: (call(), order.append("|"), 1.0)[2])
    harness.compare(calls, lambda: None, inner=1, rounds=2, warm=(True, False))
    assert "".join(order) == "aa|b|b|aa|"
    order.clear()
    harness.Stopwatch(0.0).measure(calls, "warm")  # a second each: too slow to be warmed
    assert "aa" not in "".join(order)
    monkeypatch.setattr(harness, "_seconds", lambda call, inner: (call(), order.append("|"), 1e-3)[2])
    for regime, runs in (("warm", "aa|bb|bb|aa|"), ("idle", "a|b|b|a|")):
        order.clear()
        harness.Stopwatch(0.0).measure(calls, regime)
        assert runs in "".join(order)


def test_quartiles_and_means():
    assert harness.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert harness.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert harness.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(harness.geometric_mean([]))


def test_long_calls_are_measured_warm_only(monkeypatch):
    monkeypatch.setattr(harness, "_SLOW_S", 1e-9)
    watch, calls = harness.Stopwatch(0.0), (lambda: None, lambda: None)
    assert watch.measure(calls, "cold") is None and watch.measure(calls, "idle") is None
    assert watch.measure(calls, "warm").fastdl.rounds == 3
    taken = iter((2.0, 20.0, 1.0))  # seconds: both sides once, the shorter one again
    monkeypatch.setattr(harness, "_seconds", lambda call, inner: next(taken))
    long = watch.measure(calls, "warm")
    assert (long.fastdl.ms, long.torch.ms, long.torch.rounds, long.speedup) == (1e3, 20e3, 1, 20.0)


def make_case(multiply, failure=""):
    a = torch.ones(16, 16)

    def candidate():
        out = torch.empty(16, 16)
        multiply(out, a)
        return out

    return harness.Case(
        candidate, lambda: a @ a, lambda: harness.Check(candidate().sum().item(), 0.0, failure), 8192.0, 3072.0
    )


def own(out, a):
    _C.gemm(out, a, a)


def torchs(out, a):
    torch.mm(a, a, out=out)


def test_a_failed_check_leaves_no_figure():
    row = harness.measure_case(make_case(own, "wrong"), harness.Stopwatch(0.001), ("warm",))
    assert row["check"]["failure"] == "wrong" and not row["check"]["passed"]
    assert row["warm"] is row["cold"] is row["idle"] is None


def test_work_done_by_torch_is_seen():
    watch = harness.Stopwatch(0.001)
    ours = harness.measure_case(make_case(own), watch, ("warm", "cold", "idle"))
    assert not ours["handed_back"] and len(ours["kernels"]) == 1
    assert all(ours[regime]["speedup"] > 0 for regime in harness.REGIMES)
    theirs = harness.measure_case(make_case(torchs), watch, ("warm",))
    assert theirs["handed_back"] and theirs["kernels"] == []


# --- the check inside the harness -----------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1e12, 1.0], ids=["every row", "sampled rows"])
def test_check_finds_one_wrong_element(monkeypatch, budget):
    monkeypatch.setattr(gemm, "_CHECK_FLOPS", budget)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 40, generator=generator), torch.randn(40, 48, generator=generator)
    right = a @ b
    assert gemm.check_products([gemm.Product("c", right.clone(), right, a, b)]).failure == ""
    for wrong in (right[30, 17] + 0.01, math.nan):
        actual = right.clone()
        actual[30, 17] = wrong
        assert gemm.check_products([gemm.Product("c", actual, right, a, b)]).failure.startswith("c: ")


def test_check_reports_both_errors():
    a, b = torch.randn(8, 300), torch.randn(300, 8)
    exact, rough = (a.double() @ b.double()).float(), a @ b
    outcome = gemm.check_products([gemm.Product("c", exact, rough, a, b)])
    assert outcome.failure == "" and outcome.error < outcome.torch_error < 1e-6


def test_accuracy_of_a_row_and_its_table():
    row = accuracy._row("float32", "positive", 256)
    assert 0 < row["fastdl"]["rms"] <= row["fastdl"]["max"] < 2**-16 and 0 < row["torch"]["rms"] < 2**-20
    document = {"settings": {"isa": "avx2"}, "rows": [row]}
    (line,) = accuracy.cells(document)
    assert len(line) == len(accuracy.COLUMNS) and line[:5] == ["avx2", "ieee", "float32", "positive", "256"]
    assert line[5] == f"{row['fastdl']['rms']:.1e}" and line[8] == f"{row['torch']['max']:.1e}"


# --- a run --------------------------------------------------------------------------------------------------------
def test_document_has_the_stated_fields(document):
    fields = {"schema", "date", "command", "machine", "settings", "peaks", "other_load", "left_out", "rows", "means"}
    assert set(document) == fields
    assert [row["family"] for row in document["rows"]] == ["overhead", "overhead-train"]
    for row in document["rows"]:
        assert row["check"]["passed"], row["check"]
        assert row["check"]["error"] < 1e-6
        assert row["warm"]["fastdl"]["q1_ms"] <= row["warm"]["fastdl"]["ms"] <= row["warm"]["fastdl"]["q3_ms"]
        assert row["warm"]["speedup"] > 0 and row["cold"]["speedup"] > 0 and row["idle"]["speedup"] > 0
        assert row["gflops"] > 0 and row["fma_percent"] > 0 and row["read_percent"] > 0
        assert row["shape"] == {"batch": 1, "M": 8, "N": 8, "K": 8}
    assert set(document["rows"][1]["parts"]) == {"forward only"}
    assert document["settings"]["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize("family", gemm.FAMILIES)
def test_every_family_passes_its_check(family):
    """The smallest shape of each family, built, run and compared with float64."""
    shape = min(load("gemm", family), key=lambda shape: math.prod(shape.dims.values()))
    case = gemm.FAMILIES[family](shape, Settings())
    outcome, _ = harness.run_check(case)
    assert outcome.failure == "" and 0 < outcome.error <= 2 * outcome.torch_error


@pytest.mark.parametrize("family", gemm.FROZEN)
def test_frozen_rows_run_a_kernel(family):
    shape = min(load("gemm", family), key=lambda shape: math.prod(shape.dims.values()))
    case = gemm.FAMILIES[family](shape, Settings(frozen=True))
    outcome, kernels = harness.run_check(case)
    assert outcome.failure == "" and kernels


@pytest.mark.parametrize("family", gemm.FORCED)
def test_forced_kernel_runs(family):
    shape = min(load("gemm", family), key=lambda shape: math.prod(shape.dims.values()))
    for row in _C.kernels("gemm"):
        if row["available"] and row["kind"] == "tile":
            case = gemm.FAMILIES[family](shape, Settings(kernel=row["name"], dtype=row["dtype"]))
            outcome, kernels = harness.run_check(case)
            assert outcome.failure == "" and kernels == {row["name"]: 1}


def small(shape, **changed):
    """A shape cut down to what a test can afford."""
    dims = {"B": 1, "H": 4, "Hkv": 2 if shape.dims["Hkv"] < shape.dims["H"] else 4, "Lk": 40, "D": 16}
    dims["Lq"] = 1 if shape.dims["Lq"] == 1 else 40
    return replace(shape, dims=dims | changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", attention.FAMILIES)
def test_attention_families_pass_their_check(family, dtype):
    for shape in load("attention", family):
        case = attention.FAMILIES[family](small(shape), Settings(dtype=dtype))
        outcome, kernels = harness.run_check(case)
        assert outcome.failure == "" and sum(kernels.values()) >= case.kernel_calls, shape.name
        assert "dropout" in shape.tags or 0 < outcome.error <= 3 * outcome.torch_error
        assert set(case.parts) == ({"without mask"} if family == "masks" else set())


@pytest.mark.parametrize("family", attention.FORCED)
def test_forced_attention_kernel_runs(family):
    shape = small(load("attention", family)[-1])
    for row in _C.kernels("attention"):
        if row["available"]:
            case = attention.FAMILIES[family](shape, Settings(kernel=row["name"], dtype=row["dtype"]))
            outcome, kernels = harness.run_check(case)
            assert outcome.failure == "" and kernels == {row["name"]: 1}


@pytest.mark.parametrize("budget", [1 << 23, 1], ids=["every row", "sampled rows"])
@pytest.mark.parametrize("family", ["forward", "train"])
def test_attention_check_finds_one_wrong_element(family, budget, monkeypatch):
    monkeypatch.setattr(attention, "_CHECK_SCORES", budget)
    right = attention.functional.scaled_dot_product_attention

    def wrong(*args, **options):
        out = right(*args, **options)
        delta = torch.zeros_like(out)
        delta[0, 1, 17, 3] = 0.05
        return out + delta * (args[0][0, 0, 0, 0] + 10 if family == "train" else 1)

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", wrong)
    case = attention.FAMILIES[family](small(load("attention", family)[0]), Settings())
    outcome, _ = harness.run_check(case)
    assert outcome.failure.startswith(("output: ", "dq: "))


def small_conv(shape):
    """At most 16 channels, and images as small as the kernel lets them be."""
    d, shrunk = shape.dims, {"N": min(shape.dims["N"], 2)}
    depthwise = d["groups"] == d["C"] > 1
    shrunk |= {"groups": 8 if depthwise else min(d["groups"], 2)}
    shrunk |= {name: 8 if depthwise else min(d[name], 16) for name in ("C", "K")}
    for i in range(3):
        if f"k{i}" in d:
            shrunk[f"in{i}"] = min(d[f"in{i}"], d[f"k{i}"] * d["dilation"] + 8)
    return replace(shape, dims=d | shrunk)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, "float32") for f in conv.FAMILIES] + [(f, "bfloat16") for f in conv.FAMILIES if f.endswith("-train")],
)
def test_conv_families_pass_their_check(family, dtype, monkeypatch):
    monkeypatch.setattr(conv, "_PROBES", 1)
    for shape in load("conv", family):
        case = conv.FAMILIES[family](small_conv(shape), Settings(dtype=dtype))
        outcome, kernels = harness.run_check(case)
        assert outcome.failure == "" and sum(kernels.values()) >= case.kernel_calls, shape.name
        assert 0 < outcome.error <= 3 * outcome.torch_error + 1e-9
        assert set(case.parts) == ({"contiguous", "channels_last"} if "in1" in shape.dims else set())


@pytest.mark.parametrize("family", ["dense", "transposed"])
def test_conv_frozen_rows(family):
    case = conv.FAMILIES[family](small_conv(load("conv", family)[0]), Settings(frozen=True))
    outcome, kernels = harness.run_check(case)
    assert outcome.failure == "" and kernels


@pytest.mark.parametrize("budget", [1e9, 1e3], ids=["all of it", "a part"])
@pytest.mark.parametrize("family", ["dense", "dense-train", "grouped-backward"])
def test_conv_check_finds_one_wrong_element(family, budget, monkeypatch):
    monkeypatch.setattr(conv, "_CHECK_FLOPS", budget)
    right = conv.functional.conv2d

    def wrong(x, *args, **options):
        out = right(x, *args, **options)
        delta = torch.zeros_like(out)
        delta[-1, -1, -1, -1] = 0.2
        return out + delta * (x.flatten()[-1] + 10 if "-" in family else 1)

    monkeypatch.setattr(conv.functional, "conv2d", wrong)
    case = conv.FAMILIES[family](small_conv(load("conv", family)[0]), Settings())
    outcome, _ = harness.run_check(case)
    assert outcome.failure.startswith(("output: ", "dx: "))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float8"}, "dtype: expected one of"),
        ({"kernel": "gemm_abacus"}, "kernel: expected one of"),
        ({"kernel": "gemm_f32_4x8_scalar", "dtype": "bfloat16"}, "kernel: expected one of"),
        ({"families": ("forwards",)}, "family: expected one of"),
        ({"families": ("train",), "frozen": True}, "frozen has a meaning for"),
        ({"families": ("train",), "kernel": "gemm_f32_4x8_scalar"}, "kernel has a meaning for"),
        ({"kernel": "gemm_f32_4x8_scalar", "frozen": True}, "laid out for one kernel"),
        ({"shapes": "no such row"}, "no row matches"),
        ({"isa": "unheard of"}, "isa: this machine runs at"),
    ],
)
def test_settings_that_cannot_be_served(changed, message):
    settings = Settings(**({"shapes": "8x8x8", "seconds": 0.001} | changed))
    with pytest.raises(ValueError, match=message):
        runner.run("gemm", settings)


def test_thread_count_is_used_and_put_back():
    before = torch.get_num_threads()
    seen = runner.run("gemm", Settings(threads=1, seconds=0.001, shapes="8x8x8", families=("overhead",)))
    assert seen["settings"]["threads"] == 1 and torch.get_num_threads() == before


def test_means_leave_out_failed_and_handed_back_rows(document):
    good, failed, handed = (copy.deepcopy(document["rows"][0]) for _ in range(3))
    good["warm"]["speedup"], handed["warm"]["speedup"], handed["handed_back"] = 2.0, 50.0, True
    failed["warm"] = None
    (mean,) = runner.summarise([good, failed, handed])
    assert (mean["rows"], mean["counted"], mean["warm"]) == (3, 1, pytest.approx(2.0))


def test_tables_set_failed_and_handed_back_rows_apart(document):
    document = copy.deepcopy(document)
    good, handed = document["rows"]
    good["warm"]["speedup"] = 0.43
    handed["handed_back"] = True
    failed = copy.deepcopy(good) | {"name": "overhead/broken", "warm": None}
    failed["check"] = {"passed": False, "failure": "output: [3] wrong", "error": 1.0, "torch_error": 0.0}
    document["rows"].append(failed)
    text = printed(print_document, document)
    assert "0.43" in text
    assert "CHECK FAILED overhead/broken: output: [3] wrong" in text
    assert text.index("Handed back to torch") < text.index(handed["name"])
    assert "overhead/broken" not in text[: text.index("CHECK FAILED")]


def test_json_round_trip(tmp_path, document, capsys):
    write_json(document, str(tmp_path / "a.json"))
    assert read_json(tmp_path / "a.json") == document
    write_json(document, "-")
    assert json.loads(capsys.readouterr().out) == document


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99, "rows": []}'])
def test_other_files_are_no_documents(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


# --- levels and peaks -----------------------------------------------------------------------------------------------
def test_a_cap_replaces_what_was_set_before():
    environment = machine.capped_environment("avx512", machine.capped_environment("avx2", {"HOME": "x"}))
    assert environment["FASTDL_ISA"] == environment["ATEN_CPU_CAPABILITY"] == "avx512"
    assert environment["HOME"] == "x"
    assert machine.capped_environment("avx512bf16")["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
    assert machine.capped_environment("amx", environment) == {"HOME": "x", "FASTDL_ISA": "amx"}
    with pytest.raises(ValueError, match="isa: expected one of"):
        machine.capped_environment("sse9")


@pytest.mark.slow
def test_isa_caps_torch_alike(tmp_path):
    target = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "fastdl.cli",
        "bench",
        "gemm",
        "--isa",
        "scalar",
        "--family",
        "overhead",
    ]
    subprocess.run([*command, "--seconds", "0.001", "--json", str(target)], check=True, capture_output=True)
    document = read_json(target)
    assert document["settings"]["isa"] == document["machine"]["cpu"]["isa"] == "scalar"
    assert document["machine"]["environment"].items() >= machine.capped_environment("scalar", {}).items()
    assert document["machine"]["torch_capability"] == "DEFAULT"
    assert document["rows"][0]["kernels"] == ["gemm_f32_4x8_scalar"]


def test_host_peaks():
    rows = host.measure_host(0.002)
    values = {(row["what"], row["level"], row["threads"]): row["value"] for row in rows}
    supported = _C.cpu_info()["isa_supported"]
    assert values["float32 FMA", "scalar", 1] > 0
    for (what, level, _), value in values.items():
        absent = what != "read" and level not in supported
        assert (value is None) == absent, (what, level)
    assert all(row["note"] for row in rows if row["value"] is None)


def test_memory_level_of_an_operand_set():
    peaks = host.Peaks(1, "avx2", 1e11, {"L1": 4.0, "L2": 3.0, "DRAM": 1.0}, {"L1": 100, "L2": 1000, "L3": 10000})
    assert [peaks.memory(size) for size in (100, 101, 1001, 10**9)] == ["L1", "L2", "DRAM", "DRAM"]


def test_other_load_counts_our_processors_less_ourselves(tmp_path, monkeypatch):
    """Two processors of ours, one of others; half a second passes, of which we compute 0.2 s."""
    clock = {"wall": 10.0, "own": 5.0}
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(machine.time, "process_time", lambda: clock["own"])
    statistics = tmp_path / "stat"
    text = "cpu 1 1 1 1 1 1 1 1 0 0\ncpu0 {} 0 0 9 9 0 0 0 0 0\ncpu1 0 0 {} 9 9 0 0 {} 0 0\ncpu2 {} 0 0 0 0 0 0 0 0 0\n"
    statistics.write_text(text.format(100, 200, 300, 400))
    others = machine.OtherLoad(statistics)
    clock.update(wall=10.5, own=5.2)
    statistics.write_text(text.format(120, 210, 305, 999))
    assert others.processors() == pytest.approx((0.20 + 0.10 + 0.05 - 0.20) / 0.5)
    assert machine.OtherLoad(tmp_path / "absent").processors() is None


# --- compare --------------------------------------------------------------------------------------------------------
def scaled(document, factor, half_spread):
    """The document with fastdl `factor` times faster and quartiles this far around the median."""
    changed = copy.deepcopy(document)
    for row in changed["rows"]:
        warm = row["warm"]
        warm["fastdl"]["ms"] = 1.0 / factor
        warm["speedup"] = factor
        warm["speedup_q1"], warm["speedup_q3"] = factor * (1 - half_spread), factor * (1 + half_spread)
    return changed


@pytest.mark.parametrize(
    ("factor", "half_spread", "verdict"),
    [
        (1.5, 0.05, "faster"),
        (0.7, 0.05, "slower"),
        (1.5, 0.4, "within noise"),
        (1.01, 0.001, "within noise"),
        (1.0, 0.05, "within noise"),
    ],
)
def test_compare_verdicts(document, factor, half_spread, verdict):
    found = compare.changes(scaled(document, 1.0, half_spread), scaled(document, factor, half_spread))
    assert [change.verdict for change in found] == [verdict, verdict]
    assert found[0].time_ratio == pytest.approx(factor) and found[0].ratio == pytest.approx(factor)


def test_compare_flags_another_machine_and_settings(document):
    other = copy.deepcopy(document)
    other["machine"]["cpu"]["brand"] = "Abacus 3000"
    assert printed(compare.print_comparison, document, document).count("NOT ALIKE") == 0
    assert "NOT ALIKE processor" in printed(compare.print_comparison, document, other)
    other["settings"]["frozen"] = True
    assert compare.changes(document, other) == []
    assert "no rows in common" in printed(compare.print_comparison, document, other)
