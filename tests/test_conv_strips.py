"""Dense convolution by strips (csrc/conv/cpu/dense_strips.cc)."""

import math

import pytest
import torch

from conv_reference import Conv, lay
from fastdl import _C

ROW = "conv_bf16_32x32_amx"
ROWS = {torch.bfloat16: ROW, torch.float32: "conv_f32_split_32x32_amx"}
PASSES = {"forward": _C.conv, "dgrad": _C.conv_dgrad}

pytestmark = pytest.mark.skipif(
    not any(row["name"] == ROW and row["available"] for row in _C.kernels("conv")), reason=f"{ROW} does not run here"
)

# Columns in whole blocks of 32 and not, one strip and many, short last ones.
CASES = {
    "rows": dict(N=2, C=64, K=64, size=(21, 30), kernel=(3, 3), padding=(1, 1)),
    "images": dict(N=9, C=48, K=96, size=(7, 7), kernel=(3, 3), padding=(1, 1)),
    "odd images": dict(N=5, C=33, K=70, size=(9, 6), kernel=(3, 5), padding=(1, 2)),
    "no padding": dict(N=3, C=32, K=64, size=(8, 11), kernel=(2, 3)),
    "padding on one side of a phase": dict(
        N=3, C=64, K=64, size=(12, 13), kernel=(4, 4), stride=(2, 2), padding=(1, 1)
    ),
    "stride": dict(N=2, C=64, K=64, size=(29, 24), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "strides": dict(N=2, C=32, K=40, size=(20, 31), kernel=(5, 4), stride=(2, 3), padding=(2, 1)),
    "dilation": dict(N=1, C=64, K=64, size=(19, 23), kernel=(3, 3), padding=(3, 3), dilation=(3, 3)),
    "stride and dilation": dict(N=1, C=32, K=64, size=(25, 26), kernel=(3, 3), stride=(2, 2), dilation=(2, 3)),
    "pixels apart": dict(N=1, C=512, K=32, size=(9, 9), kernel=(3, 3), padding=(1, 1)),
    "more padding than taps reach": dict(N=3, C=32, K=64, size=(10, 9), kernel=(3, 3), padding=(4, 5)),
    "blocks of columns": dict(N=1, C=256, K=448, size=(6, 6), kernel=(3, 3), padding=(1, 1)),
    "blocks of channels": dict(N=2, C=320, K=64, size=(6, 7), kernel=(3, 3), padding=(1, 1)),
    "wide": dict(N=1, C=32, K=64, size=(2, 1100), kernel=(1, 3), padding=(0, 1)),
    "long": dict(N=2, C=64, K=32, size=(700,), kernel=(5,), padding=(2,)),
    "cubes": dict(N=2, C=32, K=64, size=(3, 6, 7), kernel=(1, 3, 3), padding=(0, 1, 1)),
    "in place": dict(N=2, C=64, K=96, size=(9, 9), kernel=(1, 1)),
    "in place, every second row": dict(N=2, C=64, K=64, size=(9, 8), kernel=(1, 1), stride=(2, 1)),
    "every second pixel": dict(N=2, C=96, K=64, size=(9, 10), kernel=(1, 1), stride=(2, 2)),
    "few channels": dict(N=2, C=3, K=64, size=(20, 20), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
}


def plan_of(problem, pass_, threads=1):
    shapes = problem.x.shape, problem.w.shape, problem.dy.shape
    dtype = str(problem.dtype).removeprefix("torch.")
    options = {**problem.options, "dtype": dtype, "kernel": ROWS[problem.dtype], "threads": threads}
    return _C.conv_plan(pass_, *map(list, shapes), **options)


def run(problem, pass_, **options):
    """What is written into NaN, beside which nothing may be: every second image and pixel of a larger buffer."""
    source, bias, shape = problem.operands(pass_)
    wide = torch.full((2 * shape[0], *shape[1:-1], shape[-1] + 3), math.nan, dtype=problem.dtype)
    out = lay(wide, "channels_last")
    view = out[::2, ..., : shape[-1]]
    source, weight = lay(source, "channels_last"), lay(problem.w, "channels_last")
    PASSES[pass_](view, source, weight, bias, kernel=ROWS[problem.dtype], **problem.options, **options)
    assert out[1::2].isnan().all()
    assert out[..., shape[-1] :].isnan().all()
    return view


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact(name, pass_, dtype):
    """Integers whose sums float32 holds: rounded once, bit for bit, whatever the number of threads."""
    problem = Conv(**CASES[name], dtype=dtype, high=2)
    expected = problem.reference(pass_).to(problem.dtype)
    for threads in (1, 2, 3):
        assert torch.equal(run(problem, pass_, threads=threads), expected), threads


@pytest.mark.parametrize("name", CASES)
def test_these_are_strips(name):
    plan = plan_of(Conv(**CASES[name], dtype=torch.bfloat16), "forward")
    assert plan["strips"] and plan["flat"]
    assert (plan["n_block"] < plan["k_block"]) == (name == "blocks of columns")


@pytest.mark.parametrize("name, blocks", [("blocks of channels", 2), ("pixels apart", 2), ("rows", 1)])
def test_channels_of_a_band(name, blocks):
    """Three parts of as many as fit; the sums of several bands wait in what is written."""
    plan = plan_of(Conv(**CASES[name], dtype=torch.float32), "forward")
    assert plan["strips"]
    assert -(-CASES[name]["C"] // plan["c_block"]) == blocks


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", ["images", "odd images", "in place"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_epilogue(name, pass_, activation):
    """activation(sum + bias) + residual, and what went into the activation: blocks that wait and those that do not."""
    problem = Conv(**CASES[name], dtype=torch.bfloat16, high=2)
    z = problem.reference(pass_)
    expected = z.relu() if activation == "relu" else z
    assert torch.equal(run(problem, pass_, activation=activation), expected.to(problem.dtype))
    source, bias, shape = problem.operands(pass_)
    generator = torch.Generator().manual_seed(3)
    residual = lay(torch.randint(-3, 4, shape, generator=generator).to(problem.dtype), "channels_last")
    out, pre = torch.full_like(residual, math.nan), torch.full_like(residual, math.nan)
    source, weight = lay(source, "channels_last"), lay(problem.w, "channels_last")
    options = dict(problem.options, kernel=ROW, activation=activation, residual=residual, pre=pre)
    PASSES[pass_](out, source, weight, bias, **options)
    assert torch.equal(pre, z.to(problem.dtype))
    assert torch.equal(out, (expected + residual.double()).to(problem.dtype))


def test_nan_between_rows_stays_there():
    """Pixels between the rows of the band are multiplied, too, and never written."""
    problem = Conv(**CASES["rows"], dtype=torch.bfloat16, high=2)
    problem.x[0, 0, 0, 0], problem.x[1, 3, 20, 29] = math.nan, math.inf
    expected = problem.reference("forward").isfinite()
    assert torch.equal(run(problem, "forward").isfinite(), expected)
    assert (~expected).any(1).sum() == 8


@pytest.mark.parametrize("which", ("pixels", "columns", "both"))
@pytest.mark.parametrize("name", ["rows", "blocks of channels"])
def test_tiny_values(name, which):
    """Sums of float32 in parts that lose what is below 2^-126 are computed again: each as exact as any."""
    row = ROWS[torch.float32]
    problem = Conv(**CASES[name], high=0)
    x, w = problem.x, problem.w
    if which == "both":
        x[1] *= 2.0**-60
        w[7] *= 2.0**-60
    else:
        x[1] *= 2.0**-122 if which == "pixels" else 1
        w[7] *= 2.0**-122 if which == "columns" else 1
    plan = _C.conv_plan("forward", *(list(t.shape) for t in (x, w, problem.dy)), **problem.options, kernel=row)
    assert plan["strips"]
    y = lay(torch.full_like(problem.dy, math.nan), "channels_last")
    before = _C.recomputed()
    _C.conv(y, lay(x, "channels_last"), lay(w, "channels_last"), kernel=row, **problem.options)
    assert 0 < _C.recomputed() - before < y.numel()
    problem.bias *= 0
    error = (y - problem.reference("forward")).abs()
    assert (error <= 2e-6 * problem.reference("forward", absolute=True)).all()


@pytest.mark.parametrize("name", ["rows", "blocks of channels"])
def test_special_values_in_parts(name):
    """Inf, whose second part is none, and what the first part rounds to Inf: as in float64, everything else finite."""
    row = ROWS[torch.float32]
    problem = Conv(**CASES[name], high=0)
    problem.x[0, 3, 5, 5], problem.x[1, 9, 4, 0], problem.bias = math.inf, 3.4e38, problem.bias * 0
    problem.w[:, 9] *= 0.01
    y = lay(torch.full_like(problem.dy, math.nan), "channels_last")
    _C.conv(y, lay(problem.x, "channels_last"), lay(problem.w, "channels_last"), kernel=row, **problem.options)
    expected, scale = problem.reference("forward"), problem.reference("forward", absolute=True)
    assert torch.equal(y.isinf(), expected.isinf()) and torch.equal(y.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert ((y - expected)[finite].abs() <= 2e-6 * scale[finite]).all()
