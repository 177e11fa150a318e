"""The benchmark harness: what it measures, what it refuses to count, and how figures are judged."""

from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastdl import _C, machine
from fastdl.bench import accuracy, attention, check, compare, conv, gemm, harness, host, runner
from fastdl.bench.report import print_document, read_json, write_json
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def document():
    """One real run: the 8x8x8 rows."""
    return runner.run("gemm", Settings(seconds=0.001, shapes="8x8x8"))


def printed(function, *arguments):
    """What a function prints to the console it takes last."""
    text = io.StringIO()
    function(*arguments, Console(file=text, width=200))
    return text.getvalue()


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


# --- bars -----------------------------------------------------------------------------------------------------------
def make_bar(**changed):
    facts = {
        "name": "a bar", "issue": 0, "operation": "gemm", "families": ["overhead"], "tag": "", "dtype": "float32",
        "threads": 0, "isa": "", "frozen": False, "kernel": "", "metric": "speedup", "must": 1.0, "aim": 2.0,
    }  # fmt: skip
    return check.Bar(**(facts | changed))


def make_rows(document, *speedups):
    """A document with one row for each speed-up."""
    rows = []
    for speedup in speedups:
        row = copy.deepcopy(document["rows"][0]) | {"tags": []}
        row["warm"]["speedup"] = speedup
        rows.append(row)
    return document | {"rows": rows, "other_load": 0.0}


def test_a_bar_is_the_geometric_mean_of_its_rows(document):
    verdict = check.judge(make_bar(), make_rows(document, 0.5, 4.5))
    assert verdict.value == pytest.approx(1.5) and verdict.met
    assert not check.judge(make_bar(must=1.6), make_rows(document, 0.5, 4.5)).met


def test_a_time_ratio_is_met_from_below(document):
    rows = make_rows(document, 0.8)
    assert check.judge(make_bar(metric="time_ratio", must=1.5), rows).value == pytest.approx(1.25)
    assert check.judge(make_bar(metric="time_ratio", must=1.5), rows).met
    assert not check.judge(make_bar(metric="time_ratio", must=1.2), rows).met


def test_accuracy_of_a_row_and_its_table():
    row = accuracy._row("float32", "positive", 256)
    assert 0 < row["fastdl"]["rms"] <= row["fastdl"]["max"] < 2**-16 and 0 < row["torch"]["rms"] < 2**-20
    document = {"settings": {"isa": "avx2"}, "rows": [row]}
    (line,) = accuracy.cells(document)
    assert len(line) == len(accuracy.COLUMNS) and line[:5] == ["avx2", "ieee", "float32", "positive", "256"]
    assert line[5] == f"{row['fastdl']['rms']:.1e}" and line[8] == f"{row['torch']['max']:.1e}"


@pytest.mark.parametrize(("over", "value"), [("mean", 2.0), ("worst", 1.0)])
def test_a_bar_over_all_rows_or_the_worst(over, value, document):
    row = document["rows"][0]
    rows = [row | {"name": str(s), "warm": row["warm"] | {"speedup": s}} for s in (1.0, 4.0)]
    verdict = check.judge(make_bar(over=over, families=[row["family"]]), document | {"rows": rows})
    assert verdict.value == pytest.approx(value)


def test_a_bar_counts_its_families_and_tag_only(document):
    rows = make_rows(document, 3.0, 1.0, 1.0)
    rows["rows"][0]["tags"] = ["peak"]
    rows["rows"][2]["family"] = "elsewhere"
    assert check.judge(make_bar(tag="peak"), rows).value == pytest.approx(3.0)
    assert check.judge(make_bar(), rows).value == pytest.approx(math.sqrt(3.0))
    assert check.judge(make_bar(tag="absent"), rows).value is None


def test_a_failed_check_misses_the_bar(document):
    rows = make_rows(document, 9.0, 9.0)
    rows["rows"][1]["check"] = {"passed": False, "failure": "wrong", "error": 1.0, "torch_error": 0.0}
    verdict = check.judge(make_bar(), rows)
    assert not verdict.met and verdict.problem.startswith("check failed")


def test_handing_back_is_limited(document):
    rows = make_rows(document, *[9.0] * 10)
    rows["rows"][0]["handed_back"] = True
    assert check.judge(make_bar(), rows).met  # a tenth
    rows["rows"][0]["tags"] = ["named"]
    assert not check.judge(make_bar(), rows).met  # a shape an issue names
    rows["rows"][0]["tags"] = []
    rows["rows"][1]["handed_back"] = True
    assert not check.judge(make_bar(), rows).met


def test_figures_of_a_busy_machine_do_not_count(document):
    rows = make_rows(document, 9.0)
    for other_load, met in ((None, True), (0.1, True), (0.9, False)):
        assert check.judge(make_bar(), rows | {"other_load": other_load}).met == met
    assert "NOT TO BE TRUSTED: other programs kept 0.9 processors busy" in printed(
        print_document, document | {"other_load": 0.9}
    )


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


@pytest.mark.parametrize(("changed", "reason"), [({"isa": "sse9"}, "lacks sse9"), ({"threads": 10**6}, "processors")])
def test_what_cannot_be_measured_is_missing(changed, reason):
    def never(bars):
        raise AssertionError("measured")

    (verdict,), documents = check.check([make_bar(**changed)], never)
    assert reason in verdict.problem and not verdict.met and documents == []


def test_a_run_that_fails_is_missing():
    def fail(bars):
        raise RuntimeError("ended with status 3")

    (verdict,), _ = check.check([make_bar()], fail)
    assert verdict.problem == "ended with status 3" and not verdict.met


def test_bars_with_the_same_settings_share_a_run(document):
    runs = []

    def measure(bars):
        runs.append([bar.name for bar in bars])
        return document

    bars = [make_bar(name="a"), make_bar(name="b", threads=1), make_bar(name="c")]
    verdicts, _ = check.check(bars, measure)
    assert runs == [["a", "c"], ["b"]]
    assert [verdict.bar.name for verdict in verdicts] == ["a", "b", "c"]
    text = printed(check.print_verdicts, verdicts)
    assert f"{sum(verdict.met for verdict in verdicts)} of 3 met" in text


def test_the_shipped_bars_can_be_measured_as_stated():
    bars = check.load_bars(check.find_bars(ROOT / "tests"))
    for bar in bars:
        module = runner.OPERATIONS[bar.operation]
        assert all(load(bar.operation, family, bar.tag) for family in bar.families), bar.name
        assert set(bar.families) <= set(module.FAMILIES), bar.name
        assert bar.isa in ("", *machine.ISA_LEVELS), bar.name
        assert bar.reached(bar.aim, bar.must), bar.name


def test_bars_of_the_float32_path():
    """The figures asked of float32 on FMA units, as (metric, must, aim)."""
    bars = {
        bar.name: (bar.metric, bar.must, bar.aim) for bar in check.load_bars(check.find_bars(ROOT)) if bar.issue == 2
    }
    assert bars == {
        "gemm float32 avx512": ("speedup", 0.95, 1.05),
        "gemm float32 avx2": ("speedup", 0.95, 1.05),
        "gemm float32 avx512 peak 256^3..4096^3": ("fma_percent", 85, 93),
        "gemm float32 avx2 peak 256^3..4096^3": ("fma_percent", 85, 93),
        "linear forward+backward float32": ("speedup", 0.95, 1.1),
        "linear small float32": ("speedup", 1.0, 1.5),
        "call overhead 8x8 without grad": ("time_ratio", 1.5, 1.0),
        "call overhead 8x8 with grad": ("time_ratio", 1.2, 1.0),
    }


def test_bars_of_attention():
    """Its figures, as (metric, must, aim)."""
    bars = {
        bar.name.removeprefix("attention "): ("worst" if bar.over == "worst" else bar.metric, bar.must, bar.aim)
        for bar in check.load_bars(check.find_bars(ROOT))
        if bar.issue == 4
    }
    both = {"float32": 1.5, "bfloat16": 2.2}
    expected = {
        "forward bfloat16 full, L >= 512": ("speedup", 1.7, 2.6),
        "forward bfloat16 causal, L >= 512": ("speedup", 2.2, 3.2),
        "forward float32": ("speedup", 1.5, 2.2),
        "forward+backward bfloat16": ("speedup", 4, 6),
        "forward+backward float32": ("speedup", 1.8, 2.5),
        "forward bfloat16 L = 128, 197, 577": ("speedup", 1.5, 2.5),
    }
    for isa in ("avx512", "avx2"):
        expected[f"forward float32 {isa}"] = expected[f"forward+backward float32 {isa}"] = ("speedup", 1.0, 1.3)
    for dtype, must in both.items():
        expected[f"bool mask over heads {dtype}"] = expected[f"float mask over heads {dtype}"] = (
            "mask_ratio",
            1.25,
            1.15,
        )
        expected[f"decode 32/8 kv 4096 {dtype}"] = ("speedup", 2, 2)
        expected[f"decode 32/8 kv 4096 {dtype} bandwidth"] = ("read_percent", 60, 85)
        expected[f"lengths 1k to 16k causal {dtype}"] = ("worst", must, must + (0.7 if must < 2 else 1.0))
        expected[f"time per score 1k to 16k {dtype}"] = ("rate_spread", 1.15, 1.05)
        expected[f"worst row {dtype}"] = ("worst", 1, 1)
    assert bars == expected


def test_figures_over_rows(document):
    rows = make_rows(document, 2.0, 4.0)
    assert check.judge(make_bar(over="worst"), rows).value == pytest.approx(2.0)
    for row, rate in zip(rows["rows"], (100.0, 125.0), strict=True):
        row["gflops"], row["read_percent"] = rate, rate / 2
        row["parts"] = {"without mask": {"speedup": 100 / rate}}
    assert check.judge(make_bar(metric="rate_spread", must=1.3, aim=1.1), rows).value == pytest.approx(1.25)
    assert not check.judge(make_bar(metric="rate_spread", must=1.2, aim=1.1), rows).met
    assert check.judge(make_bar(metric="mask_ratio", must=1.3, aim=1.1), rows).value == pytest.approx(1.25)
    assert check.judge(make_bar(metric="read_percent", must=55, aim=90), rows).value == pytest.approx(
        math.sqrt(50 * 62.5)
    )


def test_bars_are_selected_by_name(tmp_path):
    path = check.find_bars(ROOT)
    assert [bar.name for bar in check.load_bars(path, "call*without*")] == ["call overhead 8x8 without grad"]
    with pytest.raises(ValueError, match="no bar matches"):
        check.load_bars(path, "no such bar")
    with pytest.raises(FileNotFoundError, match="--bars"):
        check.find_bars(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[[bar]]\nname = 'x'\n", "missing"), ("", "no bar matches"), ("[[bar]]\nunknown = 1\n", "unexpected")],
)
def test_malformed_bars(tmp_path, text, message):
    (tmp_path / "bars.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        check.load_bars(tmp_path / "bars.toml")


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="metric: expected one of"):
        make_bar(metric="beauty")


@pytest.mark.slow
def test_check_measures_in_processes_of_their_own():
    """End to end over the cheapest bar: the figure is that of the rows measured."""
    (verdict,), (run,) = check.check([make_bar(must=0.0001)], check.measure)
    assert verdict.met or verdict.problem.startswith("other programs")
    assert verdict.value == pytest.approx(run["rows"][0]["warm"]["speedup"])
    assert run["settings"]["regimes"] == ["warm"]
