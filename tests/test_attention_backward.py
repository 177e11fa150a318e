"""Native gradients of attention: every tile row, every option, against float64 within bounds of the rounding."""

import functools
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from fastdl import _C
from fastdl.testing import PRODUCT_ERROR, QUALITY_FACTOR, ROW_QUALITY_FACTOR, UNIT_ROUNDOFF, GuardedOutput

FAR = 2**62
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = [row for row in _C.kernels("attention") if row["kind"] == "tile"]
BY_NAME = {row["name"]: row for row in ROWS}
NAMES = ("dq", "dk", "dv", "dmask")


def rows(dtype=None):
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                row, id=row["name"], marks=pytest.mark.skipif(not row["available"], reason=row["reason"] or "-")
            )
            for row in ROWS
            if dtype in (None, row["dtype"])
        ],
    )


@pytest.fixture(autouse=True)
def seeded_and_serial():
    """One thread: the operands are so small that a team costs more than it does."""
    torch.manual_seed(23)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(dtype, B=1, H=2, Hkv=None, Lq=5, Lk=7, D=8, Dv=None):
    """query, key, value, dout."""
    Hkv, Dv = H if Hkv is None else Hkv, D if Dv is None else Dv
    return [torch.randn(s).to(dtype) for s in ((B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), (B, H, Lq, Dv))]


def forward(query, key, value, mask=None, **options):
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype)
    lse = torch.empty(*query.shape[:3], 2)
    _C.attention(out, lse, query, key, value, mask, **options)
    return out, lse


def backward(query, key, value, dout, mask=None, *, dmask=None, want="qkv", kernel="", threads=0, **options):
    """dq, dk, dv, dmask; all NaN before the call. dmask: its shape. Output rows lie apart, with guards around."""
    options.setdefault("scale", query.shape[3] ** -0.5)
    out, lse = forward(query, key, value, mask, **options)
    leaves = {"q": query, "k": key, "v": value}
    guards = [GuardedOutput(tuple(x.shape), dtype=x.dtype) if n in want else None for n, x in leaves.items()]
    guards.append(GuardedOutput(tuple(dmask)) if dmask else None)
    grads = [None if g is None else g.view for g in guards]
    _C.attention_backward(*grads, dout, query, key, value, out, lse, mask, kernel=kernel, threads=threads, **options)
    for guard in guards:
        if guard is not None:
            guard.assert_guards_intact()
    return grads


def visible(Lq, Lk, lo=-FAR, hi=FAR, align_end=False, **_):
    distance = torch.arange(Lk) - torch.arange(Lq)[:, None] - (Lk - Lq if align_end else 0)
    return (distance >= lo) & (distance <= hi)


def limited(row):
    """Whether operands are split into bf16 parts: some are multiplied by FMA instead."""
    return row["isa"] == "amx" and row["dtype"] != "bfloat16"


def errors(row):
    """(of a product of float32 operands, of P' and dS as operands) of a row: what their bf16 parts leave."""
    if row is None or row["dtype"] != "float32" or row["k_unit"] == 1:
        return 0.0, 0.0
    return PRODUCT_ERROR[row["precision"]], {1: 2.0**-8, 2: 2.0**-16, 3: 2.0**-23}[row["planes"]]


def reference(query, key, value, dout, mask=None, row=None, **options):
    """Gradients in float64 through autograd of the plain math, and bounds of their error: lists of dq, dk, dv, dmask.

    With e(i,j) the error of a score less its log-sum-exp, P is off by P*e, dP and delta by the rounding of their sums,
    so that dS is off by P * (e * |dP - delta| + that); products add what they round. Low precision: O is rounded to it
    before delta, P' and dS before the products that pairs serve.
    """
    dtype, u, v_out = query.dtype, UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[query.dtype]
    scale = options.get("scale", query.shape[3] ** -0.5)
    product, part = errors(row)
    softcap, p = options.get("softcap", 0.0), options.get("dropout_p", 0.0)
    q, k, v = (x.double().requires_grad_() for x in (query, key, value))
    do = dout.double()
    group = q.shape[1] // k.shape[1]

    def heads(x):
        return x.repeat_interleave(group, 1)

    m = None
    raw = q @ heads(k).mT * scale
    s = softcap * torch.tanh(raw / softcap) if softcap else raw
    if mask is not None and mask.dtype == torch.bool:
        s = s.masked_fill(~mask, -math.inf)
    elif mask is not None:
        m = mask.double().expand(*s.shape).clone().requires_grad_()
        s = s + m
    s = s.masked_fill(~visible(*s.shape[2:], **options), -math.inf)
    dead = (s == -math.inf).all(-1, keepdim=True)
    P = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    keep = torch.ones_like(P)
    if p:
        drawn = torch.empty(P.shape, dtype=torch.bool)
        _C.attention_keep(drawn, dropout_p=p, seed=options["seed"])
        keep = drawn / (1 - p) if p < 1 else torch.zeros_like(P)
    out = (P * keep) @ heads(v)
    grads = torch.autograd.grad(out, [x for x in (q, k, v, m) if x is not None], do)

    with torch.no_grad():
        D, Dv, (Lq, Lk) = q.shape[3], v.shape[3], P.shape[2:]
        size = q.abs() @ heads(k).abs().mT * abs(scale)
        finite = s.masked_fill(s == -math.inf, 0.0)
        e = ((D + 4) * u + product) * size + 4 * u * finite.abs() + (32 * u * softcap if softcap else 0) + 2e-7
        e = e + (0 if m is None else 2 * u * m.masked_fill(m == -math.inf, 0.0).abs())
        seen = P > 0
        e = torch.where(seen, e, 0.0)
        sums = e.amax(-1, keepdim=True) + (Lk.bit_length() + 24) * u  # of the log-sum-exp, a sum in blocks
        sums = sums + u * torch.logsumexp(s.masked_fill(dead, 0.0), -1, keepdim=True).abs()
        e = torch.expm1(e + sums + 2e-7)
        dp = (do @ heads(v).mT) * keep
        big = (do.abs() @ heads(v).abs().mT) * keep
        delta = (do * out).sum(-1, keepdim=True)
        o_big = (P * keep) @ heads(v).abs()
        o_error = (P * keep * (e + (Lk + 8) * u)) @ heads(v).abs() + v_out * o_big + 2.0**-24
        delta_error = (do.abs() * (o_error + (Dv + 2) * u * o_big)).sum(-1, keepdim=True)
        slope = 1 - torch.tanh(raw / softcap) ** 2 if softcap else torch.ones_like(raw)
        low = v_out if dtype != torch.float32 else part + product  # what P' and dS are rounded to, and their products
        ds = P * (dp - delta)
        ds_error = P * ((e + 8 * u) * (dp - delta).abs() + ((Dv + 4) * u + product) * big + delta_error) * (1 + low)
        tail = ds_error + low * ds.abs()
        tail = tail * slope + (ds.abs() * 64 * u if softcap else 0)
        total = tail + (Lq + Lk + 4) * u * (ds * slope).abs()
        p_error = P * keep * (e + 4 * u + low + (Lq + 4) * u * group)

        def per_key(x):
            return x.unflatten(1, (-1, group)).sum(2)

        bounds = [
            total @ heads(k).abs() * abs(scale),
            per_key(total.mT @ q.abs()) * abs(scale) * (1 + u * group),
            per_key(p_error.mT @ do.abs()),
        ]
        if m is not None:
            bounds.append(ds_error + 4 * u * ds.abs())
        bounds = [b * (1 + v_out) + v_out * g.abs() + 1e-30 for b, g in zip(bounds, grads, strict=True)]
        if dtype == torch.float16:
            bounds = [b + 2.0**-24 for b in bounds]
    return grads, bounds


def assert_close(actual, expected, slack=1.0):
    grads, bounds = expected
    for name, x, want, bound in zip(NAMES, actual, grads, bounds, strict=False):
        if x is None:
            continue
        while x.dim() and x.shape != want.shape:  # dmask: summed over the dimensions it lacks, a rounding each
            dim = next(i for i in range(4) if x.shape[i] != want.shape[i])
            bound = (bound + want.abs() * want.shape[dim] * 2.0**-23).sum(dim, keepdim=True)
            want = want.sum(dim, keepdim=True)
        error = (x.double() - want).abs()
        wrong = ~(error <= bound * slack)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            pytest.fail(
                f"{name}: {int(wrong.sum())} of {x.numel()} beyond the bound, first {at}: got {x[at].item()!r}, "
                f"expected {want[at].item()!r}, error {error[at].item():.3e}, bound {bound[at].item():.3e}"
            )


def check(q, k, v, do, mask=None, **options):
    kernel = options.pop("kernel", "")
    dmask = options.pop("dmask", None)
    grads = backward(q, k, v, do, mask, dmask=dmask, kernel=kernel, **options)
    assert_close(grads, reference(q, k, v, do, mask, row=BY_NAME.get(kernel), **options))
    return grads


BANDS = {
    "full": {},
    "causal": {"hi": 0},
    "causal_end": {"hi": 0, "align_end": True},
    "window": {"lo": -20, "hi": 9},
    "beyond": {"lo": 3, "hi": 40},
}
MASKS = {
    "none": lambda B, H, Lq, Lk, dtype: None,
    "bool": lambda B, H, Lq, Lk, dtype: (torch.rand(B, 1, Lq, Lk) > 0.4).expand(B, H, Lq, Lk),
    "float": lambda B, H, Lq, Lk, dtype: torch.randn(1, H, Lq, Lk),
    "same": lambda B, H, Lq, Lk, dtype: torch.randn(1, 1, 1, Lk).to(dtype).expand(1, 1, Lq, Lk),
    "minus_inf": lambda B, H, Lq, Lk, dtype: torch.zeros(1, 1, Lq, Lk).masked_fill(torch.rand(Lq, Lk) > 0.5, -math.inf),
}
EXTRAS = {"plain": {}, "softcap": {"softcap": 2.0}, "dropout": {"dropout_p": 0.3, "seed": 5}}


@functools.cache
def case(dtype, band, mask, extra, name):
    """Operands, mask and reference, the same for all rows alike: no size is a multiple of any row's tile."""
    B, H, Lq, Lk = (2, 4, 43, 69) if (mask, extra) == ("none", "plain") else (1, 2, 43, 69)
    x = operands(dtype, B, H, H // 2, Lq, Lk, D=20, Dv=33)
    m = MASKS[mask](B, H, Lq, Lk, dtype)
    return x, m, reference(*x, m, row=BY_NAME.get(name), **BANDS[band], **EXTRAS[extra])


@rows()
@pytest.mark.parametrize("band", BANDS)
def test_every_pair_of_options(row, band):
    for mask, extra in itertools.product(MASKS, EXTRAS):
        x, m, expected = case(DTYPES[row["dtype"]], band, mask, extra, row["name"] if any(errors(row)) else "")
        dmask = tuple(m.shape) if mask in ("float", "same", "minus_inf") else None
        assert_close(backward(*x, m, dmask=dmask, kernel=row["name"], **BANDS[band], **EXTRAS[extra]), expected)


@rows()
def test_every_tail(row):
    """Around a tile in each dimension, and past a block of keys and of queries."""
    dtype, mr, nr = DTYPES[row["dtype"]], row["mr"], row["nr"]
    for Lq in (1, 2, mr - 1, mr, mr + 1, 2 * mr + 1):
        for Lk in (1, nr - 1, nr + 1):
            check(*operands(dtype, 1, 1, 1, Lq, Lk, 5, 3), kernel=row["name"], hi=Lk - Lq, lo=-Lq + 1)
    for D in (1, 2, 15, 16, 17, 31, 33, 64, 65):
        check(*operands(dtype, 1, 1, 1, mr + 3, nr + 3, D, 70 - D), kernel=row["name"])
    for Lq, Lk in ((8 * mr + 1, 7), (9 * mr + 3, 225), (16, 449)):
        check(*operands(dtype, 1, 2, 1, Lq, Lk, 8, 8), kernel=row["name"], hi=0, align_end=True)


@rows()
def test_widest_heads(row):
    check(*operands(DTYPES[row["dtype"]], 1, 1, 1, 20, 40, 256, 255), kernel=row["name"])


@rows()
def test_scales(row):
    """Zero, negative and large factors; scores far from 0."""
    dtype = DTYPES[row["dtype"]]
    for scale in (0.0, -0.3, 2.5):
        check(*operands(dtype, 1, 1, 1, 20, 40, 8, 8), kernel=row["name"], scale=scale)


@rows()
def test_layouts_give_the_same_bits(row):
    """Strides of operands and gradients are no part of the result."""
    dtype, name = DTYPES[row["dtype"]], row["name"]
    for D in (16, 9):
        q, k, v, do = operands(dtype, 2, 4, 2, 37, 50, D, D)
        wanted = backward(q, k, v, do, kernel=name, hi=3)
        layouts = {
            "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "columns apart": lambda x: x.mT.contiguous().mT,
            "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
            "far rows": lambda x: F.pad(x, (0, 2048 - x.shape[-1]))[..., : x.shape[-1]],
            "odd start": lambda x: F.pad(x, (1, 2))[..., 1:-2],
        }
        for lay in layouts.values():
            for g, w in zip(backward(*map(lay, (q, k, v, do)), kernel=name, hi=3), wanted, strict=True):
                assert g is None or torch.equal(g, w)
    do = torch.ones((), dtype=dtype).expand(2, 4, 37, D)  # as from sum().backward()
    for g, w in zip(backward(q, k, v, do, kernel=name), backward(q, k, v, do.contiguous(), kernel=name), strict=True):
        assert g is None or torch.equal(g, w)


@rows()
def test_what_is_wanted_changes_nothing_else(row):
    dtype = DTYPES[row["dtype"]]
    q, k, v, do = operands(dtype, 1, 2, 1, 30, 40)
    wanted = dict(zip("qkv", backward(q, k, v, do, kernel=row["name"]), strict=False))
    for want in ("q", "k", "v", "qk", "kv", "qv", ""):
        got = dict(zip("qkv", backward(q, k, v, do, want=want, kernel=row["name"]), strict=False))
        assert all(torch.equal(got[n], wanted[n]) if n in want else got[n] is None for n in "qkv")


@rows()
def test_gradient_of_every_broadcast_mask(row):
    """Summed over any of the four dimensions; the softcap's slope is no part of it."""
    dtype = DTYPES[row["dtype"]]
    B, H, Lq, Lk = 2, 2, 9 * row["mr"], 230
    q, k, v, do = operands(dtype, B, H, 1, Lq, Lk, 4, 4)
    mask = torch.randn(B, H, Lq, Lk)
    options = {"kernel": row["name"], "hi": 20, "softcap": 2.0, "want": ""}
    expected = reference(q, k, v, do, mask, row=row, hi=20, softcap=2.0)
    for kept in itertools.product((False, True), repeat=4):
        shape = [n if keep else 1 for n, keep in zip((B, H, Lq, Lk), kept, strict=True)]
        assert_close(backward(q, k, v, do, mask, dmask=shape, **options), expected)


@rows()
def test_sequences_of_a_batch(row):
    """Each attends to itself alone; empty ones too, among queries, among keys, or both."""
    dtype = DTYPES[row["dtype"]]
    lengths_q, lengths_k = [7, 0, row["mr"] + 1, 3, 0], [9, 4, 40, 0, 0]
    q, _, _, do = operands(dtype, 1, 4, 2, sum(lengths_q), sum(lengths_k), 12, 10)
    _, k, v, _ = operands(dtype, 1, 4, 2, sum(lengths_q), sum(lengths_k), 12, 10)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)]) for n in (lengths_q, lengths_k))
    for options in ({}, {"hi": 0, "align_end": True}, {"lo": -3, "hi": 2, "dropout_p": 0.4, "seed": 9}):
        grads = backward(q, k, v, do, kernel=row["name"], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k.int(), **options)
        for s, (nq, nk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            a, b = slice(cu_q[s], cu_q[s] + nq), slice(cu_k[s], cu_k[s] + nk)
            part = grads[0][:, :, a], grads[1][:, :, b], grads[2][:, :, b]
            if nq == 0 or nk == 0:
                assert all((x == 0).all() for x in part)
                continue
            if "dropout_p" in options:  # drawn at the position in the sequence, which counts as the batch
                keep = torch.empty(s + 1, 4, nq, nk, dtype=torch.bool)
                _C.attention_keep(keep, dropout_p=0.4, seed=9)
                alone = dropped_reference(q[:, :, a], k[:, :, b], v[:, :, b], do[:, :, a], keep[s], options)
                for x, want in zip(part, alone, strict=True):
                    atol = 20 * max(UNIT_ROUNDOFF[dtype], sum(errors(row)))
                    torch.testing.assert_close(x.double(), want, rtol=0, atol=atol)
                continue
            assert_close(part, reference(q[:, :, a], k[:, :, b], v[:, :, b], do[:, :, a], row=row, **options))


def dropped_reference(query, key, value, dout, keep, options):
    q, k, v = (x.double().requires_grad_() for x in (query, key, value))
    s = q @ k.repeat_interleave(2, 1).mT * q.shape[3] ** -0.5
    s = s.masked_fill(~visible(*s.shape[2:], options["lo"], options["hi"]), -1e30)
    P = torch.softmax(s, -1) * (s > -1e29) * keep / (1 - options["dropout_p"])
    return torch.autograd.grad(P @ v.repeat_interleave(2, 1), (q, k, v), dout.double())


@rows()
def test_threads_are_no_part_of_the_result(row):
    """Many heads; few heads and many keys, cut into chunks; the gradient of a mask."""
    dtype, name = DTYPES[row["dtype"]], row["name"]
    long = 2200 if row["isa"] != "scalar" else 1100
    for sizes in ((2, 6, 3, 40, 60, 8, 8), (1, 2, 1, 20, long, 8, 4)):
        x = operands(dtype, *sizes)
        mask = torch.randn(1, 1, *sizes[3:5])
        dmask = (1, 1, 1, sizes[4])
        plan = _C.attention_plan(*x[:3], backward=True, kernel=name)
        assert plan["chunks"] == -(-sizes[4] // plan["chunk"]) and (plan["chunks"] > 1) == (sizes[4] > 1000)
        first = check(*x, mask, dmask=dmask, kernel=name, threads=1, hi=sizes[4] - 5)
        for threads in (2, 3, 5):
            again = backward(*x, mask, dmask=dmask, kernel=name, threads=threads, hi=sizes[4] - 5)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@rows()
def test_rows_that_see_nothing(row):
    """Zero gradients, whatever stands in them, and nothing from them."""
    dtype = DTYPES[row["dtype"]]
    q, k, v, do = operands(dtype, 1, 2, 1, 40, 30)
    mask = torch.rand(1, 1, 40, 30) > 0.3
    mask[..., 3:20, :] = False
    for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        grads = check(q, k, v, do, m.expand(1, 2, 40, 30), kernel=row["name"])
        assert (grads[0][:, :, 3:20] == 0).all()
    grads = backward(q, k, v, do, kernel=row["name"], lo=100)
    assert all((g == 0).all() for g in grads[:3])
    grads = backward(q, k, v, do, kernel=row["name"], lo=5, hi=-5)
    assert all((g == 0).all() for g in grads[:3])
    q, k, v, do = operands(dtype, 1, 2, 2, 10, 64)  # tiles of keys and blocks of rows that would see each other in part
    backward(q, k, v, do, kernel=row["name"])
    grads = backward(q, k, v, do, kernel=row["name"], lo=20, hi=8)
    assert all((g == 0).all() for g in grads[:3])


@rows()
def test_nan_and_infinity(row):
    """NaN reaches what it enters: its own row of dq, the keys that the row sees; other heads stay clean."""
    dtype, name = DTYPES[row["dtype"]], row["name"]
    for bad in (math.nan, math.inf):
        q, k, v, do = operands(dtype, 1, 2, 2, 20, 40)
        clean = backward(q, k, v, do, kernel=name, hi=0)
        q[0, 0, 7] = bad
        dq, dk, dv, _ = backward(q, k, v, do, kernel=name, hi=0)
        assert dq[0, 0, 7].isnan().all() and dk[0, 0, :8].isnan().all() and dv[0, 0, :8].isnan().all()
        if limited(row):  # the rows beside it are multiplied by FMA, too
            torch.testing.assert_close(dq[0, 0, :7], clean[0][0, 0, :7], rtol=0, atol=0.05)
            torch.testing.assert_close(dq[0, 0, 8:], clean[0][0, 0, 8:], rtol=0, atol=0.05)
        else:
            assert torch.equal(dq[0, 0, :7], clean[0][0, 0, :7]) and torch.equal(dq[0, 0, 8:], clean[0][0, 0, 8:])
        assert all(torch.equal(g[0, 1], c[0, 1]) for g, c in zip((dq, dk, dv), clean, strict=False))
        past = 32 if row["isa"] == "amx" else 20  # unseen keys of a tile are multiplied by zeros
        assert (dk[0, 0, past:] == 0).all() and (dv[0, 0, past:] == 0).all()
        q, k, v, do = operands(dtype, 1, 2, 2, 20, 40)
        do[0, 1, 4] = bad
        dq, dk, dv, _ = backward(q, k, v, do, kernel=name, hi=0)
        assert dq[0, 1, 4].isnan().all() and not dv[0, 1, :5].isfinite().any() and dk[0, 1, :5].isnan().all()
        assert all(g[0, 0].isfinite().all() for g in (dq, dk, dv)) and dq[0, 1, :4].isfinite().all()


@rows()
def test_dropout_of_everything(row):
    q, k, v, do = operands(DTYPES[row["dtype"]])
    assert all((g == 0).all() for g in backward(q, k, v, do, dropout_p=1.0, kernel=row["name"])[:3])


@rows()
def test_far_scores(row):
    """One key takes all, by 1e4; masked keys at the least finite value."""
    dtype = DTYPES[row["dtype"]]
    q, k, v, do = operands(dtype, 1, 1, 1, 20, 40, 8, 8)
    check(q, k, v, do, kernel=row["name"], scale=200.0)
    mask = torch.zeros(1, 1, 20, 40)
    mask[..., 11:] = torch.finfo(torch.float32).min
    grads = check(q, k, v, do, mask, dmask=mask.shape, kernel=row["name"])
    assert (grads[1][:, :, 11:] == 0).all() and (grads[2][:, :, 11:] == 0).all()


@rows()
def test_sizes_of_zero(row):
    dtype, name = DTYPES[row["dtype"]], row["name"]
    for B, H, Hkv, Lq, Lk in ((0, 2, 1, 4, 5), (1, 0, 0, 4, 5), (1, 0, 2, 4, 5), (1, 2, 1, 0, 5), (1, 2, 1, 4, 0)):
        q, k, v, do = operands(dtype, B, H, Hkv, Lq, Lk)
        out, lse = torch.zeros_like(do), torch.full((B, H, Lq, 2), -math.inf)
        grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
        _C.attention_backward(*grads, None, do, q, k, v, out, lse, scale=1.0, kernel=name)
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_quality_against_torch(dtype, causal):
    """rms of the error, relative to the size of its row's terms, against torch's own backward in that dtype."""
    q, k, v, do = operands(dtype, 1, 2, 2, 200, 257, 64, 64)
    if causal:
        k, v = k[:, :, :200], v[:, :, :200]
    options = {"hi": 0} if causal else {}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=causal), leaves, do)
    expected, _ = reference(q, k, v, do, **options)
    for name, ours, torchs, want in zip(NAMES, backward(q, k, v, do, **options), theirs, expected, strict=False):
        size = want.abs().mean(-1, keepdim=True) + 0.05 * want.abs().mean()
        a, b = ((x.double() - want) / size for x in (ours, torchs))
        assert a.square().mean().sqrt() <= QUALITY_FACTOR * b.square().mean().sqrt(), name
        if dtype != torch.float32:
            a, b = (x.square().mean(-1).sqrt() for x in (a, b))  # rows of dq hang on one rounding: that of delta
            assert (a <= ROW_QUALITY_FACTOR * (b + b.square().mean().sqrt())).all(), name


@rows()
def test_scratch_is_linear_in_the_lengths(row):
    """The formula of the plan, and twice the length at most twice the bytes."""
    dtype, unit = DTYPES[row["dtype"]], row["k_unit"]
    tiled, mr, nr = row["isa"] == "amx", row["mr"], row["nr"]

    def steps(n):
        return -(-n // row["k_step"]) * row["k_step"] // unit * row["planes"]

    def plan(L, **sizes):
        return _C.attention_plan(
            *operands(dtype, Lq=L, Lk=L, **sizes)[:3], backward=True, kernel=row["name"], threads=2
        )

    def buffer(floats):
        return -(-(floats * 4 + 64) // 4096) * 4096

    for L, D, Dv, H, Hkv in ((700, 64, 64, 4, 4), (1500, 40, 24, 2, 1), (3000, 16, 16, 16, 8)):
        p = plan(L, D=D, Dv=Dv, H=H, Hkv=Hkv)
        wide, dp, dvp = p["key_block"], -(-D // 16) * 16, -(-Dv // 16) * 16
        panel = {x: -(-x // row["nr"]) * row["nr"] for x in (D, Dv, L)}
        q_rows, strip = -(-L // 16) * 16 if tiled else L, (steps(mr) if tiled else mr) * (wide + 16)
        own = sum(buffer(q_rows * steps(d)) + buffer(steps(L) * panel[d]) for d in (D, Dv))
        own += buffer(wide * steps(D)) + buffer(steps(wide) * panel[D]) + buffer(wide * steps(Dv))
        own += 2 * buffer(p["strips"] * strip) + buffer(L)
        scores = mr * (wide + 16)
        own += (4 * buffer(max(scores, nr * max(dp, dvp))) if tiled else 2 * buffer(scores)) if unit == 2 else 0
        own += buffer(mr * (steps(wide) + 16)) if tiled else 0
        if limited(row):
            own += buffer(2 * -(-L // mr)) + buffer(14 * D) + buffer(14 * Dv) + buffer(wide * D) + buffer(wide * Dv)
            own += buffer(wide * panel[D])
        shared = -(-p["chunks"] * H * L * dp * 4 // 4096) * 4096 if p["chunks"] > 1 else 0
        keys = min(p["chunk"], panel[L]) if (H, Hkv) != (4, 4) else wide
        own += buffer(0 if p["chunks"] > 1 else L * dp) + buffer(keys * dp) + buffer(keys * dvp)
        assert p["workspace_bytes"] == shared + 2 * own
    assert plan(32768, D=32, H=1)["workspace_bytes"] <= 2.01 * plan(16384, D=32, H=1)["workspace_bytes"]


def test_refusals():
    q, k, v, do = operands(torch.float32)
    out, lse = forward(q, k, v, scale=1.0)
    mask = torch.zeros(1, 1, 5, 7)

    def call(dq=None, dmask=None, dout=do, lse=lse, out=out, m=None, **options):
        _C.attention_backward(dq, None, None, dmask, dout, q, k, v, out, lse, m, **{"scale": 1.0, **options})

    call(torch.empty_like(q))
    wrong = [
        ("'dq': expected shape", {"dq": torch.empty(1, 2, 5, 9)}),
        ("'dq': expected float32", {"dq": torch.empty(1, 2, 5, 8).half()}),
        ("'dq': expected unit stride", {"dq": torch.empty(1, 2, 8, 5).mT}),
        ("share memory", {"dq": torch.empty(1, 1, 5, 8).expand(1, 2, 5, 8)}),
        ("'dout': expected shape", {"dout": torch.empty(1, 2, 5, 7)}),
        ("'out': expected shape", {"out": torch.empty(1, 2, 7, 8)}),
        ("'lse'", {"lse": torch.empty(1, 2, 7, 2)}),
        ("'dmask': expected None", {"dmask": torch.empty(1, 1, 5, 7)}),
        ("'dmask': expected None", {"dmask": torch.empty(1, 1, 5, 7), "m": mask.bool()}),
        ("'dmask': expected", {"dmask": torch.empty(1, 1, 5, 6), "m": mask}),
        ("'dmask': expected float32", {"dmask": torch.empty(1, 1, 5, 7).bfloat16(), "m": mask}),
        ("meet|overlap|share", {"dq": q}),
        ("expected a tile kernel", {"kernel": "attention_f32_decode_scalar"}),
        ("expected operands of its dtype", {"kernel": "attention_f16_4x8_scalar"}),
    ]
    for message, options in wrong:
        with pytest.raises(RuntimeError, match=message):
            call(**options)


def test_calls_are_counted():
    q, k, v, do = operands(torch.float32)
    out, lse = forward(q, k, v, scale=1.0)
    name = _C.attention_plan(q, k, v, backward=True)["kernel"]
    before = _C.counters()[name]
    _C.attention_backward(torch.empty_like(q), None, None, None, do, q, k, v, out, lse, scale=1.0)
    assert _C.counters()[name] == before + 1
