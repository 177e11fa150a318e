"""`fastdl bench check`: how the bars of benchmarks/bars.toml are measured and judged."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

from bench_documents import printed, small_document
from fastdl import machine
from fastdl.bench import check, runner
from fastdl.bench.report import print_document
from fastdl.bench.shapes import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def document():
    return small_document()


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

    bars, so_far = [make_bar(name="a"), make_bar(name="b", threads=1), make_bar(name="c")], []

    def after_run(verdicts, documents):
        so_far.append(([verdict.bar.name for verdict in verdicts], len(documents)))

    verdicts, _ = check.check(bars, measure, after_run)
    assert runs == [["a", "c"], ["b"]]
    assert so_far == [(["a", "c"], 1), (["a", "b", "c"], 2)]
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


def shipped(issue):
    """The figures that an issue asks for: name -> (metric, or "worst", must, aim)."""
    bars = [bar for bar in check.load_bars(check.find_bars(ROOT)) if bar.issue == issue]
    return {bar.name: ("worst" if bar.over == "worst" else bar.metric, bar.must, bar.aim) for bar in bars}


def test_bars_of_the_float32_path():
    """The figures asked of float32 on FMA units."""
    assert shipped(2) == {
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
    bars = {name.removeprefix("attention "): figures for name, figures in shipped(4).items()}
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
