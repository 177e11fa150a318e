"""`_C.conv` and `_C.conv_dgrad`, the dense schedule, against float64 on every row of the convolution kernel table."""

import itertools
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DTYPES
from conv_reference import LAYOUTS, Conv, lay
from fastdl import _C
from fastdl.testing import GemmReference, assert_within_bound, tails

ROWS = [row for row in _C.kernels("conv") if row["kind"] == "dense"]
PASSES = ("forward", "dgrad")
CALL = {"forward": _C.conv, "dgrad": _C.conv_dgrad}
every_row = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row["name"], marks=pytest.mark.skipif(not row["available"], reason=row["reason"] or "-"))
        for row in ROWS
    ],
)
every_pass = pytest.mark.parametrize("pass_", PASSES)
THREAD_BYTES = 2 << 20


def run(problem, pass_, *, bias=True, kernel="", **options):
    """What the kernel writes, into NaN."""
    source, b, shape = problem.operands(pass_)
    out = lay(torch.full(shape, float("nan"), dtype=problem.dtype), problem.layout)
    args = lay(source, problem.layout), lay(problem.w, problem.layout), b if bias else None
    CALL[pass_](out, *args, **problem.options, kernel=kernel, **options)
    return out


def assert_exact(problem, pass_, **options):
    """Integers whose sums float32 holds: rounded once, bit for bit."""
    expected = problem.reference(pass_).to(problem.dtype)
    actual = run(problem, pass_, **options)
    assert torch.equal(actual, expected), (problem, pass_)  # NaN: never written


# One line a property: sizes, kernels, strides, padding, dilation, groups.
GRID = [
    dict(N=2, C=3, K=5, size=(9,), kernel=(3,), padding=(1,)),
    dict(N=1, C=1, K=7, size=(53,), kernel=(10,), stride=(5,)),
    dict(N=1, C=4, K=6, size=(40,), kernel=(2,), dilation=(16,)),
    dict(N=2, C=5, K=3, size=(11,), kernel=(3,), stride=(2,)),
    dict(N=3, C=4, K=8, size=(7, 7), kernel=(3, 3), padding=(1, 1)),
    dict(N=2, C=3, K=4, size=(19, 17), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    dict(N=2, C=6, K=4, size=(9, 8), kernel=(1, 1)),
    dict(N=2, C=6, K=4, size=(9, 8), kernel=(1, 1), stride=(2, 2)),
    dict(N=1, C=4, K=4, size=(12, 13), kernel=(3, 3), padding=(3, 3), dilation=(3, 3)),
    dict(N=1, C=4, K=4, size=(12, 13), kernel=(3, 2), stride=(3, 2), padding=(2, 5), dilation=(2, 1)),
    dict(N=1, C=2, K=3, size=(5, 40), kernel=(2, 3), dilation=(1, 17)),
    dict(N=1, C=2, K=3, size=(40, 5), kernel=(3, 2), dilation=(17, 1)),
    dict(N=2, C=6, K=9, size=(8, 9), kernel=(3, 3), padding=(1, 1), groups=3),
    dict(N=1, C=3, K=4, size=(6, 7), kernel=(2, 2), stride=(5, 4)),
    dict(N=1, C=2, K=3, size=(4, 6, 7), kernel=(3, 2, 3), padding=(1, 0, 2)),
    dict(N=2, C=3, K=2, size=(5, 6, 5), kernel=(2, 3, 3), stride=(2, 1, 2), dilation=(2, 1, 1)),
    dict(N=0, C=3, K=4, size=(6, 7), kernel=(3, 3)),
    dict(N=2, C=0, K=4, size=(6, 7), kernel=(3, 3)),
    dict(N=2, C=3, K=0, size=(6, 7), kernel=(3, 3)),
]


@every_row
@every_pass
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_is_exact(row, pass_, layout):
    for case in GRID:
        problem = Conv(**case, dtype=DTYPES[row["dtype"]], layout=layout)
        assert_exact(problem, pass_, kernel=row["name"])


@every_row
@every_pass
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tails(row, pass_, layout):
    """Around every tile: pixels of a row, channels written, channels summed; few of the others."""
    dtype = DTYPES[row["dtype"]]
    kernel_row = {"kernel": row["name"]}
    width = {"scalar": 4, "avx2": 8}.get(row["isa"], 16)
    for n in sorted({*tails(row["mr"]), *tails(width)}):
        assert_exact(Conv(1, 3, 5, (2, n), (2, 3), padding=(0, 1), dtype=dtype, layout=layout), pass_, **kernel_row)
    for n in sorted({*tails(row["nr"]), *tails(width)}):
        case = dict(size=(3, 4), kernel=(3, 3), padding=(1, 1), dtype=dtype, layout=layout)
        C, K = (3, n) if pass_ == "forward" else (n, 3)
        assert_exact(Conv(1, C, K, **case), pass_, **kernel_row)
        assert_exact(Conv(1, K, C, **case), pass_, **kernel_row)


@every_row
def test_tiles_of_every_size(row):
    """Tiles of fewer columns take more rows: all of them, the last vector of columns whole and not."""
    width = {"scalar": 4, "avx2": 8}.get(row["isa"], 16)
    for vectors, short, pixels in itertools.product(range(row["nr"] // width), (0, 1), range(2, 17)):
        problem = Conv(1, 3, (vectors + 1) * width - short, (1, pixels), (1, 2), dtype=DTYPES[row["dtype"]])
        assert_exact(problem, "forward", kernel=row["name"])


@every_row
@every_pass
def test_blocks_of_channels_pixels_and_columns(row, pass_):
    """More of each than a part or a product takes, the last block short."""
    dtype = DTYPES[row["dtype"]]
    deep, wide = (601, 7) if pass_ == "forward" else (7, 601), (3, 300) if pass_ == "forward" else (300, 3)
    for C, K in (deep, wide):
        assert_exact(Conv(1, C, K, (3, 5), (3, 3), padding=(1, 1), dtype=dtype, high=1), pass_, kernel=row["name"])
    apart = 4096 // dtype.itemsize  # pixels so far apart are not read in place
    C, K = (apart, 5) if pass_ == "forward" else (5, apart)
    assert_exact(Conv(2, C, K, (3, 5), (1, 1), dtype=dtype, high=1), pass_, kernel=row["name"])
    for size, kernel in (((3, 1100), (1, 3)), ((70, 17), (3, 1)), ((300,), (291,))):
        assert_exact(Conv(2, 2, 3, size, kernel, dtype=dtype, high=1), pass_, kernel=row["name"])


def sizes(dims, low, high):
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def problems(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(sizes(dims, 1, 4)), draw(sizes(dims, 1, 4)), draw(sizes(dims, 1, 3))
    padding, more = draw(sizes(dims, 0, 3)), draw(sizes(dims, 0, 8))
    size = [max(1, d * (k - 1) + 1 - 2 * p) + m for k, d, p, m in zip(kernel, dilation, padding, more, strict=True)]
    C, K = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 20))
    return Conv(
        draw(st.integers(1, 2)), C, K, tuple(size), kernel, stride, padding, dilation, groups,
        draw(st.sampled_from(list(DTYPES.values()))), draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(problems())
def test_any_problem_is_exact(problem):
    for pass_ in PASSES:
        assert_exact(problem, pass_)


@every_row
@every_pass
@pytest.mark.parametrize(
    "case",
    [
        dict(N=1, C=48, K=40, size=(9, 10), kernel=(3, 3), padding=(1, 1)),
        dict(N=1, C=520, K=33, size=(4, 5), kernel=(1, 1)),
        dict(N=1, C=33, K=520, size=(8, 5), kernel=(2, 3), stride=(2, 1), dilation=(1, 2)),
    ],
    ids=("3x3", "1x1", "strided"),
)
def test_bound(row, pass_, case):
    problem = Conv(**case, dtype=DTYPES[row["dtype"]], high=0)
    depth = 1 + problem.w.numel() // (problem.K if pass_ == "forward" else problem.C)
    reference = GemmReference(problem.reference(pass_), problem.reference(pass_, absolute=True), depth)
    flush = row["isa"] in ("avx512bf16", "amx")
    options = dict(flush_denormal=flush, precision=row["precision"])
    assert_within_bound(run(problem, pass_, kernel=row["name"]), reference, **options)


@every_pass
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_results_do_not_depend_on_threads(pass_, layout, dtype):
    cases = [
        dict(N=1, C=64, K=96, size=(14, 14), kernel=(3, 3), padding=(1, 1)),
        dict(N=3, C=40, K=40, size=(31, 18), kernel=(3, 3), stride=(2, 2)),
        dict(N=1, C=30, K=300, size=(900,), kernel=(5,), dilation=(7,)),
    ]
    for case in cases:
        problem = Conv(**case, dtype=dtype, layout=layout, high=0)
        one = run(problem, pass_, threads=1)
        for threads in (2, 3, 7):
            assert torch.equal(one, run(problem, pass_, threads=threads)), (case, threads)


ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@every_row
@every_pass
@pytest.mark.parametrize("layout", LAYOUTS)
def test_epilogue(row, pass_, layout):
    """activation(sum + bias) + residual, and what went into the activation."""
    dtype = DTYPES[row["dtype"]]
    case = dict(N=2, C=4, K=19, size=(7, 9), kernel=(3, 2), stride=(1, 2), dtype=dtype, layout=layout, high=1)
    problem = Conv(**case)
    z = problem.reference(pass_)
    g = torch.Generator().manual_seed(5)
    residual = lay(torch.randint(-3, 4, z.shape, generator=g).to(dtype), layout)
    for activation, function in ACTIVATIONS.items():
        pre = torch.full_like(residual, float("nan"))
        out = run(problem, pass_, kernel=row["name"], activation=activation, residual=residual, pre=pre)
        assert torch.equal(pre, z.to(dtype)), activation
        expected = function(z) + residual.double()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert bool(((out.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()), activation


@every_pass
def test_operands_of_any_strides(pass_):
    """Views with gaps, steps and swapped dimensions; gaps of what is written stay as they were."""
    problem = Conv(2, 5, 6, (8, 9), (3, 2), padding=(1, 1))
    expected = problem.reference(pass_).float()
    source, bias, shape = problem.operands(pass_)

    def gaps(x):
        big = torch.full([2 * n for n in x.shape], float("nan"))
        big[tuple(slice(None, None, 2) for _ in x.shape)] = x
        return big[tuple(slice(None, None, 2) for _ in x.shape)]

    swapped = source.transpose(2, 3).contiguous().transpose(2, 3)
    for a, w in itertools.product(
        (source, gaps(source), swapped), (problem.w, gaps(problem.w), lay(problem.w, "channels_last"))
    ):
        for channels_last in (False, True):
            home = torch.full([n + 2 for n in shape], float("nan"))
            out = lay(home, LAYOUTS[channels_last])[1:-1, 1:-1, 1:-1, 1:-1]
            CALL[pass_](out, a, w, gaps(bias), **problem.options)
            assert torch.equal(out, expected)
            out.fill_(float("nan"))
            assert bool(out._base.isnan().all()) if out._base is not None else True


@every_row
@every_pass
def test_frozen_packs(row, pass_):
    """A pack gives what the weight gives, whatever the sizes of the image."""
    if row["name"] != next(r["name"] for r in ROWS if r["available"] and r["dtype"] == row["dtype"]):
        pytest.skip("packs are laid out for the level's own row")
    dtype = DTYPES[row["dtype"]]
    kernel = dict(kernel=(3, 4), stride=(2, 3), padding=(1, 2), dilation=(1, 2), groups=2)
    for size in ((9, 12), (1, 7), (40, 30)):
        problem = Conv(2, 10, 70, size, **kernel, dtype=dtype, high=1)
        options = problem.options
        numel = _C.conv_pack_numel(pass_, list(problem.w.shape), **options, dtype=row["dtype"])
        pack = torch.full((numel,), float("nan"))
        _C.conv_pack(pack, pass_, problem.w, **options)
        assert torch.equal(run(problem, pass_, pack=pack), run(problem, pass_)), size
        with pytest.raises(RuntimeError, match="argument 'pack'"):
            run(problem, pass_, pack=pack[1:])


# --- plans ------------------------------------------------------------------------------------------------------------
PLANS = [
    ([8, 64, 56, 56], [64, 64, 3, 3], [8, 64, 56, 56], dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    ([1, 512, 7, 7], [512, 512, 3, 3], [1, 512, 7, 7], dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    ([1, 4096, 2000], [4096, 4096, 9], [1, 4096, 1992], dict(stride=[1], padding=[0], dilation=[1])),
    ([1, 64, 10**6], [64, 64, 10**5], [1, 64, 9 * 10**5 + 1], dict(stride=[1], padding=[0], dilation=[1])),
    ([1, 3, 4000, 4000], [8, 3, 900, 900], [1, 8, 3101, 3101], dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1])),
    ([1, 8, 10**6], [8, 8, 3], [1, 8, 200002], dict(stride=[1], padding=[0], dilation=[4 * 10**5 - 1])),
    ([1, 8, 9, 9, 9], [8, 8, 3, 3, 3], [1, 8, 9, 9, 9], dict(stride=[1] * 3, padding=[9] * 3, dilation=[9] * 3)),
    ([1, 8, 3000], [8, 8, 5], [1, 8, 3], dict(stride=[1000], padding=[0], dilation=[1])),
    ([1, 256, 64, 64], [256, 256, 31, 31], [1, 256, 64, 64], dict(stride=[1] * 2, padding=[15] * 2, dilation=[1] * 2)),
]


@every_pass
@pytest.mark.parametrize("dtype", DTYPES)
def test_workspace(pass_, dtype):
    """At most the packed weights, and 2 MiB a thread, on every level."""
    for (x, w, y, options), isa, threads in itertools.product(PLANS, ("scalar", "avx2", "avx512", "amx"), (1, 2, 64)):
        if _C.cpu_info()["isa"] != "scalar" or isa == "scalar":
            plan = _C.conv_plan(pass_, x, w, y, **options, dtype=dtype, isa=isa, threads=threads)
            assert plan["thread_bytes"] <= THREAD_BYTES, plan
            assert plan["workspace_bytes"] == plan["weight_bytes"] + plan["threads"] * plan["thread_bytes"]
            row = next(row for row in ROWS if row["name"] == plan["kernel"])
            taps, channels = torch.Size(w[2:]).numel(), (w[1], w[0])[pass_ == "dgrad"]
            columns = -(-(w[0], w[1])[pass_ == "dgrad"] // plan["nr"]) * plan["nr"]
            steps = -(-channels // row["k_step"]) * row["k_step"] // row["k_unit"] * row["planes"]
            peaks = columns * torch.Size(options["stride"]).numel()
            assert plan["weight_bytes"] <= 4 * (taps * steps * columns + peaks) + 4096


def test_plans_name_the_row_and_the_losers():
    x, w, y, options = PLANS[0]
    plan = _C.conv_plan("forward", x, w, y, **options, isa="scalar", threads=2)
    assert plan["kernel"] == "conv_f32_4x8_scalar" and plan["threads"] == 2
    assert any("needs avx2" in lost for lost in plan["candidates"]) or _C.cpu_info()["isa"] == "scalar"


def test_calls_are_counted():
    problem = Conv(1, 2, 3, (4, 5), (2, 2))
    for row in ROWS:
        if row["available"] and row["dtype"] == "float32":
            before = _C.counters()[row["name"]]
            run(problem, "forward", kernel=row["name"])
            assert _C.counters()[row["name"]] == before + 1


# --- inputs that must not hurt ----------------------------------------------------------------------------------------
def test_hostile_arguments():
    x, w, y = torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 3, 3), torch.full((1, 6, 6, 6), 7.0)
    fine = dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1])
    wrong = [
        (dict(stride=[0, 1]), "stride"), (dict(stride=[-1, 1]), "stride"), (dict(stride=[1]), "stride"),
        (dict(stride=[2**62, 1]), "stride"), (dict(stride=[1, 1, 1]), "stride"), (dict(padding=[-1, 0]), "padding"),
        (dict(padding=[2**31, 0]), "padding"), (dict(padding=[2**62, 0]), "padding"),
        (dict(dilation=[0, 1]), "dilation"),
        (dict(dilation=[2**62, 1]), "dilation"), (dict(dilation=[1, 2**61]), "dilation"), (dict(groups=0), "groups"),
        (dict(groups=-1), "groups"), (dict(groups=3), "groups"), (dict(groups=2), "weight"),
        (dict(threads=-1), "threads"),
        (dict(kernel="nothing"), "kernel"), (dict(activation="swish"), "activation"),
    ]  # fmt: skip
    for options, name in wrong:
        with pytest.raises(RuntimeError, match=rf"fastdl\.conv2d: .*{name}"):
            _C.conv(y, x, w, **(fine | options))
    tensors = [
        (y, x, w[:, :3], None, "weight"), (y, x, w[0], None, "weight"), (y, x[0, 0, 0], w, None, "input"),
        (y, x, w[:, :, :0], None, "weight"), (y, x, w, torch.zeros(5), "bias"), (y, x, w, torch.zeros(6, 1), "bias"),
        (y, x.half(), w, None, "weight"), (y, x.double(), w, None, "input"), (y[:, :, :5], x, w, None, "out"),
        (y.expand(2, 6, 6, 6), x.expand(2, 4, 8, 8), w, None, "out"),
        (y[..., ::2], x[..., :5], w, None, "out"), (x, x, torch.zeros(4, 4, 1, 1), None, "out"),
        (torch.empty(1, 6, 6, 6, device="meta"), x, w, None, "out"),
    ]  # fmt: skip
    for out, a, b, bias, name in tensors:
        with pytest.raises(RuntimeError, match=rf"argument '?{name}|argument 'out'"):
            _C.conv(out, a, b, bias, **fine)
    for args in ((None, x, w), (y, None, w), (y, x, 3)):
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
            _C.conv(*args, **fine)
    assert bool((y == 7).all())  # nothing was written
    huge = torch.empty(1).expand(1, 2**60, 1, 1)
    with pytest.raises(RuntimeError, match="fewer than 2"):
        _C.conv(torch.empty(1, 4, 1, 1), huge, torch.empty(1).expand(4, 2**60, 1, 1), **fine)


def test_zero_times_nan_is_nan():
    for layout in LAYOUTS:
        problem = Conv(1, 3, 4, (5, 5), (3, 3), padding=(1, 1), layout=layout)
        problem.x[0, 1, 2, 2] = float("nan")
        problem.w[2] = 0
        assert torch.equal(run(problem, "forward").isnan(), problem.reference("forward").isnan())
        problem.dy[0, 1, 4, 0] = float("inf")
        assert torch.equal(run(problem, "dgrad").isfinite(), problem.reference("dgrad").isfinite())


@pytest.mark.parametrize("isa", sorted({row["isa"] for row in ROWS}))
def test_guard_pages(isa, run_python):
    if not all(row["available"] for row in ROWS if row["isa"] == isa):
        pytest.skip(f"no {isa} here")
    run_python("guard_pages_conv.py", isa)


def test_guard_pages_do_kill(run_python):
    run_python("guard_pages.py", "--touch", status=-signal.SIGSEGV)


def test_gradient_of_another_rank_is_refused():
    for dx in (torch.zeros(()), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, 4, 4)):
        with pytest.raises(RuntimeError, match="argument 'out': expected 4 dimensions"):
            _C.conv_dgrad(
                dx, torch.zeros(2, 5, 3, 3), torch.zeros(5, 4, 2, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1)
            )
