"""Attention on tiles of bfloat16 parts: which kernel runs, exact products, and what parts cannot hold."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastdl import _C, functional
from fastdl.testing import PRODUCT_ERROR, QUALITY_FACTOR

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAN, INF = math.nan, math.inf
MODES = {"none": "split", "ieee": "split", "tf32": "high", "bf16": "medium"}  # torch's switch -> the kernel's name
TILES = [row for row in _C.kernels("attention") if row["isa"] == "amx"]
here = pytest.mark.skipif(_C.cpu_info()["isa"] != "amx", reason="level amx is not in use")
needs_amx_rows = pytest.mark.skipif("amx" not in _C.build_info()["isa_compiled"], reason="this build has no level amx")


def rows(**wanted):
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(r, id=r["name"], marks=pytest.mark.skipif(not r["available"], reason=r["reason"] or "-"))
            for r in TILES
            if all(r[key] in values for key, values in wanted.items())
        ],
    )


split_rows = rows(dtype=("float32",), precision=("ieee",))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(41)


@pytest.fixture
def switch():
    """switch(value): torch.backends.mkldnn.matmul.fp32_precision, put back afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield lambda value: setattr(matmul, "fp32_precision", value)
    matmul.fp32_precision = before


@pytest.fixture
def recomputed():
    """recomputed(): scores computed by FMA since the last look."""
    last = [_C.recomputed()]

    def look():
        last[0], before = _C.recomputed(), last[0]
        return last[0] - before

    return look


def forward(row, q, k, v, mask=None, **options):
    out, lse = torch.full((*q.shape[:3], v.shape[3]), NAN, dtype=q.dtype), torch.full((*q.shape[:3], 2), NAN)
    _C.attention(out, lse, q, k, v, mask, kernel=row["name"], **{"scale": q.shape[-1] ** -0.5, **options})
    return out, lse


def backward(row, q, k, v, do, **options):
    out, lse = forward(row, q, k, v, **options)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    options = {"scale": q.shape[-1] ** -0.5, **options}
    _C.attention_backward(*grads, None, do, q, k, v, out, lse, kernel=row["name"], **options)
    return grads


def exact(q, k, v, do, causal=False):
    """out, dq, dk, dv in float64, and the size of the terms of each."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1) > 0, -INF)
    P = torch.softmax(s, -1)
    out = P @ v
    grads = torch.autograd.grad(out, (q, k, v), do.double())
    with torch.no_grad():
        dp = do.double().abs() @ v.abs().mT
        ds = P * (dp + (P * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        sizes = P @ v.abs(), ds @ k.abs(), ds.mT @ q.abs(), P.mT @ do.double().abs()
    return (out.detach(), *grads), sizes


# --- which kernel -------------------------------------------------------------------------------------------------
def planned(Lq, Lk=512, D=64, H=4, Hkv=4, dtype=torch.float32, **options):
    q, k = torch.empty(1, H, Lq, D, dtype=dtype), torch.empty(1, Hkv, Lk, D, dtype=dtype)
    return _C.attention_plan(q, k, k, isa="amx", threads=2, **options)


@needs_amx_rows
def test_precision_asked_is_precision_given():
    for precision, name in (("fma", "14x32_avx512"), ("ieee", "split"), ("tf32", "high"), ("bf16", "medium")):
        for backward in (False, True):
            assert name in planned(512, precision=precision, backward=backward)["kernel"]
    lost = {line.split(":")[0]: line for line in planned(512)["candidates"]}
    assert "less exact than asked" in lost["attention_f32_high_32x32_amx"]
    assert "times the time" in lost["attention_f32_14x32_avx512"]


@needs_amx_rows
def test_tiles_run_where_they_pay():
    for dtype, name in ((torch.bfloat16, "attention_bf16_32x32_amx"), (torch.float16, "attention_f16_32x32_amx")):
        assert planned(512, dtype=dtype)["kernel"] == planned(512, dtype=dtype, backward=True)["kernel"] == name
    assert "avx512" in planned(512, D=8)["kernel"]  # splitting P costs more than its products by FMA
    assert "decode" in planned(1)["kernel"] and "decode" in planned(4, H=8, Hkv=2)["kernel"]
    assert "avx512" in planned(5, D=16, backward=True)["kernel"]
    assert "avx512" in planned(512, scale=1e30)["kernel"]


@here
def test_torchs_switch_is_asked_on_every_call(switch):
    q = torch.randn(1, 2, 128, 64)
    for value, name in MODES.items():
        switch(value)
        _C.reset_counters()
        functional.scaled_dot_product_attention(q, q, q)
        assert {n for n, c in _C.counters().items() if c} == {f"attention_f32_{name}_32x32_amx"}


# --- exact ----------------------------------------------------------------------------------------------------------
def bits(row):
    """That an operand holds."""
    if row["precision"] == "fma":
        return {"float16": 11, "bfloat16": 8}[row["dtype"]]
    return {"ieee": 24, "tf32": 16, "bf16": 8}[row["precision"]]


@rows()
@pytest.mark.parametrize("D", [1, 31, 32, 33, 64, 96, 255, 256])
def test_one_key_has_its_score_for_lse(row, D):
    """Integers of as many bits as sums of D stay exact with; all products of parts take part."""
    wide = 8 if row["precision"] == "tf32" else bits(row)  # which leaves out the products of the low parts
    most = 2 ** min(wide, (24 - D.bit_length()) // 2)
    for Lq in (1, 15, 17, 32, 33):
        q, k = (torch.randint(1 - most, most, (1, 1, n, D)) for n in (Lq, 1))
        _, lse = forward(row, *(x.to(DTYPES[row["dtype"]]) for x in (q, k, k)), scale=1.0)
        assert torch.equal(lse[..., 0], (q @ k.mT)[..., 0].float())


@rows()
def test_a_value_of_all_bits_comes_back(row):
    """P = 1: every part of V is multiplied and added."""
    dtype = DTYPES[row["dtype"]]
    v = torch.randint(1 - 2 ** bits(row), 2 ** bits(row), (1, 1, 300, 70))
    v = (v.double() * 2.0**-12).to(dtype)
    q, k = torch.randn(1, 1, 300, 20).to(dtype), torch.randn(1, 1, 300, 20).to(dtype)
    assert torch.equal(forward(row, q, k, v, lo=0, hi=0)[0], v)
    assert torch.equal(backward(row, q, k, v, v, lo=0, hi=0)[2], v)  # dV = dO


# --- what parts cannot hold -----------------------------------------------------------------------------------------
@split_rows
@pytest.mark.parametrize("what", ["v", "do"])
@pytest.mark.parametrize("power", [-60, -99, -101, -110, -120])
def test_tiny_values_keep_their_bits(row, recomputed, what, power):
    x = dict(zip(("q", "k", "v", "do"), (torch.randn(1, 1, n, 32) for n in (150, 200, 200, 150)), strict=True))
    x[what] *= 2.0**power
    ours = [forward(row, x["q"], x["k"], x["v"])[0], *backward(row, *x.values())]
    if power <= -101:
        assert recomputed()
    wanted, sizes = exact(*x.values())
    for a, b, size in zip(ours, wanted, sizes, strict=True):
        assert ((a.double() - b).abs() <= 2.0**-17 * size + 2.0**-140).all()


@split_rows
def test_blocks_beside_tiny_ones_run_on_tiles(row, recomputed):
    q, k, v = (torch.randn(1, 1, 1024, 32) for _ in range(3))
    v[:, :, 300, 5] = 1e-38  # among others in its column: nothing to do
    forward(row, q, k, v)
    assert recomputed() == 0
    v[:, :, 256:384, 5] = 1e-38  # all of a block
    ours, _ = forward(row, q, k, v)
    assert recomputed() == 1024 * 128
    (wanted, *_), (size, *_) = exact(q, k, v, v)
    assert ((ours.double() - wanted).abs() <= 2.0**-17 * size).all()


@split_rows
@pytest.mark.parametrize("what", "qkv")
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -3e38])
def test_special_values_surface_and_cost_their_blocks(row, recomputed, what, value):
    x = {n: torch.randn(1, 2, 500, 24) for n in "qkv"}
    x[what][0, 1, 140, 3] = value
    ours, _ = forward(row, *x.values())
    blocks = 32 * 500 if what == "q" else 500 * 128
    assert 0 < recomputed() <= blocks
    wanted = F.scaled_dot_product_attention(*(t.double() for t in x.values()))
    if what != "v" and abs(value) == 3e38:  # scores of 1e38 choose one key, or overflow in float32
        return
    assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours.isinf(), wanted.isinf())
    assert torch.equal(ours[:, 0].isfinite(), torch.ones_like(ours[:, 0], dtype=torch.bool))


@split_rows
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("what", ["q", "k", "v", "do"])
def test_blocks_by_fma_add_up_with_tiles(row, recomputed, what, causal):
    """A large value sends blocks of several query and key blocks to FMA, the rest stays: sums are whole."""
    x = dict(zip(("q", "k", "v", "do"), (torch.randn(1, 2, 1100, 24) for _ in range(4)), strict=True))
    x["k"], x["v"] = x["k"][:, :1], x["v"][:, :1]
    x[what][0, 0, 530, 3] = 2.0**31
    if what in ("q", "k"):
        x["k" if what == "q" else "q"][..., 3] *= 2.0**-31
    options = {"hi": 0} if causal else {}
    ours = [forward(row, x["q"], x["k"], x["v"], **options)[0], *backward(row, *x.values(), **options)]
    assert recomputed()
    wide = [x["q"], *(x[n].expand(1, 2, 1100, 24) for n in "kv"), x["do"]]
    wanted, sizes = exact(*wide, causal=causal)
    for i, (a, b, size) in enumerate(zip(ours, wanted, sizes, strict=True)):
        if i > 1:
            b, size = b.sum(1, keepdim=True), size.sum(1, keepdim=True)
        assert ((a.double() - b).abs() <= 2.0**-15 * size + 1e-30).all(), i


# --- quality --------------------------------------------------------------------------------------------------------
@split_rows
@pytest.mark.parametrize("L", [64, 513, 3000])
def test_gradients_no_worse_than_torch(row, L):
    q, k, v, do = (torch.randn(1, 2, L, 64) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*leaves)
    theirs = [theirs.detach(), *torch.autograd.grad(theirs, leaves, do)]
    ours = [forward(row, q, k, v)[0], *backward(row, q, k, v, do)]
    wanted, sizes = exact(q, k, v, do)
    for a, b, c, size in zip(ours, theirs, wanted, sizes, strict=True):
        ratio = [((x.double() - c) / size).square().mean().sqrt() for x in (a, b)]
        assert ratio[0] <= QUALITY_FACTOR * ratio[1]


@rows(dtype=("float32",), precision=("tf32", "bf16"))
def test_fewer_parts_keep_their_promise(row):
    q, k, v, do = (torch.randn(1, 2, 300, 64) for _ in range(4))
    wanted, sizes = exact(q, k, v, do)
    limit = PRODUCT_ERROR[row["precision"]]
    ours = [forward(row, q, k, v)[0], *backward(row, q, k, v, do)]
    for a, c, size in zip(ours, wanted, sizes, strict=True):
        error = ((a.double() - c) / size).square().mean().sqrt()
        assert limit * 2.0**-12 < error <= 4 * limit
