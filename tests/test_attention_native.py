"""The attention kernels against float64: exact cases, bounds, every tail, layout, mask and option, on every row."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from fastdl import _C
from fastdl.testing import PRODUCT_ERROR, QUALITY_FACTOR, ROW_QUALITY_FACTOR, UNIT_ROUNDOFF, GuardedOutput, tails

ROWS = _C.kernels("attention")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN, MAX = -(2**63), 2**63 - 1
U = UNIT_ROUNDOFF[torch.float32]
# What P may be off by as an operand of pairs and tiles, in one, two or three bf16 parts.
P_ERROR = {1: 2 * 2.0**-9 + 2.0**-8, 2: 3 * 2.0**-16, 3: 2.0**-23}


def rows(**wanted):
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(r, id=r["name"], marks=pytest.mark.skipif(not r["available"], reason=r["reason"] or "-"))
            for r in ROWS
            if all(r[key] == value for key, value in wanted.items())
        ],
    )


every_row = rows()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(31)


def operands(generator, dtype, B=1, H=1, Hkv=None, Lq=1, Lk=1, D=1, Dv=None):
    shapes = (B, H, Lq, D), (B, Hkv or H, Lk, D), (B, Hkv or H, Lk, Dv or D)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attention(q, k, v, mask=None, *, out=None, row=None, threads=1, **options):
    """(out, lse) of _C.attention; row: a row of the kernel table to force."""
    out, lse = attention_pair(q, k, v, mask, out=out, row=row, threads=threads, **options)
    return out, lse[..., 0]


def attention_pair(q, k, v, mask=None, *, out=None, row=None, threads=1, **options):
    """As attention, with what rounding took from lse beside it; both NaN before."""
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype) if out is None else out
    lse = torch.full((*q.shape[:3], 2), math.nan)
    options.setdefault("scale", q.shape[-1] ** -0.5)
    _C.attention(out, lse, q, k, v, mask, kernel=row["name"] if row else "", threads=threads, **options)
    return out, lse


def limited(row):
    """Whether operands are split into bf16 parts: some are multiplied by FMA instead."""
    return row["isa"] == "amx" and row["dtype"] != "bfloat16"


def expand_mask(mask, q, k):
    return mask.expand(mask.shape[0], mask.shape[1], q.shape[2], k.shape[2])


def reference(
    q, k, v, mask=None, *, scale=None, lo=MIN, hi=MAX, softcap=0.0, align_end=False, keep=None, p=0.0, product=0.0
):
    """out, lse, and sum_j P|V| and the error bound of the scores of each row, in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // max(1, x.shape[1]), 1) for x in (k, v))
    s = q @ k.mT * scale
    error = ((q.shape[-1] + 8) * U + product) * (q.abs() @ k.abs().mT * abs(scale))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        error = error + 8 * U * softcap
    offset = k.shape[2] - q.shape[2] if align_end else 0
    distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None] - offset
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.double()
        if mask.dtype != torch.bool:
            error = error + 2 * U * mask.double().abs().nan_to_num(0, 0, 0)
    s = s.masked_fill((distance < lo) | (distance > hi), -math.inf)
    lse = torch.logsumexp(s, -1)
    P = torch.exp(s - lse[..., None]).nan_to_num(0.0)
    # Rounding what exp is taken of, and exp itself: at most |s - max| <= 104 where P is not 0.
    error = torch.where(P > 0, error + U * (s.abs() + 120), 0).amax(-1) if k.shape[2] else torch.zeros_like(lse)
    P = P if keep is None else P * keep / (1 - p) if p < 1 else P * 0
    return P @ v, lse, P @ v.abs(), error


def assert_close(actual, lse, q, k, v, mask=None, row=None, **options):
    """Within the bound that follows from the roundings, NaN nowhere."""
    product = PRODUCT_ERROR[row["precision"]] if row else 0.0
    expected, lse64, S, error = reference(q, k, v, mask, product=product, **options)
    u_out, depth = UNIT_ROUNDOFF[q.dtype], 2 * k.shape[2] + 16
    g = 2 * error[..., None] + depth * U + product + (P_ERROR[row["planes"]] if row and row["k_unit"] == 2 else 0)
    tiny = torch.finfo(q.dtype).smallest_normal
    bound = g * S + u_out * (expected.abs() + g * S) + tiny
    bad = ~((actual.double() - expected).abs() <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()}, first at {tuple(bad.nonzero()[0].tolist())}: "
        f"{actual[bad][0].item()} instead of {expected[bad][0].item()}, bound {bound[bad][0].item():.2e}"
    )
    assert torch.equal(lse.isinf(), lse64.isinf())
    seen = ~lse64.isinf()
    limit = error + U * (2 * k.shape[2] + 8) + 4 * U * lse64.abs()
    assert ((lse.double() - lse64).abs()[seen] <= limit[seen]).all()


def check(row, q, k, v, mask=None, **options):
    native = {key: options[key] for key in ("scale", "lo", "hi", "softcap", "align_end") if key in options}
    out, lse = attention(q, k, v, mask, row=row, **native)
    assert_close(out, lse, q, k, v, mask, row=row, **options)


# --- exact --------------------------------------------------------------------------------------------------------
@every_row
@pytest.mark.parametrize("offset", [-3, 0, 5])
def test_one_visible_key_gives_its_value(row, generator, offset):
    dtype = DTYPES[row["dtype"]]
    q, k, _ = operands(generator, dtype, H=2, Lq=2 * row["mr"] + 1, Lk=row["nr"] + 70, D=33)
    v = torch.randint(-9, 10, (1, 2, k.shape[2], 37), generator=generator).to(dtype)
    expected = torch.zeros(1, 2, q.shape[2], 37, dtype=dtype)
    for i in range(q.shape[2]):
        if 0 <= i + offset < k.shape[2]:
            expected[:, :, i] = v[:, :, i + offset]
    assert torch.equal(attention(q, k, v, row=row, lo=offset, hi=offset)[0], expected)
    distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]
    mask = (distance == offset)[None, None]
    assert torch.equal(attention(q, k, v, mask, row=row)[0], expected)


@every_row
@pytest.mark.parametrize("Lk", [1, 2, 64, 256, 1024])
def test_scale_zero_gives_the_mean(row, generator, Lk):
    dtype = DTYPES[row["dtype"]]
    q, k, _ = operands(generator, dtype, Lq=row["mr"] + 1, Lk=Lk, D=5)
    v = torch.randint(-4, 5, (1, 1, Lk, 19), generator=generator).to(dtype)
    out, lse = attention(q, k, v, row=row, scale=0.0)
    assert torch.equal(out, v.double().mean(2, keepdim=True).to(dtype).expand_as(out))
    assert torch.equal(lse, torch.full_like(lse, math.log(Lk)))


# --- tails --------------------------------------------------------------------------------------------------------
@every_row
def test_every_tail_of_rows_and_keys(row, generator):
    dtype = DTYPES[row["dtype"]]
    lengths = sorted({*tails(row["nr"]), *tails(16), row["key_block"] - 1, row["key_block"] + 1, 2 * row["key_block"]})
    for Lq, Lk in itertools.product(tails(row["mr"]), lengths):
        q, k, v = operands(generator, dtype, Lq=Lq, Lk=Lk, D=20, Dv=12)
        check(row, q, k, v)


@every_row
def test_every_head_dimension(row, generator):
    dtype = DTYPES[row["dtype"]]
    for D, Dv in [(1, 1), (2, 3), (15, 17), (31, 33), (64, 65), (79, 80), (96, 97), (127, 129), (255, 256), (256, 49)]:
        q, k, v = operands(generator, dtype, H=2, Lq=row["mr"] + 2, Lk=43, D=D, Dv=Dv)
        guarded = GuardedOutput((1, 2, q.shape[2], Dv), dtype=dtype)
        out, lse = attention(q, k, v, row=row, out=guarded.view)
        assert_close(out, lse, q, k, v, row=row)
        guarded.assert_guards_intact()


@every_row
def test_many_query_blocks(row, generator):
    q, k, v = operands(generator, DTYPES[row["dtype"]], B=2, H=2, Hkv=1, Lq=20 * row["mr"] + 3, Lk=300, D=16)
    check(row, q, k, v)
    check(row, q, k, v, hi=0)
    check(row, q, k, v, lo=-40, hi=25)


# --- options ------------------------------------------------------------------------------------------------------
OPTIONS = {
    "plain": {},
    "causal": {"hi": 0},
    "causal at the end": {"hi": 0, "align_end": True},
    "window": {"lo": -20, "hi": 7},
    "window at the end": {"lo": -5, "hi": 3, "align_end": True},
    "softcap": {"softcap": 3.0},
    "negative scale": {"scale": -0.2},
    "softcap, causal": {"softcap": 0.7, "hi": 0},
}


def masks(generator, q, k, dtype):
    B, H, Lq, Lk = *q.shape[:3], k.shape[2]
    boolean = torch.rand(B, H, Lq, Lk, generator=generator) > 0.4
    added = torch.randn(B, H, Lq, Lk, generator=generator)
    holes = added.masked_fill(~boolean, -math.inf)
    return {
        "none": None,
        "bool": boolean,
        "bool over heads": boolean[:, :1],
        "bool over batch": boolean[:1],
        "bool over rows": expand_mask(boolean[:, :, :1], q, k),
        "bool over keys": expand_mask(boolean[..., :1], q, k),
        "bool transposed": boolean.mT.contiguous().mT,
        "float": added,
        "float over all": expand_mask(added[:1, :1, :1, :1], q, k),
        "float, -Inf": holes[:, :1],
        "same dtype": added.to(dtype),
        "same dtype, strided": added.to(dtype).repeat_interleave(2, -1)[..., ::2],
    }


@every_row
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_mask_with_every_option(row, generator, options):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(generator, dtype, B=2, H=4, Hkv=2, Lq=row["mr"] + 4, Lk=75, D=24, Dv=18)
    for mask in masks(generator, q, k, dtype).values():
        check(row, q, k, v, mask, **options)


@every_row
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_grouped_queries(row, generator, group):
    q, k, v = operands(generator, DTYPES[row["dtype"]], B=2, H=2 * group, Hkv=2, Lq=3, Lk=530, D=16)
    check(row, q, k, v)


LAYOUTS = {
    "BHSD": lambda x: x,
    "BSHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "column-major": lambda x: x.mT.contiguous().mT,
    "every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "colliding rows": lambda x: torch.cat([x, x.new_zeros(*x.shape[:3], 1024 - x.shape[3])], 3)[..., : x.shape[3]],
}


@every_row
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(row, generator, layout):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(generator, dtype, B=2, H=3, Lq=row["mr"] + 1, Lk=70, D=24, Dv=40)
    wanted = {i: layout for i in range(3)}
    for which in itertools.chain(wanted, [None]):
        x = [layout(t) if which in (i, None) else t for i, t in enumerate((q, k, v))]
        if row["kind"] == "decode" and any(t.stride(-1) != 1 for t in x):
            with pytest.raises(RuntimeError, match="contiguous along the last dimension"):
                attention(*x, row=row)
            continue
        check(row, *x)
    out = torch.full((2, q.shape[2], 3, 40), math.nan, dtype=dtype).transpose(1, 2)
    assert_close(*attention(q, k, v, row=row, out=out), q, k, v, row=row)


# --- accuracy against torch ---------------------------------------------------------------------------------------
@every_row
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_no_worse_than_torch(row, generator, spread):
    if row["precision"] in ("tf32", "bf16"):
        pytest.skip("promises its bound alone")
    for shape in (
        [(3, 200, 300, 64), (2, 130, 600, 128)] if row["kind"] == "tile" else [(8, 3, 1200, 128), (9, 1, 3000, 64)]
    ):
        no_worse_than_torch(row, generator, spread, *shape)


def no_worse_than_torch(row, generator, spread, H, Lq, Lk, D):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(generator, dtype, H=H, Lq=Lq, Lk=Lk, D=D)
    q = (q * spread).to(dtype)
    expected, _, S, _ = reference(q, k, v)

    def error(x):
        return ((x.double() - expected) / S).square()

    ours, theirs = error(attention(q, k, v, row=row)[0]), error(F.scaled_dot_product_attention(q, k, v))
    u = UNIT_ROUNDOFF[dtype]
    assert ours.mean().sqrt() <= QUALITY_FACTOR * theirs.mean().sqrt() + 3 * u / ours.numel()
    if dtype != torch.float32:
        assert (ours.mean(-1).sqrt() <= ROW_QUALITY_FACTOR * theirs.mean(-1).sqrt() + 3 * u / D).all()


# --- dropout ------------------------------------------------------------------------------------------------------
def kept(B, H, Lq, Lk, p, seed):
    keep = torch.empty(B, H, Lq, Lk, dtype=torch.bool)
    _C.attention_keep(keep, dropout_p=p, seed=seed)
    return keep


@every_row
@pytest.mark.parametrize("p", [0.1, 0.7, 1.0])
def test_dropout_keeps_what_attention_keep_says(row, generator, p):
    q, k, v = operands(generator, DTYPES[row["dtype"]], B=2, H=4, Hkv=2, Lq=row["mr"] + 3, Lk=600, D=16)
    keep = kept(2, 4, q.shape[2], 600, p, 99)
    for hi in (MAX, 300):
        out, lse = attention(q, k, v, row=row, dropout_p=p, seed=99, hi=hi)
        assert_close(out, lse, q, k, v, row=row, keep=keep, p=p, hi=hi)


def test_dropout_draws_look_independent():
    p, shape = 0.25, (2, 4, 256, 512)
    keep = kept(*shape, p, 5).double()
    n = keep.numel()
    sigma = math.sqrt(p * (1 - p))
    x = (keep - (1 - p)) / sigma
    assert abs(x.sum()) < 5 * math.sqrt(n)
    for dim in range(4):  # means along every dimension spread as those of independent draws
        means = x.mean(dim).flatten() * math.sqrt(shape[dim])
        assert abs(means.var() - 1) < 6 * math.sqrt(2 / means.numel())
        for step in (1, 2, 16):  # neighbours do not go together
            if step < shape[dim]:
                a, b = x.narrow(dim, 0, shape[dim] - step), x.narrow(dim, step, shape[dim] - step)
                assert abs((a * b).sum()) < 5 * math.sqrt(a.numel())
    assert not torch.equal(kept(*shape, p, 5), kept(*shape, p, 6))
    assert torch.equal(kept(*shape, p, 5)[:, :, :9, :7], kept(2, 4, 9, 7, p, 5))
    assert kept(1, 1, 64, 64, 0.0, 1).all() and not kept(1, 1, 64, 64, 1.0, 1).any()


# --- variable lengths -----------------------------------------------------------------------------------------------
@every_row
@pytest.mark.parametrize("options", [{}, {"hi": 0}, {"hi": 0, "align_end": True}, {"lo": -9, "hi": 4}], ids=str)
def test_sequences_attend_to_themselves(row, generator, options):
    lengths_q, lengths_k = [5, 0, 1, row["mr"] + 2, 30, 7], [9, 4, 700, 1, 33, 0]
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)]) for n in (lengths_q, lengths_k))
    q, _, _ = operands(generator, DTYPES[row["dtype"]], H=4, Hkv=2, Lq=sum(lengths_q), D=24)
    _, k, v = operands(generator, DTYPES[row["dtype"]], H=4, Hkv=2, Lk=sum(lengths_k), D=24, Dv=9)
    for dtype in (torch.int32, torch.int64):
        out, lse = attention(q, k, v, row=row, cu_seqlens_q=cu_q.to(dtype), cu_seqlens_k=cu_k.to(dtype), **options)
        for s in range(len(lengths_q)):
            a, b = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            part = q[:, :, a], k[:, :, b], v[:, :, b]
            assert_close(out[:, :, a], lse[:, :, a], *part, row=row, **options)


# --- same bits ----------------------------------------------------------------------------------------------------
@every_row
@pytest.mark.parametrize("options", [{}, {"hi": 0}, {"dropout_p": 0.2, "seed": 3}], ids=str)
def test_same_bits_at_any_thread_count(row, generator, options):
    q, k, v = operands(generator, DTYPES[row["dtype"]], B=2, H=4, Hkv=2, Lq=9 * row["mr"] + 1, Lk=1100, D=32)
    first = attention(q, k, v, row=row, threads=1, **options)
    for threads in (2, 3, 5):
        again = attention(q, k, v, row=row, threads=threads, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# --- hostile input ------------------------------------------------------------------------------------------------
@every_row
def test_nothing_to_attend_to(row):
    dtype = DTYPES[row["dtype"]]
    for B, H, Lq, Lk in [(1, 2, 3, 0), (1, 2, 0, 5), (0, 2, 3, 5), (2, 0, 3, 5)]:
        q, k, v = (torch.ones(B, H, L, 8, dtype=dtype) for L in (Lq, Lk, Lk))
        out, lse = attention(q, k, v, row=row)
        assert torch.equal(out, torch.zeros(B, H, Lq, 8, dtype=dtype))
        assert torch.equal(lse, torch.full((B, H, Lq), -math.inf))


@every_row
def test_rows_without_a_visible_key_are_zero(row, generator):
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(generator, dtype, Lq=row["mr"] + 2, Lk=600, D=16)
    mask = torch.ones(1, 1, q.shape[2], 600, dtype=torch.bool)
    mask[:, :, ::2] = False
    for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        out, lse = attention(q, k, v, m, row=row)
        assert (out[:, :, ::2] == 0).all() and (lse[:, :, ::2] == -math.inf).all()
        check(row, q, k, v, m)
    for options in ({"hi": -700}, {"lo": 601}, {"lo": 3, "hi": 2}, {"lo": MAX}, {"hi": MIN}):
        out, lse = attention(q, k, v, row=row, **options)
        assert (out == 0).all() and (lse == -math.inf).all()


@every_row
def test_the_lowest_finite_mask_is_no_infinity(row, generator):
    """A row masked everywhere by finfo.min gives the mean, as in torch; a row masked in part ignores that part."""
    dtype = DTYPES[row["dtype"]]
    q, k, v = operands(generator, dtype, Lq=4, Lk=40, D=8)
    mask = torch.zeros(1, 1, 4, 40)
    mask[:, :, 0] = torch.finfo(torch.float32).min
    mask[:, :, 1, 7:] = torch.finfo(torch.float32).min
    out, _ = attention(q, k, v, mask, row=row)
    torch.testing.assert_close(out[:, :, 0], v.double().mean(2).to(dtype), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        out[:, :, 1:2], attention(q[:, :, 1:2], k[:, :, :7], v[:, :, :7])[0], rtol=1e-2, atol=1e-2
    )


@every_row
@pytest.mark.parametrize("magnitude", [1e4, 1e20, 1e30])
def test_huge_scores_choose_their_maximum(row, generator, magnitude):
    dtype = DTYPES[row["dtype"]]
    q, k, v = torch.ones(1, 1, 20, 4), torch.zeros(1, 1, 50, 4), torch.randn(1, 1, 50, 6, generator=generator)
    k[:, :, 17], v = 1, v.bfloat16().float()  # one part holds it, at any precision
    out, lse = attention(q.to(dtype), k.to(dtype), v.to(dtype), row=row, scale=magnitude)
    assert torch.equal(out, v[:, :, 17:18].to(dtype).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 4 * magnitude))


@every_row
@pytest.mark.parametrize("score", [0.0, 1000.1, -3e30, torch.finfo(torch.float32).min])
def test_lse_keeps_what_rounding_takes(row, score):
    """Beside a score of 1e38 one float would lose the log of the number of keys."""
    dtype, Lk = DTYPES[row["dtype"]], 700
    q, k, v = (torch.zeros(1, 1, L, 3, dtype=dtype) for L in (row["mr"] + 1, Lk, Lk))
    lse = attention_pair(q, k, v, torch.full((1, 1, 1, 1), score).expand(1, 1, q.shape[2], Lk), row=row)[1]
    whole = torch.tensor(score).double() + math.log(Lk)
    assert torch.equal(lse[..., 0], whole.float().expand_as(lse[..., 0]))
    torch.testing.assert_close(
        (lse[..., 0].double() - torch.tensor(score).double()) + lse[..., 1].double(),
        torch.tensor(math.log(Lk)).double().expand_as(lse[..., 0]), rtol=1e-6, atol=0
    )  # fmt: skip


@every_row
def test_nan_and_infinity_go_through(row, generator):
    dtype = DTYPES[row["dtype"]]
    for what, value in itertools.product("qkv", (math.nan, math.inf, -math.inf)):
        x = dict(zip("qkv", operands(generator, dtype, Lq=row["mr"] + 1, Lk=40, D=8), strict=True))
        x[what][0, 0, 5 % x[what].shape[2], 3] = value
        expected = F.scaled_dot_product_attention(*(t.float() for t in x.values()))
        out, _ = attention(*x.values(), row=row)
        assert torch.equal(out.isnan(), expected.isnan()), (what, value)
        assert torch.equal(out.isinf(), expected.isinf()), (what, value)


@every_row
def test_masked_keys_may_hold_anything(row, generator):
    """Such keys are multiplied by FMA where bf16 parts have limits: then other roundings, else not a bit differs."""
    q, k, v = operands(generator, DTYPES[row["dtype"]], Lq=20, Lk=40, D=8)
    mask = torch.ones(1, 1, 20, 40, dtype=torch.bool)
    mask[..., 30:] = False
    clean = attention(q, k, v, mask, row=row)
    bad = k.clone()
    bad[:, :, 30:] = math.nan
    out, lse = attention(q, bad, v, mask, row=row)
    if limited(row):
        assert_close(out, lse, q, k, v, mask, row=row)
    else:
        assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


def test_errors_name_the_argument():
    q, k, v = (torch.ones(2, 4, 5, 8) for _ in range(3))
    out, lse = torch.ones(2, 4, 5, 8), torch.ones(2, 4, 5, 2)

    def fails(pattern, error=RuntimeError, op="scaled_dot_product_attention", **changed):
        values = {"out": out, "lse": lse, "query": q, "key": k, "value": v, "mask": None, "scale": 1.0, **changed}
        with pytest.raises(error, match=f"fastdl.{op}: .*{pattern}"):
            _C.attention(**values)

    fails("'query'.*torch.Tensor", TypeError, query=[1.0])
    fails("'query'.*\\[B, H, Lq, D\\]", query=q[0])
    fails("'key'.*head dimension", key=k[..., :7])
    fails("'key'.*batch", key=k[:1])
    fails("'value'.*length", value=v[:, :, :4])
    fails("'key'.*divides", key=k[:, :3], value=v[:, :3])
    fails("'key'.*float32", key=k.double())
    fails("'key'.*as query", key=k.bfloat16())
    fails("'query'.*1 to 256", query=torch.ones(2, 4, 5, 257), key=torch.ones(2, 4, 5, 257))
    fails("'query'.*1 to 256", query=torch.ones(2, 4, 5, 0), key=torch.ones(2, 4, 5, 0))
    fails("'value'.*1 to 256", value=torch.ones(2, 4, 5, 300))
    fails("'out'.*shape", out=out[:1])
    fails("'out'.*unit stride", out=torch.ones(2, 4, 8, 5).mT)
    fails("'out'.*do not share", out=torch.ones(1, 4, 5, 8).expand(2, 4, 5, 8))
    fails("'out'.*overlap", out=q)
    fails("'lse'.*contiguous", lse=lse[:, :, :4])
    fails("'lse'", lse=lse[..., 0].contiguous())
    fails("'lse'", lse=lse.bfloat16())
    fails("'mask'.*expected shape", mask=torch.ones(2, 4, 5, 4))
    fails("'mask'.*bool, float32", mask=torch.ones(2, 4, 5, 5, dtype=torch.int32))
    fails("'mask'.*as query", mask=torch.ones(2, 4, 5, 5).half())
    fails("'dropout_p'", dropout_p=1.5)
    fails("'dropout_p'", dropout_p=-1.0)
    fails("'dropout_p'", dropout_p=math.nan)
    fails("'softcap'", softcap=-1.0)
    fails("'seed'", seed=-1)
    endless = torch.ones(8).expand(2, 2, 2**48, 8)
    fails("'key': expected fewer than 2\\^48 keys", key=endless, value=endless)
    fails("'kernel'.*expected one of", kernel="gemm")
    fails("its dtype", kernel="attention_bf16_4x8_scalar")
    fails("'threads'", threads=-1)
    cu = torch.tensor([0, 5])
    fails("both", cu_seqlens_q=cu)
    fails("\\[1, H, total, D\\]", cu_seqlens_q=cu, cu_seqlens_k=cu)
    one = {"query": q[:1], "key": k[:1], "value": v[:1], "out": out[:1], "lse": lse[:1]}
    for bad in ([0, 4], [1, 5], [0, 3, 2, 5], [], [0, 6]):
        offsets = torch.tensor(bad, dtype=torch.int64)
        text = f"'cu_seqlens_q'.*from 0 to 5 that never decrease, got {re.escape(str(bad))}"
        fails(text, op="attention_varlen", **one, cu_seqlens_q=offsets, cu_seqlens_k=cu)
    fails(
        "'cu_seqlens_k'.*offsets", op="attention_varlen", **one, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, 2, 5])
    )
    fails("'cu_seqlens_q'.*int32 or int64", op="attention_varlen", **one, cu_seqlens_q=cu.float(), cu_seqlens_k=cu)
    fails("'mask'.*None with cu", **one, cu_seqlens_q=cu, cu_seqlens_k=cu, mask=torch.ones(1, 1, 5, 5))


@every_row
def test_guard_pages(row, run_python):
    run_python("guard_pages_attention.py", row["name"])


def test_peak_memory(run_python):
    """Forward and backward: results plus the plan's workspace; no scores, no mask a head, no copy of K and V."""
    report = run_python("peak_memory_attention.py", timeout=120)
    if report.startswith("SKIP"):
        pytest.skip(report)


# --- plan ---------------------------------------------------------------------------------------------------------
def up(n, unit):
    return -(-n // unit) * unit


def page(n):
    return up(n, 4096)


@every_row
@pytest.mark.parametrize(
    "shape", [(2, 8, 2, 1, 5000, 128, 96), (1, 4, 4, 333, 700, 64, 64), (1, 2, 1, 5, 0, 3, 1)], ids=str
)
@pytest.mark.parametrize("threads", [1, 3])
def test_scratch_is_what_the_formula_says(row, shape, threads):
    B, H, Hkv, Lq, Lk, D, Dv = shape
    dtype = DTYPES[row["dtype"]]
    q, k, v = (torch.empty(s, dtype=dtype) for s in ((B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)))
    plan = _C.attention_plan(q, k, v, kernel=row["name"], threads=threads)
    threads, o_row = plan["threads"], up(Dv, 16)
    if row["kind"] == "decode":
        n, block = Lq * H // Hkv, row["key_block"]
        shared = page(B * Hkv * max(1, -(-Lk // block)) * n * (o_row + 2) * 4)
        own = page(n * D * 4) + page(n * (block + 16) * 4) + page(2 * up(n, 16) * 4)
        assert plan["workspace_bytes"] == shared + threads * own
        return

    def steps(n):
        return up(n, row["k_step"]) // row["k_unit"] * row["planes"]

    strips, block = plan["strips"], plan["key_block"]
    buffers = 1 if row["isa"] != "amx" else 3 if row["planes"] == 1 else 2
    kept = max(1, -(-Lk // row["key_block"])) if plan["keep_k"] else 1
    v_bytes = kept * steps(block) * up(Dv, row["nr"]) * 4 if plan["pack_v"] else 0
    own = page(strips * row["mr"] * steps(D) * 4 + 64) + page(kept * block * steps(D) * 4 + 64)
    own += (page(v_bytes + 64) if plan["pack_v"] else 0) + page(buffers * row["mr"] * (block + 16) * 4)
    own += page(row["mr"] * (steps(block) + 16) * 4) if row["planes"] > 1 else 0
    own += page(strips * row["mr"] * o_row * 4) + page(strips * 2 * up(row["mr"], 16) * 4 + kept)
    own += page((up(14 * D, 16) + up(block * D, 16) + block * up(Dv, 32) + 48) * 4) if limited(row) else 0
    assert plan["workspace_bytes"] == threads * own
    assert block <= up(row["key_block"], row["nr"]) and block % row["nr"] == 0


def test_memory_grows_with_the_length_alone():
    """O(L): sixteen times the keys and queries take less than sixteen times the scratch, far below L^2."""
    sizes = []
    for L in (1024, 16384):
        q = torch.empty(1, 1, L, 64)
        sizes.append(_C.attention_plan(q, q, q, threads=2)["workspace_bytes"])
    assert sizes[1] <= 16 * sizes[0] and sizes[1] < 32 << 20


def test_plan_chooses_by_the_number_of_query_rows():
    k = torch.empty(1, 8, 4096, 128)
    for Lq, kind in ((1, "decode"), (4, "decode"), (64, "f32")):
        assert kind in _C.attention_plan(torch.empty(1, 32, Lq, 128), k, k)["kernel"]
    assert "decode" not in _C.attention_plan(torch.empty(1, 32, 1, 128), k, k.mT.contiguous().mT)["kernel"]
    plan = _C.attention_plan(torch.empty(1, 32, 64, 128), k, k)
    assert any("decode" in c for c in plan["candidates"])


def test_counters_count_attention(generator):
    q, k, v = operands(generator, torch.float32, Lq=40, Lk=40, D=8)
    _C.reset_counters()
    attention(q, k, v)
    name = _C.attention_plan(q, k, v)["kernel"]
    assert {n: c for n, c in _C.counters().items() if c} == {name: 1}
