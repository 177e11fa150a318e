"""float32 and float16 in parts of bfloat16 on tiles: which kernel runs, how exact it is, what it cannot hold."""

import math

import pytest
import torch
from click.testing import CliRunner

import fastdl
from conftest import DTYPES, b_for
from fastdl import _C, functional, testing
from fastdl.cli import main
from fastdl.testing import LAYOUTS

NAN, INF = math.nan, math.inf
MODES = {"none": "split", "ieee": "split", "tf32": "high", "bf16": "medium"}  # torch's switch -> the kernel's name
EMULATED = _C.build_info()["amx_emulated"]
here = pytest.mark.skipif(_C.cpu_info()["isa"] != "amx", reason="level amx is not in use")
split_rows = pytest.mark.rows(dtype="float32", precision=("ieee", "tf32", "bf16"))


@pytest.fixture
def switch():
    """switch(value): torch.backends.mkldnn.matmul.fp32_precision, put back afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield lambda value: setattr(matmul, "fp32_precision", value)
    matmul.fp32_precision = before


@pytest.fixture
def recomputed():
    """recomputed(): elements computed again since the last look."""
    last = [_C.recomputed()]

    def look():
        last[0], before = _C.recomputed(), last[0]
        return last[0] - before

    return look


def run(kernel, a, b, bias=None, threads=0):
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)
    _C.gemm(out, a, b, bias, kernel=kernel["name"], threads=threads)
    return out


# --- the tile unit ----------------------------------------------------------------------------------------------------
def tile_product(a, b):
    """a [16, 32] times b [32, 16] as the manual has it: even and odd products summed apart, then together."""
    sums = torch.zeros(2, 16, 16)
    for k in range(32):  # products are exact in float64, and so is the sum before it is rounded
        product = a[:, k : k + 1].double() * b[k].double()
        sums[k % 2] = (sums[k % 2].double() + product).float()
    return sums[0] + sums[1]


@pytest.mark.rows(dtype="float32", precision="bf16")
def test_order_of_a_tile_product(kernel, generator):
    for scale in (1.0, 1e3, 1e-3):
        a, b = (torch.randn(s, generator=generator).mul(scale).bfloat16().float() for s in ((16, 32), (32, 16)))
        assert torch.equal(run(kernel, a, b), tile_product(a, b))


# --- which kernel -----------------------------------------------------------------------------------------------------
def planned(M, N=1024, K=1024, **options):
    return _C.gemm_plan(M, N, K, b_strides=(1, K), isa="amx", threads=2, **options)


needs_amx_rows = pytest.mark.skipif("amx" not in _C.build_info()["isa_compiled"], reason="this build has no level amx")


@needs_amx_rows
def test_precision_asked_is_precision_given():
    for precision, name in (("fma", "14x32_avx512"), ("ieee", "split"), ("tf32", "high"), ("bf16", "medium")):
        plan = planned(512, precision=precision)
        assert name in plan["kernel"]
        lost = {line.split(":")[0]: line for line in plan["candidates"]}
        if precision == "ieee":
            assert "less exact" in lost["gemm_f32_high_64x32_amx"] and "less exact" in lost["gemm_f32_medium_64x32_amx"]
            assert "times the time" in lost["gemm_f32_14x32_avx512"]
        assert planned(512, precision=precision, dtype="bfloat16")["kernel"] == "gemm_bf16_64x32_amx"
        assert "amx" not in _C.gemm_plan(512, 512, 512, isa="avx512", precision=precision)["kernel"]
    with pytest.raises(RuntimeError, match=r"precision.*high"):
        planned(512, precision="high")


@needs_amx_rows
def test_few_rows_are_left_to_fma():
    """One crossover, lower for fewer parts; bfloat16, whose weights are read as they lie, from two rows on."""
    first = {}
    for precision, dtype in (("ieee", "float32"), ("tf32", "float32"), ("bf16", "float32"), ("ieee", "bfloat16")):
        isa = [planned(M, precision=precision, dtype=dtype)["isa"] == "amx" for M in range(1, 129)]
        first[precision, dtype] = isa.index(True) + 1
        assert isa == sorted(isa)
    assert 16 < first["ieee", "float32"] <= 64
    assert first["bf16", "float32"] <= first["tf32", "float32"] <= first["ieee", "float32"]
    assert first["ieee", "bfloat16"] == 2
    lost = dict(line.split(": ", 1) for line in planned(1)["candidates"])
    assert lost["gemm_f32_split_64x32_amx"].startswith("few rows or columns")


@here
@pytest.mark.parametrize("mode", MODES)
def test_torch_switch_chooses(mode, switch, generator):
    x, w = (torch.randn(s, generator=generator) for s in ((200, 240), (220, 240)))
    switch(mode)
    _C.reset_counters()
    leaf = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = functional.linear(*leaf)
    dy = torch.randn(200, 220, generator=generator)
    dx, dw = torch.autograd.grad(y, leaf, dy)
    ran = {name: n for name, n in _C.counters().items() if n}
    assert set(ran) == {f"gemm_f32_{MODES[mode]}_64x32_amx"} and sum(ran.values()) == 3
    precision = "ieee" if MODES[mode] == "split" else mode
    for out, a, b in ((y.detach(), x, w.t()), (dx, dy, w), (dw, dy.t(), x)):
        testing.assert_gemm_close(out, a, b, precision=precision)
        assert MODES[mode] != "medium" or not torch.equal(out, (a.double() @ b.double()).float())
    c = functional.matmul(x, w.t())
    assert torch.equal(c, y.detach())


@here
def test_legacy_switch(run_python):
    code = (
        "import torch, fastdl\n"
        "x = torch.ones(256, 256)\n"
        "for name in ('high', 'medium', 'highest'):\n"
        "    torch.set_float32_matmul_precision(name)\n"
        "    print(fastdl._C.linear_plan(x.clone(), x, x)['kernel'].split('_')[2])\n"
    )
    assert run_python("-c", code).split() == ["high", "medium", "split"]
    assert run_python("-c", code, env={"FASTDL_FLOAT32": "ieee"}).split() == ["14x32"] * 3


def test_unknown_setting_is_an_error(run_python):
    message = "FASTDL_FLOAT32: expected ieee, got 'fast'"
    code = f"""
try:
    import fastdl
    fastdl._C.cpu_info()
except RuntimeError as error:
    assert {message!r} in str(error)
else:
    raise SystemExit("no error")
"""
    run_python("-c", code, env={"FASTDL_FLOAT32": "fast"})


@here
def test_autocast_is_bfloat16(generator):
    x, w = (torch.randn(s, generator=generator) for s in ((70, 90), (100, 90)))
    _C.reset_counters()
    with torch.autocast("cpu"):
        y = functional.linear(x, w)
    assert y.dtype == torch.bfloat16 and _C.counters()["gemm_bf16_64x32_amx"] == 1


# --- how exact --------------------------------------------------------------------------------------------------------
@pytest.mark.rows(dtype="float32", precision="ieee")
@pytest.mark.parametrize("K", [512, 8192, 16384, 32768])
@pytest.mark.parametrize("positive", [False, True], ids=["random", "positive"])
def test_long_sums_are_no_worse_than_torch(kernel, K, positive, generator):
    fill = torch.rand if positive else torch.randn
    a, b = (fill(s, generator=generator) for s in ((40, K), (K, 50)))
    testing.assert_gemm_close(run(kernel, a, b), a, b)


@split_rows
def test_parts_hold_a_float32(kernel, recomputed, generator):
    """Times one: the parts and nothing else. Three parts give every normal float32 back bit for bit."""
    bits = torch.randint(0, 2**31, (64, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.where((x.abs() > 2.0**-60) & x.isfinite(), x, torch.ones_like(x))
    x[0, :4] = torch.tensor([3.4028234e38, -3.4028234e38, 3.39e38, 1 + 2.0**-23])
    recomputed()
    results = run(kernel, x, torch.eye(64)), run(kernel, torch.eye(64), b_for(kernel, x))
    if (
        kernel["precision"] != "tf32"
    ):  # of the largest, two parts sum to more than float32 holds: that is computed again
        assert recomputed() == 0, "finite values must stay finite in parts"
    for out in results:
        error = ((out.double() - x.double()) / x.double()).abs().max()
        assert error <= {"ieee": 0, "tf32": 2.0**-16, "bf16": 2.0**-8 + 2.0**-9}[kernel["precision"]], error


@pytest.mark.rows(dtype="float16", isa="amx")
def test_float16_products_are_complete(kernel):
    """(1 + 3e)(1 + 3e) - (1 + 6e): what is left is the product of the low parts."""
    e = 2.0**-10
    a = torch.tensor([1 + 3 * e, -(1 + 6 * e)]).half().expand(20, 2).contiguous()
    b = torch.tensor([[1 + 3 * e], [1.0]]).half().expand(2, 20).contiguous()
    assert bool((run(kernel, a, b) == 9 * e * e).all())


# --- what it cannot hold ----------------------------------------------------------------------------------------------
def hostile(generator, M=70, N=75, K=600):
    """Rows and columns that hold what parts cannot, beside ordinary ones."""
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    a[7] *= 2.0**-120  # tiny
    a[8] *= 2.0**-60  # tiny times tiny
    a[9] = 0
    a[33, 599], a[34, 0], a[69, 300] = INF, NAN, -INF
    a[40, 5] = 3.4e38  # rounds to Inf in bfloat16
    b[5] *= 0.1
    b[:, 3] *= 2.0**-110
    b[:, 40] *= 2.0**-50
    b[:, 64] = 0
    b[17, 74], b[18, 60] = -INF, NAN
    b[100, 30] = 2.0**-140  # next to ordinary ones: does not matter
    return a, b


def special_bound(reference, a, b, precision):
    K = a.shape[1]
    parts = K * 2.0**-126 * (a.abs().amax(1, keepdim=True).double() + b.abs().amax(0, keepdim=True).double())
    return (
        testing.gemm_bound(reference.depth, reference.scale, reference.expected, torch.float32, precision=precision)
        + parts
    )


@split_rows
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "both_strided"])
def test_special_and_tiny_values(kernel, layout, threads, recomputed, generator):
    a, b = hostile(generator)
    reference = testing.gemm_reference(a, b)
    bias = torch.randn(75, generator=generator)
    recomputed()
    out = run(kernel, LAYOUTS[layout](a), LAYOUTS[layout](b), threads=threads)
    testing.assert_special_values(out, reference.expected)
    finite = reference.expected.isfinite()
    error = (out.double() - reference.expected).abs()
    assert bool((error <= special_bound(reference, a, b, kernel["precision"]))[finite].all())
    # Rows 7, 33, 34, 69, columns 3, 60, 74, and row 8 against column 40: not the rest of the tiles they are in.
    again = recomputed()
    assert 0 < again < out.numel() / 4, again
    normal = (reference.scale > 2.0**-110) & finite
    relative = (error / reference.scale)[7][normal[7]]
    assert bool((relative < 1e-6).all()), "a tiny row is as exact as any"
    beside = run(kernel, a, b, bias, threads=threads)
    testing.assert_special_values(beside, reference.expected + bias.double())
    pack = torch.empty(_C.pack_numel(*b.shape, kernel["name"]))
    _C.pack(pack, LAYOUTS[layout](b), kernel["name"])
    frozen = torch.empty_like(out)
    _C.linear_packed(frozen, a, pack, None, b.shape[1], kernel["name"], threads)
    testing.assert_special_values(frozen, reference.expected)
    error = (frozen.double() - reference.expected).abs()
    assert bool((error <= special_bound(reference, a, b, kernel["precision"]))[finite].all())


@split_rows
def test_tiny_against_large(kernel, generator):
    """Products of ordinary size whose one side is lost in parts."""
    a, b = torch.randn(40, 50, generator=generator) * 2.0**-115, torch.randn(50, 45, generator=generator) * 2.0**100
    for x, y in ((a, b), (b.t(), a.t())):
        testing.assert_within_bound(run(kernel, x, y), testing.gemm_reference(x, y))


@split_rows
def test_ordinary_values_are_not_recomputed(kernel, recomputed, generator):
    """Zeros, a softmax with tiny values, and wide ranges within rows are ordinary."""
    a, b = torch.randn(40, 300, generator=generator), torch.randn(300, 50, generator=generator)
    a[3], b[:, 4] = 0, 0
    a[5] = torch.softmax(40 * a[5], 0)
    a[6, ::2] *= 2.0**-130
    recomputed()
    run(kernel, a, b)
    assert recomputed() == 0


@split_rows
def test_pairs_are_recomputed_as_a_whole(kernel, recomputed, generator):
    """linear_wgrad over leading dimensions that do not merge: several products summed into one."""
    if not kernel["available"] or kernel["precision"] != "ieee":
        pytest.skip("linear_wgrad takes the default row")
    grad, x = torch.randn(300, 3, 200, generator=generator), torch.randn(3, 300, 250, generator=generator)
    grad, x = grad.transpose(0, 1), x.transpose(0, 1).contiguous().transpose(0, 1)
    grad[:, :, 5] *= 2.0**-120
    grad[1, 2, 7] = INF
    out = torch.empty(200, 250)
    recomputed()
    _C.linear_wgrad(out, grad, x)
    assert recomputed() == 2 * 250, "rows 5 and 7, of a kernel of parts"
    reference = testing.gemm_reference(grad.reshape(-1, 200).t(), x.reshape(-1, 250))
    testing.assert_special_values(out, reference.expected)
    relative = ((out.double() - reference.expected).abs() / reference.scale)[5]
    assert bool((relative < 1e-6).all())


@here
def test_explain_counts_recomputed_elements(generator):
    model = fastdl.optimize(torch.nn.Sequential(torch.nn.Linear(256, 192)))
    x = torch.randn(200, 256, generator=generator)
    assert "recomputed" not in fastdl.explain(model, x).rows[0].reason
    x[3] *= 2.0**-120
    assert fastdl.explain(model, x).rows[0].reason == "192 elements recomputed by FMA: Inf, NaN or tiny values"


# --- frozen -----------------------------------------------------------------------------------------------------------
@here
@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_in_every_mode(mode, switch, generator):
    """A pack is for one precision; under another the weight is read instead, and for few rows where that is faster."""
    switch(mode)
    model = fastdl.optimize(torch.nn.Sequential(torch.nn.Linear(240, 220)))
    x = torch.randn(200, 240, generator=generator)
    with torch.no_grad():
        expected = model(x)
        fastdl.freeze(model)
        assert MODES[mode] in model[0]._pack.kernel
        assert torch.equal(model(x), expected)
        model[0].weight.zero_()
        model[0].bias.zero_()
        assert bool((model(x) != 0).all()), "the pack was not read"
        for rows in (1, 16, 40):  # packs of parts are larger than the weight
            plan = _C.linear_plan(expected[:rows], x[:rows], model[0].weight, packed=True)
            reads_pack = plan["kernel"] == model[0]._pack.kernel and not plan["pack_b"]
            assert bool((model(x[:rows]) != 0).all()) == reads_pack and bool((model(x[:rows]) == 0).all()) != reads_pack
            assert MODES[mode] != "split" or rows != 16 or not reads_pack
        switch("tf32" if mode == "bf16" else "bf16")
        assert bool((model(x) == 0).all()), "another precision must not read the pack"


@pytest.mark.parametrize("dtype", DTYPES)
def test_switch_does_not_touch_other_levels_or_dtypes(dtype, switch, generator):
    if dtype == "float32" and _C.cpu_info()["isa"] == "amx":
        pytest.skip("float32 at level amx is what it is for")
    x, w = (torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in ((70, 90), (100, 90)))
    expected = functional.linear(x, w)
    for mode in MODES:
        switch(mode)
        assert torch.equal(functional.linear(x, w), expected)


def test_an_emulated_level_says_so():
    out = CliRunner().invoke(main, ["info"]).output
    assert ("amx emulated" in out) == EMULATED
