"""Recurrent products on tiles of bfloat16 parts: which kernel runs, how exact it is, what it cannot hold."""

import math

import pytest
import torch
from torch import nn

import fastdl
from conftest import DTYPES
from fastdl import _C
from rnn_reference import Problem

ROWS = [row for row in _C.kernels("rnn") if row["isa"] == "amx"]
SPLIT = [row for row in ROWS if row["dtype"] != "bfloat16"]
here = pytest.mark.skipif(_C.cpu_info()["isa"] != "amx", reason="level amx is not in use")
needs_amx_rows = pytest.mark.skipif(not ROWS, reason="this build has no level amx")
L2 = 2 << 20


def cases(rows, **wanted):
    """The rows that have these values."""
    found = [row for row in rows if all(row[k] in v for k, v in wanted.items())]
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(r, id=r["name"], marks=pytest.mark.skipif(not r["available"], reason=r["reason"] or "-"))
            for r in found
        ],
    )


relu_rows = {"kind": ("rnn",)}


def relu(row, T, B, H, *, w=None, h0=None, reverse=False):
    """A relu problem that starts from h0 and is driven by it alone."""
    problem = Problem("rnn_relu", T, B, H, bias=False, reverse=reverse, dtype=DTYPES[row["dtype"]])
    problem.x = torch.zeros_like(problem.x)
    problem.w = problem.w if w is None else w.to(problem.dtype)
    problem.h0 = problem.h0 if h0 is None else h0.to(problem.dtype)
    return problem


@pytest.fixture
def recomputed():
    """recomputed(): elements computed again since the last look."""
    last = [_C.recomputed()]

    def look():
        last[0], before = _C.recomputed(), last[0]
        return last[0] - before

    return look


# --- which kernel -----------------------------------------------------------------------------------------------------
def planned(T, B, H, **options):
    return _C.rnn_plan(T, B, H, isa="amx", **({"threads": 2, "l2": L2, "precision": "ieee"} | options))


@needs_amx_rows
def test_precision_asked_is_precision_given():
    for precision, name in (("fma", "6x64_avx512"), ("ieee", "split"), ("tf32", "high"), ("bf16", "medium")):
        plan = planned(100, 32, 256, precision=precision)
        assert name in plan["kernel"]
        lost = {line.split(":")[0]: line for line in plan["candidates"]}
        assert plan["kernel"] not in lost
        if precision == "ieee":
            assert "less exact" in lost["lstm_f32_medium_32x32_amx"]
            assert "times the time" in lost["lstm_f32_6x64_avx512"]


@needs_amx_rows
def test_rows_and_weights_decide():
    """Few rows waste the tile; three parts of weights that no cache holds take longer to read than float32."""
    for mode in ("lstm", "gru", "rnn_tanh"):
        assert "amx" in planned(100, 32, 256, mode=mode)["kernel"]
        assert "avx512" in planned(100, 2, 256, mode=mode)["kernel"]
    assert "avx512" in planned(200, 16, 1024)["kernel"]
    assert "amx" in planned(200, 64, 1024)["kernel"]
    assert "amx" in planned(200, 16, 1024, dtype="bfloat16")["kernel"]
    assert "amx" in planned(100, 32, 256, dtype="float16")["kernel"]
    assert "avx512bf16" in planned(100, 1, 256, dtype="bfloat16")["kernel"]
    assert planned(1, 1, 512, dtype="bfloat16")["direct"]
    assert "few" in planned(1, 1, 512)["why"]


@needs_amx_rows
def test_threads_do_not_decide():
    """They would change results."""
    for B in (1, 4, 8, 16, 20, 32, 64):
        for H in (128, 256, 512, 800, 1024):
            for dtype in DTYPES:
                assert len({planned(50, B, H, dtype=dtype, threads=n)["kernel"] for n in (1, 2, 8, 64)}) == 1


@here
def test_switch_is_that_of_recurrent_layers():
    """All products of a layer, in both passes, follow it, and none that of matmul."""
    backends = torch.backends.mkldnn
    before = backends.matmul.fp32_precision, backends.rnn.fp32_precision
    layer = fastdl.nn.LSTM(96, 64, num_layers=2, bidirectional=True, proj_size=40)
    x = torch.randn(24, 40, 96, requires_grad=True)
    names = {"ieee": "split", "tf32": "high", "bf16": "medium"}
    try:
        for asked, other in (("ieee", "bf16"), ("bf16", "ieee"), ("tf32", "bf16")):
            backends.rnn.fp32_precision, backends.matmul.fp32_precision = asked, other
            _C.reset_counters()
            layer(x)[0].sum().backward()
            ran = {name for name, count in _C.counters().items() if count}
            tiled = {name for name in ran if name.endswith("amx")}
            assert {f"lstm_f32_{names[asked]}_32x32_amx", f"gemm_f32_{names[asked]}_64x32_amx"} <= tiled
            assert all(names[asked] in name for name in tiled), ran
    finally:
        backends.matmul.fp32_precision, backends.rnn.fp32_precision = before


# --- how exact --------------------------------------------------------------------------------------------------------
@cases(SPLIT, dtype=("float32",), precision=("ieee",), **relu_rows)
@pytest.mark.parametrize("bits", [(23, 1), (1, 23), (12, 12), (16, 8), (8, 16)])
def test_every_part_counts(row, bits):
    """Integers of so many bits, h and W, whose products float32 holds: all three parts of both, in all six products."""
    H, g = 77, torch.Generator().manual_seed(bits[0])
    h_bits, w_bits = bits
    h0 = torch.randint(2 ** (h_bits - 1), 2**h_bits, (19, H), generator=g)
    w = torch.zeros(H, H, dtype=torch.int64)
    values = torch.randint(2 ** (w_bits - 1), 2**w_bits, (H,), generator=g)
    w[torch.arange(H), torch.randperm(H, generator=g)] = values
    problem = relu(row, 1, 19, H, w=w, h0=h0)
    expected = problem.reference()
    forward = problem.forward(kernel=row["name"])
    assert torch.equal(forward["y"].double(), expected["y"])
    problem.dy, problem.dh_n = h0[None].float(), torch.zeros(19, H)
    grads = problem.backward(forward, kernel=row["name"])
    assert torch.equal(grads["dh0"].double(), problem.reference()["dh0"])


@cases(ROWS, dtype=("float32", "float16"))
def test_ordinary_values_are_computed_once(row, recomputed):
    mode = {"rnn": "rnn_relu"}.get(row["kind"], row["kind"])
    problem = Problem(mode, 4, 19, 45, dtype=DTYPES[row["dtype"]], states=False)
    problem.dh_n = problem.dc_n = None
    problem.backward(problem.forward(kernel=row["name"]), kernel=row["name"])
    assert recomputed() == 0


# --- what parts cannot hold -------------------------------------------------------------------------------------------
@cases(SPLIT, **relu_rows)
def test_nan_and_infinity_surface_where_they_do(row, recomputed):
    """Inf * 0 and Inf - Inf are NaN, NaN is; everything else is as without them."""
    B, H = 35, 70
    clean = relu(row, 1, B, H, h0=torch.rand(B, H))
    dirty = relu(row, 1, B, H, h0=clean.h0)
    dirty.h0[33, 5], dirty.h0[3, 7], dirty.h0[3, 8], dirty.h0[17, 69] = math.inf, math.inf, -math.inf, math.nan
    dirty.w[41, 5], dirty.w[60, 0], dirty.w[61, 1] = 0.0, math.inf, math.nan
    y = dirty.forward(kernel=row["name"])["y"][0]
    s = dirty.h0.double() @ dirty.w.double().T
    expected = torch.where(s.isnan(), s, s.clamp(min=0))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    untouched = torch.ones(B, H, dtype=torch.bool)
    untouched[[33, 3, 17]], untouched[:, [60, 61]], untouched[:, 41] = False, False, False
    assert torch.equal(y[untouched], clean.forward(kernel=row["name"])["y"][0][untouched])
    assert 0 < recomputed() < B * H
    clean.w = dirty.w
    clean.dy, clean.dh_n = torch.rand(1, B, H), torch.zeros(B, H)
    clean.dy[0, 2, 3] = math.inf
    clean.dy, clean.dh_n = clean.dy.to(clean.dtype), clean.dh_n.to(clean.dtype)
    forward = clean.forward(kernel=row["name"])
    forward["y"] = torch.ones_like(forward["y"])
    dh0 = clean.backward(forward, kernel=row["name"])["dh0"]
    s = clean.dy[0].double() @ clean.w.double()
    assert torch.equal(dh0.isnan(), s.isnan()) and torch.equal(dh0.isinf(), s.to(dh0.dtype).isinf())


def assert_near_sums(actual, a, b, K):
    """Of a @ b, within float32's bound and what parts below 2^-126 take."""
    S = a.abs() @ b.abs()
    bound = (2 * K + 8) * 2**-24 * S + K * 2.0**-126 * (6 + a.abs().max() + b.abs().max()) + 2.0**-126
    assert bool(((actual - a @ b).abs() <= bound).all()), ((actual - a @ b).abs() / bound).max()


@cases(SPLIT, dtype=("float32",), precision=("ieee",), **relu_rows)
@pytest.mark.parametrize("exponents", [(-108, 0), (0, -112), (-60, -58), (-101, 80), (40, -110)])
def test_tiny_rows_and_columns(row, exponents, recomputed):
    """Rows of h, rows of W, and both together so small that parts or products of parts are flushed."""
    B, H = 21, 70
    g = torch.Generator().manual_seed(5)
    h0, w = torch.rand(B, H, generator=g) + 0.5, torch.rand(H, H, generator=g) - 0.25
    h0[::2] *= 2.0 ** exponents[0]
    w[1::3] *= 2.0 ** exponents[1]
    w[:, 40:] *= 2.0 ** (exponents[1] // 2)
    problem = relu(row, 1, B, H, w=w, h0=h0)
    forward = problem.forward(kernel=row["name"])
    h, d = h0.double(), w.double()
    error = (forward["y"][0].double() - (h @ d.T).clamp(min=0)).abs()
    bound = (2 * H + 8) * 2**-24 * (h @ d.abs().T) + H * 2.0**-149
    tiny = (h.amax(1)[:, None] < 2.0**-100) | (d.abs().amax(1)[None] < 2.0**-100)
    assert bool((error <= bound)[tiny].all())
    assert bool((error <= bound + H * 2.0**-126 * (6 + h.max() + d.abs().max())).all())
    assert recomputed() > 0
    problem.dy, problem.dh_n = h0[None], torch.zeros(B, H)
    forward["y"] = torch.ones(1, B, H)
    dh0 = problem.backward(forward, kernel=row["name"])["dh0"].double()
    assert_near_sums(dh0, h, d, H)


@cases(SPLIT, dtype=("float32",), precision=("ieee",))
def test_vanishing_gradients(row, recomputed):
    """The gradients of early steps of a long sequence, far below what parts hold, still are what FMA gives."""
    mode = {"rnn": "rnn_tanh"}.get(row["kind"], row["kind"])
    problem = Problem(mode, 60, 18, 40)
    problem.w = problem.w * 0.1
    if mode != "rnn_tanh":
        problem.x[..., 40:80] -= 3  # forget gates, or those that keep, nearly closed
    problem.dy, problem.dc_n = torch.zeros_like(problem.dy), None
    lower = {"lstm": "lstm_f32_6x64_avx512", "gru": "gru_f32_8x48_avx512", "rnn": "rnn_f32_14x32_avx512"}[row["kind"]]
    forward = problem.forward(kernel=lower)
    got, fma = (problem.backward(forward, kernel=kernel)["d_gates"] for kernel in (row["name"], lower))
    size = fma.abs().amax(-1, keepdim=True)
    assert bool(((size > 2.0**-120) & (size < 2.0**-101)).any())
    assert recomputed() > 0
    assert bool((((got - fma).abs() <= 1e-5 * size) | (size < 2.0**-120)).all())


@cases(SPLIT, kind=("lstm",))
def test_projections_repair_too(row, recomputed):
    """NaN and tiny values in W_hr."""
    problem = Problem("lstm", 2, 19, 40, 33, dtype=DTYPES[row["dtype"]])
    clean = problem.forward(kernel=row["name"])["y"]
    problem.r[5, 3] = math.inf
    y = problem.forward(kernel=row["name"])["y"]
    others = [j for j in range(33) if j != 5]
    assert torch.equal(y[0][:, others], clean[0][:, others])
    assert not bool(y[0, :, 5].isfinite().any())
    if row["dtype"] == "float32":
        recomputed()
        problem = Problem("lstm", 1, 19, 40, 33)
        problem.r[4] *= 2.0**-110
        y = problem.forward(kernel=row["name"])["y"]
        expected = problem.reference()["y"]
        limit = {"ieee": 1e-5, "tf32": 1e-3, "bf16": 3e-2}[row["precision"]] * expected[0, :, 4].abs().max()
        assert bool(((y.double() - expected)[0, :, 4].abs() <= limit).all())
        assert recomputed() >= 19


@cases(SPLIT, kind=("lstm", "gru"))
def test_special_weights_of_one_gate(row, recomputed):
    """An infinite weight makes one gate of one unit saturate, whatever the rest: f of lstm, z of gru."""
    H = 40
    problem = Problem(row["kind"], 1, 19, H, dtype=DTYPES[row["dtype"]])
    problem.h0[:, 7] = 1.0
    problem.w[H + 9, 7] = math.inf
    forward = problem.forward(kernel=row["name"])
    assert recomputed() == 19
    if row["kind"] == "lstm":  # f = 1: c = c0 + i g
        i, _, g, _ = forward["saved"].flatten()[: 19 * 4 * H].view(19, 4, H)[:, :, 9].float().unbind(1)
        assert torch.allclose(forward["c_n"][:, 9].float(), problem.c0[:, 9].float() + i * g, rtol=2e-3, atol=2e-3)
    else:  # z = 1: h stays
        assert torch.allclose(forward["y"][0, :, 9], problem.h0[:, 9], rtol=2e-3, atol=2e-3)
    assert bool(forward["y"].isfinite().all())


@here
def test_layers_train_as_on_other_levels():
    """A whole layer at this level against float64, dtype by dtype."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        torch.manual_seed(3)
        stock = nn.GRU(40, 48, bidirectional=True).to(dtype)
        x = torch.randn(9, 33, 40).to(dtype)
        results = []
        for target in (dtype, torch.float64):
            layer = fastdl.nn.GRU(40, 48, bidirectional=True)
            layer.load_state_dict(stock.state_dict())
            layer.to(target)
            leaf = x.to(target).requires_grad_()
            y = layer(leaf)[0]
            results.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))])
        for actual, expected in zip(*results, strict=True):
            error = (actual.double() - expected).abs().max().item()
            assert error <= tolerance * max(1.0, expected.abs().max().item()), error
