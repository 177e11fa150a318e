"""Attention on CUDA kernels, forward, against float64: exact cases, bounds, tails, layouts, options; on every row."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from attention_reference64 import MAX, MIN, assert_forward_close, forward_reference, keep_of
from fastdl import _C
from fastdl.ops import cuda
from fastdl.testing import QUALITY_FACTOR, UNIT_ROUNDOFF, GuardedOutput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODULE = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
ROWS = [row for row in MODULE.kernels("attention") if row["kind"] in ("tile", "decode")] if MODULE else []


def rows(**wanted):
    chosen = [r for r in ROWS if all(r[key] == value for key, value in wanted.items())]
    return pytest.mark.parametrize("row", [pytest.param(r, id=r["name"]) for r in chosen])


every_row = rows()
small_rows = pytest.mark.parametrize("row", [pytest.param(r, id=r["name"]) for r in ROWS if r["depth"] <= 128])


@pytest.fixture(autouse=True)
def seeded_and_serial():
    torch.manual_seed(29)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(dtype, B=1, H=1, Hkv=None, Lq=1, Lk=1, D=1, Dv=None):
    shapes = (B, H, Lq, D), (B, Hkv or H, Lk, D), (B, Hkv or H, Lk, Dv or D)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attention(gpu, q, k, v, mask=None, *, out=None, row=None, **options):
    """(out, lse [.., 2]), both NaN before, as is the workspace; on the CPU."""
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype) if out is None else out
    out = out.to(gpu.device)
    lse = torch.full((*q.shape[:3], 2), math.nan, device=gpu.device)
    options.setdefault("scale", q.shape[-1] ** -0.5)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32, device=gpu.device)
    if mask is not None:
        mask = mask.to(gpu.device).expand(-1, -1, q.shape[2], k.shape[2])
    tensors = (*(on(gpu, x) for x in (q, k, v)), mask)
    kernel = row["name"] if row else ""
    plan = gpu.module.attention_plan(*tensors, kernel=kernel, **options)
    scratch = torch.full((plan["workspace_bytes"],), 255, dtype=torch.uint8, device=gpu.device)
    gpu.module.attention(out, lse, *tensors, workspace=scratch, kernel=kernel, **options)
    return out.cpu(), lse.cpu()


def on(gpu, x):
    """x on the device with its strides."""
    if x.device == gpu.device:
        return x
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    base = x.as_strided((size,), (1,)).to(gpu.device)
    return base.as_strided(x.shape, x.stride())


def check(gpu, q, k, v, mask=None, row=None, **options):
    out, lse = attention(gpu, q, k, v, mask, row=row, **options)
    assert_forward_close(out, lse, q, k, v, mask, **options)
    return out, lse


# --- exact --------------------------------------------------------------------------------------------------------
@every_row
@pytest.mark.parametrize("offset", [-3, 5])
def test_one_visible_key_gives_its_value(gpu, row, offset):
    dtype, D = DTYPES[row["dtype"]], min(33, row["depth"])
    q, k, _ = operands(dtype, H=2, Lq=row["rows"] + 1, Lk=row["cols"] + 10, D=D)
    v = torch.randint(-9, 10, (1, 2, k.shape[2], 37)).to(dtype)
    expected = torch.zeros(1, 2, q.shape[2], 37, dtype=dtype)
    for i in range(q.shape[2]):
        if 0 <= i + offset < k.shape[2]:
            expected[:, :, i] = v[:, :, i + offset]
    assert torch.equal(attention(gpu, q, k, v, row=row, lo=offset, hi=offset)[0], expected)
    distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]
    assert torch.equal(attention(gpu, q, k, v, (distance == offset)[None, None], row=row)[0], expected)


@every_row
@pytest.mark.parametrize("Lk", [1, 64, 256])
def test_scale_zero_gives_the_mean(gpu, row, Lk):
    dtype = DTYPES[row["dtype"]]
    q, k, _ = operands(dtype, Lq=3, Lk=Lk, D=5)
    v = torch.randint(-4, 5, (1, 1, Lk, 19)).to(dtype)
    out, lse = attention(gpu, q, k, v, row=row, scale=0.0)
    assert torch.equal(out, v.double().mean(2, keepdim=True).to(dtype).expand_as(out))
    assert torch.equal(lse[..., 0], torch.full_like(lse[..., 0], math.log(Lk)))


@pytest.mark.sanitized
@every_row
def test_odd_sizes_and_strides(gpu, row):
    """Small, and with sanitizers too: nothing is read or written beside the operands."""
    dtype = DTYPES[row["dtype"]]
    for D, Dv in ((9, 5), (row["depth"], 8)):
        q, k, v = operands(dtype, H=2, Hkv=1, Lq=3, Lk=row["cols"] + 3, D=D, Dv=Dv)
        guarded = GuardedOutput((1, 2, 3, Dv), dtype=dtype)
        mask = torch.randn(1, 2, 1, k.shape[2])
        out, lse = attention(gpu, q, k, v, mask, row=row, out=guarded.view, dropout_p=0.2, seed=3)
        keep = keep_of((1, 2, 3, k.shape[2]), 0.2, 3)
        assert_forward_close(out, lse, q, k, v, mask, keep=keep, p=0.2)
        guarded.assert_guards_intact()


# --- tails --------------------------------------------------------------------------------------------------------
@every_row
def test_tails_of_rows_and_keys(gpu, row):
    dtype, m, n = DTYPES[row["dtype"]], row["rows"], row["cols"]
    for Lq, Lk in [(1, n + 1), (m - 1, 1), (m, n - 1), (m + 1, n), (2 * m - 1, 15), (17, 2 * n + 1), (9, 2 * n - 1)]:
        check(gpu, *operands(dtype, Lq=Lq, Lk=Lk, D=20, Dv=12), row=row)


@every_row
def test_head_dimensions(gpu, row):
    dtype = DTYPES[row["dtype"]]
    sizes = [(1, 1), (2, 3), (15, 17), (33, 31), (64, 63), (65, 80), (127, 96), (8, 128), (129, 256), (256, 144)]
    for D, Dv in sizes:
        if max(D, Dv) > row["depth"]:
            continue
        q, k, v = operands(dtype, H=2, Lq=18, Lk=35, D=D, Dv=Dv)
        guarded = GuardedOutput((1, 2, 18, Dv), dtype=dtype)
        out, lse = attention(gpu, q, k, v, row=row, out=guarded.view)
        assert_forward_close(out, lse, q, k, v)
        guarded.assert_guards_intact()


@every_row
def test_no_queries_or_keys(gpu, row):
    dtype = DTYPES[row["dtype"]]
    out, lse = attention(gpu, *operands(dtype, H=2, Lq=3, Lk=0, D=4), row=row)
    assert torch.equal(out, torch.zeros_like(out)) and (lse[..., 0] == -math.inf).all()
    for sizes in ({"Lq": 0, "Lk": 3}, {"B": 0, "Lq": 2, "Lk": 3}):
        assert attention(gpu, *operands(dtype, D=4, **sizes), row=row)[0].numel() == 0
    packed = {"cu_seqlens_q": [0, 0, 0], "cu_seqlens_k": [0, 2, 3]}
    assert attention(gpu, *operands(dtype, D=4, Lq=0, Lk=3), row=row, **packed)[0].numel() == 0


# --- options ------------------------------------------------------------------------------------------------------
OPTIONS = {
    "plain": {},
    "causal": {"hi": 0},
    "causal at the end": {"hi": 0, "align_end": True},
    "window": {"lo": -20, "hi": 7},
    "window at the end": {"lo": -5, "hi": 3, "align_end": True},
    "far": {"lo": MIN, "hi": MAX},
    "beyond": {"lo": 1000, "hi": MAX},
    "softcap": {"softcap": 3.0},
    "negative scale": {"scale": -0.2},
    "softcap, causal": {"softcap": 0.7, "hi": 0},
}


def masks(q, k, dtype):
    B, H, Lq, Lk = *q.shape[:3], k.shape[2]
    boolean = torch.rand(B, H, Lq, Lk) > 0.4
    added = torch.randn(B, H, Lq, Lk)
    return {
        "none": None,
        "bool": boolean,
        "bool over heads and rows": boolean[:, :1, :1],
        "bool over batch and keys": boolean[:1, :, :, :1],
        "bool transposed": boolean.mT.contiguous().mT,
        "float over all": added[:1, :1, :1, :1],
        "float, -Inf": added.masked_fill(~boolean, -math.inf)[:, :1],
        "same dtype, strided": added.to(dtype).repeat_interleave(2, -1)[..., ::2],
        "lowest": torch.full((1, 1, Lq, Lk), torch.finfo(torch.float32).min).masked_fill(boolean[:1, :1], 0.0),
    }


@small_rows
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_mask_with_every_option(gpu, row, options):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(dtype, B=2, H=2, Hkv=1, Lq=9, Lk=75, D=24, Dv=18)
    for mask in masks(q, k, dtype).values():
        check(gpu, q, k, v, mask, row=row, **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("group, D", [(1, 16), (3, 16), (20, 16), (3, 136)])
def test_grouped_queries_in_pieces(gpu, dtype, group, D):
    """Decode: heads that share keys lie in one tile, keys are cut into chunks."""
    q, k, v = operands(dtype, B=2, H=2 * group, Hkv=2, Lq=3, Lk=700, D=D)
    assert gpu.module.attention_plan(on(gpu, q), on(gpu, k), on(gpu, v))["kind"] == "decode"
    assert gpu.module.attention_plan(on(gpu, q), on(gpu, k), on(gpu, v))["chunks"] > 1
    check(gpu, q, k, v)
    check(gpu, q, k, v, hi=0, align_end=True)
    check(gpu, q, k, v, torch.rand(2, 2 * group, 3, 700) > 0.99)


@rows(kind="tile", dtype="bfloat16")
def test_few_tiles_are_cut_into_chunks_of_keys(gpu, row):
    q, k, v = operands(torch.bfloat16, H=1, Lq=70, Lk=600, D=24)
    assert gpu.module.attention_plan(on(gpu, q), on(gpu, k), on(gpu, v), kernel=row["name"])["chunks"] > 1
    check(gpu, q, k, v, row=row)
    check(gpu, q, k, v, row=row, lo=-300, hi=5)


LAYOUTS = {
    "BSHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "column-major": lambda x: x.mT.contiguous().mT,
    "every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "unaligned": lambda x: F.pad(x.flatten(), (1, 0))[1:].view_as(x),
}


@small_rows
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(gpu, row, layout):
    q, k, v = operands(DTYPES[row["dtype"]], B=2, H=3, Lq=10, Lk=70, D=24, Dv=40)
    for which in range(3):
        check(gpu, *(layout(t) if which == i else t for i, t in enumerate((q, k, v))), row=row)
    check(gpu, *(layout(t) for t in (q, k, v)), row=row)
    out = torch.full((2, 10, 3, 40), math.nan, dtype=q.dtype).transpose(1, 2)
    assert_forward_close(*attention(gpu, q, k, v, row=row, out=out), q, k, v)


# --- dropout ------------------------------------------------------------------------------------------------------
@small_rows
def test_dropout_keeps_what_the_cpu_keeps(gpu, row):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(dtype, B=2, H=4, Hkv=2, Lq=10, Lk=75, D=8)
    for p, seed in ((0.3, 5), (0.9, 2**62 + 11), (1.0, 1)):
        keep = torch.empty(2, 4, 10, 75, dtype=torch.bool)
        _C.attention_keep(keep, dropout_p=p, seed=seed)
        out, lse = attention(gpu, q, k, v, row=row, dropout_p=p, seed=seed)
        assert_forward_close(out, lse, q, k, v, keep=keep, p=p)


# --- packed sequences ---------------------------------------------------------------------------------------------
@small_rows
@pytest.mark.parametrize(
    "options", [{}, {"hi": 0, "align_end": True}, {"lo": -9, "hi": 4}, {"dropout_p": 0.2}], ids=str
)
def test_packed_sequences_are_as_each_alone(gpu, row, options):
    dtype = DTYPES[row["dtype"]]
    lengths_q, lengths_k = [5, 0, 70, 1, 0, 33, 2], [9, 4, 65, 40, 0, 0, 3]
    cu_q, cu_k = ([0, *itertools.accumulate(x)] for x in (lengths_q, lengths_k))
    q, k, v = operands(dtype, H=4, Hkv=2, Lq=cu_q[-1], Lk=cu_k[-1], D=24, Dv=17)
    out, lse = attention(gpu, q, k, v, row=row, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seed=3, **options)
    longest = max(lengths_q), max(lengths_k)
    p = options.get("dropout_p", 0.0)
    keep = keep_of((len(lengths_q), 4, *longest), p, 3)
    for s in range(len(lengths_q)):
        at_q, at_k = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        if lengths_q[s]:
            part = [q[:, :, at_q], k[:, :, at_k], v[:, :, at_k]]
            drop = {"keep": keep[s : s + 1, :, : lengths_q[s], : lengths_k[s]], "p": p} if p else {}
            rest = {key: value for key, value in options.items() if key != "dropout_p"}
            assert_forward_close(out[:, :, at_q], lse[:, :, at_q], *part, **rest, **drop)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_sequences_of_one_query_are_decoded(gpu, dtype):
    lengths_q, lengths_k = [1, 1, 0, 1, 1, 1], [1000, 5, 7, 0, 2100, 64]
    cu_q, cu_k = ([0, *itertools.accumulate(x)] for x in (lengths_q, lengths_k))
    q, k, v = operands(dtype, H=4, Hkv=2, Lq=cu_q[-1], Lk=cu_k[-1], D=24, Dv=17)
    packed = {
        name: torch.tensor(cu, dtype=torch.int32, device=gpu.device)
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k))
    }
    plan = gpu.module.attention_plan(on(gpu, q), on(gpu, k), on(gpu, v), **packed)
    assert plan["kind"] == "decode" and plan["pack"] == 2 and plan["chunks"] == 2
    out, lse = attention(gpu, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, hi=0, align_end=True)
    for s in range(len(lengths_q)):
        at_q, at_k = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        if lengths_q[s]:
            part = [q[:, :, at_q], k[:, :, at_k], v[:, :, at_k]]
            assert_forward_close(out[:, :, at_q], lse[:, :, at_q], *part, hi=0, align_end=True)


def test_many_sequences_are_all_found(gpu):
    lengths = [(7 * s) % 4 for s in range(75)]
    cu = [0, *itertools.accumulate(lengths)]
    q, k, v = operands(torch.bfloat16, H=1, Lq=cu[-1], Lk=cu[-1], D=8)
    out, _ = attention(gpu, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    same = torch.repeat_interleave(torch.arange(75), torch.tensor(lengths))
    alone, _, _, _ = forward_reference(q, k, v, (same[:, None] == same)[None, None])
    assert (out.double() - alone).abs().max() < 0.02


def test_wrong_offsets_touch_nothing_outside(gpu):
    q, k, v = operands(torch.bfloat16, H=1, Lq=20, Lk=20, D=8)
    for cu in ([0, 30, 20], [0, -5, 20], [5, 2, 1000], [-9, 40, 3]):
        guarded = GuardedOutput((1, 1, 20, 8), dtype=torch.bfloat16)
        attention(gpu, q, k, v, out=guarded.view, cu_seqlens_q=cu, cu_seqlens_k=cu)
        guarded.assert_guards_intact()


# --- special values -----------------------------------------------------------------------------------------------
@every_row
def test_nan_and_infinity_go_through(gpu, row):
    dtype = DTYPES[row["dtype"]]
    for what, value in itertools.product("qkv", (math.nan, math.inf, -math.inf)):
        x = dict(zip("qkv", operands(dtype, Lq=12, Lk=40, D=8), strict=True))
        x[what][0, 0, 5, 3] = value
        expected = F.scaled_dot_product_attention(*(t.float() for t in x.values()))
        out, _ = attention(gpu, *x.values(), row=row)
        assert torch.equal(out.isnan(), expected.isnan()), (what, value)
        assert torch.equal(out.isinf(), expected.isinf()), (what, value)


@every_row
def test_masked_keys_may_hold_anything(gpu, row):
    q, k, v = operands(DTYPES[row["dtype"]], Lq=5, Lk=40, D=8)
    mask = torch.ones(1, 1, 5, 40, dtype=torch.bool)
    mask[..., 30:] = False
    clean = attention(gpu, q, k, v, mask, row=row)[0]
    k[:, :, 30:] = math.nan
    assert torch.equal(attention(gpu, q, k, v, mask, row=row)[0], clean)


@every_row
def test_great_scores(gpu, row):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(dtype, Lq=3, Lk=70, D=4)
    q[..., 1:] = 0
    k[:, :, :, 0] = 1
    q[:, :, :, 0] = 1e4
    out, lse = attention(gpu, q, k, v, row=row, scale=1e30)
    expected = v.float().mean(2, keepdim=True)
    assert (out.float() - expected).abs().max() < 0.01
    log = lse.double().sum(-1) - q[..., 0].double() * float(torch.tensor(1e30, dtype=torch.float32))
    assert (lse[..., 0] > 9e33).all() and log.abs().max() < 1e27


# --- order ----------------------------------------------------------------------------------------------------------
@every_row
def test_bits_do_not_depend_on_the_order(gpu, row):
    q, k, v = operands(DTYPES[row["dtype"]], H=2, Lq=20, Lk=2 * row["cols"] + 5, D=40)
    results = [attention(gpu, q, k, v, row=row, hi=30) for _ in gpu.orders()]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@rows(dtype="float32")
def test_mended_sums_do_not_depend_on_the_order(gpu, row):
    """Inf in V: P goes through shared memory, a warp's own, anew for every tile of keys."""
    q, k, v = operands(torch.float32, Lq=20, Lk=2 * row["cols"] + 5, D=40)
    v[0, 0, 3, 7], v[0, 0, row["cols"] + 1, 7], v[0, 0, 2 * row["cols"], 33] = math.inf, math.inf, -math.inf
    expected, _, S, _ = forward_reference(q, k, v)
    for _ in gpu.orders():
        out, _ = attention(gpu, q, k, v, row=row)
        assert torch.equal(out.isinf(), expected.isinf()) and not out.isnan().any()
        finite = expected.isfinite()
        assert torch.equal(out[~finite].double(), expected[~finite])
        assert ((out.double() - expected)[finite] / S[finite]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("Lq, D", [(3, 64), (70, 64), (70, 160)])
def test_no_worse_than_torch(gpu, dtype, Lq, D):
    q, k, v = operands(dtype, H=2, Lq=Lq, Lk=200, D=D)
    expected, _, S, _ = forward_reference(q, k, v)
    ours, _ = attention(gpu, q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v)
    rms = [((x.double() - expected) / S).square().mean().sqrt().item() for x in (ours, theirs)]
    assert rms[0] <= QUALITY_FACTOR * rms[1] + 3 * UNIT_ROUNDOFF[dtype] / expected.numel()


# --- plans ----------------------------------------------------------------------------------------------------------
needs_module = pytest.mark.skipif(MODULE is None, reason="no CUDA module in this build")


@needs_module
@pytest.mark.parametrize("gpu_name", ["sm80", "sm90"])
def test_plans(gpu_name):
    def plan(dtype=torch.bfloat16, backward=False, **sizes):
        if MODULE.twin:
            return MODULE.attention_plan(*operands(dtype, **sizes), gpu=gpu_name, backward=backward)
        pytest.skip("plans of CPU tensors are the twin's")

    assert plan(H=32, Hkv=8, Lq=2048, Lk=2048, D=128)["kernel"] == "attention_bf16_128x32_d128_sm80"
    full = plan(B=8, H=32, Hkv=8, Lq=1024, Lk=1024, D=64)
    assert full["kernel"] == "attention_bf16_128x64_d64_sm80"
    assert full["chunks"] == 1 and full["workspace_bytes"] == 0 and full["blocks"] == 8 * 32 * 8
    decode = plan(H=32, Hkv=8, Lq=1, Lk=4096, D=128)
    assert decode["kind"] == "decode" and decode["pack"] == 4 and decode["tiles"] == 1
    assert decode["chunks"] == 16 and decode["blocks"] == 8 * 16
    assert decode["workspace_bytes"] == 16 * 4 * 32 * 130 * 4
    assert plan(torch.float32, Lq=100, Lk=100, D=200)["kernel"] == "attention_f32_64x32_d256_sm80"
    for name, dtype in DTYPES.items():
        for D in (1, 128, 129, 256):  # decode takes everything
            few = plan(dtype, H=4, Hkv=1, Lq=2, Lk=900, D=D, Dv=min(D, 40))
            assert few["kind"] == "decode" and few["chunks"] > 1 and few["blocks"] == few["chunks"], (name, D)
    for dtype in DTYPES.values():
        for D in (64, 100, 256):
            back = plan(dtype, backward=True, H=3, Lq=70, Lk=90, D=D)
            assert back["workspace_bytes"] == 3 * 70 * 4
            assert min(back["stages"]) >= 1


@needs_module
def test_kernels_fit_the_smallest_gpu():
    names = [row["name"] for row in MODULE.kernels("attention")]
    assert len(set(names)) == len(names)
    for row in MODULE.kernels("attention"):
        assert row["shared_bytes"] <= MODULE.gpu_named("sm80")["shared_bytes"], row["name"]


def test_errors_name_the_argument(gpu):
    q, k, v = (torch.ones(2, 4, 5, 8, device=gpu.device) for _ in range(3))
    out, lse = torch.ones_like(q), torch.ones(2, 4, 5, 2, device=gpu.device)

    def fails(pattern, **changed):
        values = {"out": out, "lse": lse, "query": q, "key": k, "value": v, "mask": None, "scale": 1.0, **changed}
        with pytest.raises(RuntimeError, match=f"fastdl.scaled_dot_product_attention: .*{pattern}"):
            gpu.module.attention(**values)

    fails("'key': expected shape", key=k[..., :7])
    fails("'value': expected shape", value=v[:, :, :4])
    fails("'query': expected 1 to 256", query=torch.ones(2, 4, 5, 257, device=gpu.device))
    fails("'key': expected a number of heads that divides", key=k[:, :3], value=v[:, :3])
    fails("'mask': expected shape", mask=torch.ones(2, 4, 5, 6, device=gpu.device))
    fails("'out': .*another shape|'out': expected shape", out=out[..., :7])
    fails("'lse': expected contiguous float32", lse=lse[..., 0])
    fails("'dropout_p'", dropout_p=math.nan)
    fails("'kernel': expected one of", kernel="none")
    fails("does not take this call", kernel="attention_bf16_64x32_d256_sm80")
    fails("'workspace': expected", query=q[:, :, :1], out=out[:, :, :1].clone(), lse=lse[:, :, :1].contiguous())
