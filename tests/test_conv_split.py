"""Convolution on tiles: which row runs, how exact it is, what parts of bfloat16 cannot hold."""

import ctypes
import math
import mmap

import pytest
import torch

from conftest import DTYPES
from conv_reference import LAYOUTS, Conv, lay
from fastdl import _C, functional, testing
from fastdl.testing import GemmReference

NAN, INF = math.nan, math.inf
MODES = {"none": "split", "ieee": "split", "tf32": "high", "bf16": "medium"}  # torch's switch -> the kernel's name
PASSES = ("forward", "dgrad", "wgrad")
CALL = {"forward": _C.conv, "dgrad": _C.conv_dgrad}
ROWS = [row for row in _C.kernels("conv") if row["isa"] == "amx"]
here = pytest.mark.skipif(_C.cpu_info()["isa"] != "amx", reason="level amx is not in use")
# Sizes that tiles are for: several blocks of channels, pixels and columns, none of them full.
CASE = dict(N=2, C=70, K=75, size=(9, 11), kernel=(3, 3), padding=(1, 1))


def rows(kind, **wanted):
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(r, id=r["name"], marks=pytest.mark.skipif(not r["available"], reason=r["reason"] or "-"))
            for r in ROWS
            if r["kind"] == kind and all(r[k] in v for k, v in wanted.items())
        ],
    )


split_rows = rows("dense", dtype=("float32",))
split_wgrad = rows("wgrad", dtype=("float32",))


@pytest.fixture
def switch():
    """switch(value): torch.backends.mkldnn.conv.fp32_precision, put back afterwards."""
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    yield lambda value: setattr(conv, "fp32_precision", value)
    conv.fp32_precision = before


@pytest.fixture
def recomputed():
    """recomputed(): elements computed again since the last look."""
    last = [_C.recomputed()]

    def look():
        last[0], before = _C.recomputed(), last[0]
        return last[0] - before

    return look


def run(problem, pass_, **options):
    """What the kernel writes, into NaN, without a bias."""
    if pass_ == "wgrad":
        out = lay(torch.full_like(problem.w, NAN), problem.layout)
        read = lay(problem.dy, problem.layout), lay(problem.x, problem.layout)
        _C.conv_wgrad(out, *read, **problem.options, **options)
        return out
    source, _, shape = problem.operands(pass_)
    out = lay(torch.full(shape, NAN, dtype=problem.dtype), problem.layout)
    CALL[pass_](out, lay(source, problem.layout), lay(problem.w, problem.layout), **problem.options, **options)
    return out


def reference(problem, pass_):
    """float64, of the values and of their sizes, which are finite where the former are."""
    operands = {"forward": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}[pass_]
    depth = {"forward": problem.w[0].numel(), "dgrad": problem.w[:, 0].numel(), "wgrad": problem.dy[:, 0].numel()}

    def compute(change):
        like = (problem.x.double(), problem.w.double(), problem.dy.double())
        given = [change(getattr(problem, name).double()) for name in operands]
        args = (problem.stride, problem.padding, problem.dilation)
        n = len(problem.size)
        if pass_ == "forward":
            return torch.ops.aten.convolution(*given, None, *args, False, [0] * n, problem.groups)
        dy, x, w = given[0], given[1] if pass_ == "wgrad" else like[0], given[1] if pass_ == "dgrad" else like[1]
        mask = [pass_ == "dgrad", pass_ == "wgrad", False]
        out = torch.ops.aten.convolution_backward(dy, x, w, None, *args, False, [0] * n, problem.groups, mask)
        return out[0 if pass_ == "dgrad" else 1]

    return GemmReference(compute(lambda t: t), compute(torch.abs), depth[pass_])


def problem_of(case, dtype=torch.float32, layout="channels_last", seed=1):
    return Conv(**case, dtype=dtype, layout=layout, seed=seed, high=0)


def before_a_wall(x):
    """A copy of x as it lies, behind whose last byte nothing may be read."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + whole), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=whole - size)
    return copy.as_strided(x.shape, x.stride()).copy_(x)


# --- which row --------------------------------------------------------------------------------------------------------
def plan(pass_, x, w, y, dtype="float32", **options):
    n = len(x) - 2
    geometry = dict(stride=[1] * n, padding=[w[2] // 2] * n, dilation=[1] * n)
    return _C.conv_plan(pass_, x, w, y, **geometry, dtype=dtype, threads=2, **options)


@pytest.mark.parametrize("pass_", PASSES)
def test_plans_of_machines_with_tiles(pass_):
    shape = [8, 256, 14, 14], [256, 256, 3, 3], [8, 256, 14, 14]
    kind = "wgrad_" if pass_ == "wgrad" else ""
    for dtype, short in (("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32_split")):
        if not any(r["name"] == f"conv_{kind}{short}_32x32_amx" for r in ROWS):
            pytest.skip("this build has no level amx")
        made = plan(pass_, *shape, dtype, isa="amx")
        assert made["kernel"] == f"conv_{kind}{short}_32x32_amx"
        assert "amx" not in plan(pass_, *shape, dtype, isa="avx512bf16")["kernel"]
        beside = [lost for lost in made["candidates"] if "estimated at" in lost]
        assert beside and all(float(lost.split("estimated at ")[1].split()[0]) > 1 for lost in beside)
    for precision, name in (("tf32", "high"), ("bf16", "medium"), ("ieee", "split")):
        made = plan(pass_, *shape, isa="amx", precision=precision)
        assert made["kernel"] == f"conv_{kind}f32_{name}_32x32_amx"
    exact = plan(pass_, *shape, isa="amx", precision="fma")
    assert exact["kernel"] == ("conv_wgrad_f32_14x32_avx512" if kind else "conv_f32_6x64_avx512")
    assert any(lost.endswith("less exact than asked") for lost in exact["candidates"])
    # One channel of 32, and a handful of pixels.
    for x, w, y in (
        ([8, 1, 50, 50], [64, 1, 1, 1], [8, 64, 50, 50]),
        ([1, 256, 1, 2], [256, 256, 1, 1], [1, 256, 1, 2]),
    ):
        few = plan(pass_ if pass_ != "dgrad" else "forward", x, w, y, isa="amx")
        assert "amx" not in few["kernel"] and few["why"] == "too few channels or pixels to pay for tiles"
        assert any("split" in lost and "estimated at" in lost for lost in few["candidates"])


@here
@pytest.mark.parametrize("mode", MODES)
def test_torchs_switch(mode, switch, generator):
    switch(mode)
    x, w = (torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 64, 14, 14), (64, 64, 3, 3)))
    _C.reset_counters()
    functional.conv2d(x, w, padding=1).sum().backward()
    ran = {name for name, calls in _C.counters().items() if calls and name.startswith("conv")}
    assert ran == {f"conv_f32_{MODES[mode]}_32x32_amx", f"conv_wgrad_f32_{MODES[mode]}_32x32_amx"}


@here
def test_fma_where_it_is_asked_for(run_python):
    code = (
        "import torch, fastdl\n"
        "x = torch.ones(2, 64, 14, 14)\n"
        "fastdl.functional.conv2d(x, torch.ones(64, 64, 3, 3))\n"
        "print(*[k for k, n in fastdl._C.counters().items() if n and k.startswith('conv')])\n"
    )
    assert run_python("-c", code, env={"FASTDL_FLOAT32": "ieee"}).split() == ["conv_f32_6x64_avx512"]


# --- how exact --------------------------------------------------------------------------------------------------------
@rows("dense")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tails_of_tiles(row, layout):
    """Around 32 channels, 16 and 32 pixels of a row, and 512 summed; rows of tiles that cross rows of the image."""
    dtype, name = DTYPES[row["dtype"]], row["name"]
    cases = [Conv(1, c, 3, (2, 9), (1, 3), padding=(0, 1), dtype=dtype, layout=layout) for c in (31, 32, 33, 64, 65)]
    cases += [Conv(1, 32, 33, (1, n), (1, 1), dtype=dtype, layout=layout, high=1) for n in (15, 16, 17, 31, 33, 49)]
    cases += [Conv(2, c, 5, (3, 5), (1, 1), dtype=dtype, layout=layout, high=1) for c in (511, 512, 513, 545)]
    cases += [Conv(3, 64, 40, (7, 7), (1, 1), stride=(s, s), dtype=dtype, layout=layout) for s in (1, 2)]
    for problem in cases:
        for pass_ in CALL:
            expected = reference(problem, pass_).expected.to(dtype)
            assert torch.equal(run(problem, pass_, kernel=name), expected), (problem, pass_)


FEW = [
    dict(N=2, C=3, K=40, size=(19, 37), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    dict(N=1, C=1, K=33, size=(173,), kernel=(10,), stride=(5,), padding=(4,)),
    dict(N=1, C=31, K=31, size=(5, 18), kernel=(1, 3), padding=(0, 2)),
    dict(N=2, C=5, K=7, size=(3, 4, 21), kernel=(2, 2, 4), stride=(1, 2, 3), groups=1),
    dict(N=1, C=4, K=6, size=(40,), kernel=(12,), dilation=(2,)),
]


@rows("dense")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_channels(row, layout):
    """Taps along the width share a tile; values computed again in them."""
    for case in FEW:
        problem = Conv(**case, dtype=DTYPES[row["dtype"]], layout=layout)
        for pass_ in CALL:
            expected = reference(problem, pass_).expected.to(problem.dtype)
            assert torch.equal(run(problem, pass_, kernel=row["name"]), expected), (case, pass_)
            if row["precision"] != "ieee":
                continue
            tiny = problem_of(case, layout=layout)
            source, _, _ = tiny.operands(pass_)
            source[:, 0] *= 2.0**-30
            source *= 2.0**-105
            source[0, -1].view(-1)[2] = NAN
            ref = reference(tiny, pass_)
            error = check_special(run(tiny, pass_, kernel=row["name"]), tiny, pass_, ref, "ieee")
            some = ref.expected.isfinite() & (ref.scale > 2.0**-120)
            assert bool((error / ref.scale < 1e-5)[some].all()), (case, pass_)


@here
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_packs_of_few_channels(dtype):
    problem = Conv(2, 3, 256, (19, 37), (7, 7), stride=(2, 2), padding=(3, 3), dtype=DTYPES[dtype])
    problem.w[3] *= 2.0**-110 if dtype == "float32" else 1
    shapes = [list(t.shape) for t in (problem.x, problem.w, problem.dy)]
    options = problem.options
    assert "amx" in _C.conv_plan("forward", *shapes, **options, dtype=dtype, frozen=True)["kernel"]
    pack = torch.full((_C.conv_pack_numel("forward", shapes[1], **options, dtype=dtype),), NAN)
    _C.conv_pack(pack, "forward", problem.w, **options)
    expected = reference(problem, "forward").expected
    problem.w = torch.zeros_like(problem.w)
    out = run(problem, "forward", pack=pack)
    assert torch.equal(out, expected.to(problem.dtype))


@rows("wgrad")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tails_of_tiles_wgrad(row, layout):
    """Around 32 pixels and channels, and a block of pixels, in rows that are and are not one run in memory."""
    dtype, name = DTYPES[row["dtype"]], row["name"]
    cases = [Conv(1, c, 33, (3, 11), (1, 1), dtype=dtype, layout=layout) for c in (15, 16, 17, 31, 32, 33, 65)]
    cases += [Conv(1, 17, c, (3, 11), (2, 3), padding=(1, 1), dtype=dtype, layout=layout) for c in (1, 16, 17, 64, 65)]
    cases += [Conv(1, 5, 7, (n,), (1,), dtype=dtype, layout=layout, high=1) for n in (31, 32, 33, 255, 257, 513, 1100)]
    cases += [Conv(3, 33, 9, (7, 9), (3, 3), stride=(2, 2), padding=(1, 1), dtype=dtype, layout=layout)]
    for problem in cases:
        expected = reference(problem, "wgrad").expected.to(dtype)
        assert torch.equal(run(problem, "wgrad", kernel=name), expected), problem


@rows("dense", dtype=("float16",))
def test_float16_products_are_complete(row):
    """(1 + 3e)(1 + 3e) - (1 + 6e): what is left is the product of the low parts."""
    e = 2.0**-10
    problem = Conv(1, 2, 3, (4,), (1,), dtype=torch.float16)
    problem.x[:, 0], problem.x[:, 1] = 1 + 3 * e, -(1 + 6 * e)
    problem.w[:, 0], problem.w[:, 1] = 1 + 3 * e, 1
    assert bool((run(problem, "forward", kernel=row["name"]) == 9 * e * e).all())


@here
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(pass_, dtype):
    problem = problem_of(dict(N=3, C=96, K=80, size=(13, 14), kernel=(3, 3)), DTYPES[dtype])
    problem.x[0] *= 2.0**-120  # what is computed again does not depend on them either
    _C.reset_counters()
    one = run(problem, pass_, threads=1)
    assert any(n and "conv" in k and "amx" in k for k, n in _C.counters().items())
    for threads in (2, 3, 7):
        assert torch.equal(one, run(problem, pass_, threads=threads)), threads


# --- what parts cannot hold -------------------------------------------------------------------------------------------
def special_bound(problem, pass_, ref, precision):
    a, b = {"forward": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}[pass_]
    most = sum(t[t.abs() < 1e30].abs().max().double() for t in (getattr(problem, a), getattr(problem, b)))
    exact = testing.gemm_bound(ref.depth, ref.scale, ref.expected, torch.float32, precision=precision)
    return exact + ref.depth * 2.0**-126 * most


def check_special(out, problem, pass_, ref, precision):
    testing.assert_special_values(out, ref.expected)
    finite = ref.expected.float().isfinite()
    error = (out.double() - ref.expected).abs()
    assert bool((error <= special_bound(problem, pass_, ref, precision))[finite].all())
    return error


@split_rows
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pass_", CALL)
def test_special_and_tiny_values(row, pass_, layout, recomputed):
    """Pixels and columns that hold what parts cannot, beside ordinary ones; frozen too."""
    problem = problem_of(CASE | dict(stride=(1, 2)), layout=layout)
    source, _, _ = problem.operands(pass_)
    columns = problem.w if pass_ == "forward" else problem.w.transpose(0, 1)
    source[1, :, 5:] *= 2.0**-120  # all that some pixels meet is tiny
    source[0, 3, 1, 1], source[0, 60, 1, 2], source[1, 2, 0, 4] = INF, NAN, -INF
    if row["precision"] != "bf16":
        source[0, 5, 6, 3] = 3.4e38  # rounds to Inf in bfloat16
    columns[3] *= 2.0**-110
    columns[40] *= 2.0**-60
    columns[64] = 0
    columns[17, 5, 1, 1] = 2.0**-140  # next to ordinary ones: does not matter
    ref = reference(problem, pass_)
    recomputed()
    out = run(problem, pass_, kernel=row["name"])
    error = check_special(out, problem, pass_, ref, row["precision"])
    assert 0 < recomputed() < 0.6 * out.numel()
    tiny = (ref.scale > 2.0**-126) & (ref.scale < 2.0**-100) & ref.expected.isfinite()
    assert int(tiny.sum()) > 100
    assert bool(((error / ref.scale)[tiny] < 2e-6).all()), "tiny sums are as exact as any"


@here
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pass_", CALL)
def test_frozen_packs_in_every_mode(mode, pass_, switch):
    """The pack is read, tiny columns included; under another precision the weight is read instead."""
    switch(mode)
    problem = problem_of(CASE | dict(stride=(2, 1)))
    columns = problem.w if pass_ == "forward" else problem.w.transpose(0, 1)
    columns[3] *= 2.0**-110
    source, _, _ = problem.operands(pass_)
    source[1] *= 2.0**-5
    source[0, 60, 1, 2] = NAN
    numel = _C.conv_pack_numel(pass_, list(problem.w.shape), **problem.options)
    pack = torch.full((numel,), NAN)
    _C.conv_pack(pack, pass_, problem.w, **problem.options)
    expected = run(problem, pass_)
    ref = reference(problem, pass_)
    problem.w = torch.zeros_like(problem.w)
    frozen = run(problem, pass_, pack=pack)
    problem.w[:] = 1
    error = check_special(frozen, problem, pass_, ref, {"split": "ieee", "high": "tf32", "medium": "bf16"}[MODES[mode]])
    assert bool((error / ref.scale)[:, 3][~frozen[:, 3].isnan()].max() < 2.0**-6)
    same = torch.ones(expected.shape[1], dtype=torch.bool)
    same[3] = False  # computed again, from what the pack still knows
    assert torch.equal(frozen.isnan(), expected.isnan())
    assert torch.equal(frozen[1:, same], expected[1:, same])
    switch("tf32" if mode == "bf16" else "bf16")
    problem.w[:] = 0
    assert bool((run(problem, pass_, pack=pack)[1:] == 0).all()), "another precision must not read the pack"


@split_wgrad
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(9, 11), (60, 64)], ids=("one chunk", "chunks"))
def test_special_and_tiny_values_wgrad(row, layout, size, recomputed):
    problem = problem_of(CASE | dict(size=size, padding=(0, 0)), layout=layout)
    x, dy = problem.x, problem.dy
    x[:, 33] *= 2.0**-115
    x[0, 33] = 0  # all of the first chunk, where there are several
    x[:, 34] *= 2.0**-60
    dy[:, 66] *= 2.0**-50
    dy[:, 9] *= 2.0**-120
    x[:, 5] = 0
    x[0, 7, 4, 4], dy[1, 70, 2, 3] = INF, NAN
    if row["precision"] != "bf16":
        x[1, 69, 5, 5] = 3.4e38  # rounds to Inf in bfloat16
    ref = reference(problem, "wgrad")
    recomputed()
    out = run(problem, "wgrad", kernel=row["name"])
    error = check_special(out, problem, "wgrad", ref, row["precision"])
    assert 0 < recomputed() < out.numel() / 4
    tiny = (ref.scale > 2.0**-126) & (ref.scale < 2.0**-100) & ref.expected.isfinite()
    assert int(tiny.sum()) > 100
    assert bool(((error / ref.scale)[tiny] < 2e-6).all()), "tiny sums are as exact as any"


ANYWHERE = {
    "dilated": dict(N=1, C=9, K=40, size=(12, 13), kernel=(3, 2), padding=(2, 5), dilation=(2, 3), stride=(3, 2)),
    "groups": dict(N=2, C=10, K=70, size=(6, 7), kernel=(3, 3), padding=(1, 1), groups=2),
    "cubes": dict(N=2, C=5, K=33, size=(3, 5, 6), kernel=(3, 2, 3), padding=(1, 0, 1), stride=(2, 1, 1)),
    "long": dict(N=1, C=300, K=3, size=(30,), kernel=(5,), padding=(2,)),
}


@pytest.mark.parametrize("case", ANYWHERE)
@rows("dense", precision=("ieee",))
def test_computed_again_of_any_shape(row, case, recomputed):
    """Every element of a tiny image, and those that meet an Inf."""
    for layout in LAYOUTS:
        for pass_ in CALL:
            problem = problem_of(ANYWHERE[case], layout=layout)
            source, _, _ = problem.operands(pass_)
            source *= 2.0**-105
            source[0, 2].view(-1)[source[0, 2].numel() // 2] = INF
            ref = reference(problem, pass_)
            recomputed()
            error = check_special(run(problem, pass_, kernel=row["name"]), problem, pass_, ref, "ieee")
            assert recomputed() > 0
            some = ref.expected.isfinite() & (ref.scale > 0)
            assert bool((error / ref.scale < 1e-5)[some].all()), pass_


@pytest.mark.parametrize("case", ANYWHERE)
@rows("wgrad", precision=("ieee",))
def test_computed_again_of_any_shape_wgrad(row, case):
    for layout in LAYOUTS:
        problem = problem_of(ANYWHERE[case], layout=layout)
        problem.dy *= 2.0**-105
        ref = reference(problem, "wgrad")
        error = check_special(run(problem, "wgrad", kernel=row["name"]), problem, "wgrad", ref, "ieee")
        assert bool((error / ref.scale < 1e-5)[ref.scale > 0].all())


@split_wgrad
def test_bias_gradient_of_special_and_tiny_values(row):
    problem = problem_of(CASE)
    problem.dy[:, 4] *= 2.0**-120
    problem.dy[1, 40, 3, 3], problem.dy[0, 41, 0, 0] = INF, NAN
    db = torch.full((problem.K,), NAN)
    out = torch.empty_like(problem.w)
    _C.conv_wgrad(out, problem.dy, problem.x, dbias=db, kernel=row["name"], **problem.options)
    expected = problem.dy.double().sum((0, 2, 3))
    testing.assert_special_values(db, expected)
    finite, scale = expected.isfinite(), problem.dy.double().abs().sum((0, 2, 3))
    limit = {"ieee": 1e-6, "tf32": 2.0**-16, "bf16": 2.0**-8}[row["precision"]]
    relative = ((db.double() - expected).abs() / scale)[finite]
    assert bool((relative < limit).all())
    assert abs(db[4].double() - expected[4]) < 1e-6 * scale[4]


@here
@pytest.mark.parametrize("pass_", PASSES)
def test_ordinary_values_are_not_recomputed(pass_, recomputed):
    """Zeros, as ReLU leaves them, and wide ranges are ordinary."""
    problem = problem_of(CASE)
    problem.x.relu_()
    problem.x[0] = 0
    problem.x[1, :, ::2] *= 2.0**-130
    problem.w[3] = 0
    recomputed()
    run(problem, pass_)
    assert recomputed() == 0


@rows("dense", dtype=("float16",))
def test_float16_special_values(row):
    problem = problem_of(CASE, torch.float16)
    problem.x[0, 3, 1, 1], problem.x[1, 60, 4, 2], problem.w[9, 2, 1, 1] = INF, NAN, -INF
    ref = reference(problem, "forward")
    testing.assert_special_values(run(problem, "forward", kernel=row["name"]), ref.expected)


@rows("wgrad", dtype=("float16",))
def test_float16_special_values_wgrad(row):
    problem = problem_of(CASE | dict(padding=(0, 0)), torch.float16)
    problem.x[0, 3, 4, 4], problem.dy[1, 60, 4, 2] = INF, NAN
    ref = reference(problem, "wgrad")
    testing.assert_special_values(run(problem, "wgrad", kernel=row["name"]), ref.expected)


@pytest.mark.parametrize("taps", (1, 3))
@pytest.mark.parametrize("size", ((1, 3), (3, 7), (5, 8)), ids=str)
@rows("dense", dtype=("bfloat16", "float32"))
def test_nothing_behind_an_image_is_read(row, size, taps):
    case = dict(N=1, C=64, K=40, size=size, kernel=(taps, taps), padding=(taps // 2,) * 2)
    problem = problem_of(case, DTYPES[row["dtype"]])
    x, w = lay(problem.x, "channels_last"), lay(problem.w, "channels_last")
    y = lay(torch.full_like(problem.dy, NAN), "channels_last")
    _C.conv(y, before_a_wall(x), before_a_wall(w), **problem.options, kernel=row["name"])
    assert torch.equal(y, run(problem, "forward", kernel=row["name"]))
