"""scaled_dot_product_attention and attention_varlen: values, gradients, every option, inputs that must not hurt."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from fastdl import _C
from fastdl.functional import attention_varlen, scaled_dot_product_attention
from fastdl.ops import attention_reference as reference
from fastdl.ops import calls
from fastdl.ops.attention_reference import Options
from fastdl.testing import assert_attention_within_bound, attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {  # of results against float64, whose values are of the order of 1
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(17)


def qkv(B=2, H=4, Hkv=None, Lq=5, Lk=7, D=8, Dv=None, dtype=torch.float32):
    """query, key, value: leaves."""
    Hkv = H if Hkv is None else Hkv
    sizes = (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D if Dv is None else Dv)
    return [torch.randn(s).to(dtype).requires_grad_() for s in sizes]


def run(function, leaves, *args, **options):
    """The value and the gradients of the leaves that take part, for one fixed gradient of the output."""
    out = function(*args, **options)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return out, torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))


def assert_same(ours, theirs, dtype=torch.float32):
    (out, grads), (expected, wanted) = ours, theirs
    assert out.shape == expected.shape and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected.double(), **TOLERANCE[dtype])
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.shape == want.shape and grad.isfinite().all()
        torch.testing.assert_close(grad.double(), want.double(), **TOLERANCE[dtype])


def against_reference(args, mask, dtype, **options):
    """The call, and the reference in float64, both with gradients."""
    leaves = [*args, mask]
    ours = run(scaled_dot_product_attention, leaves, *args, mask, **options)
    doubles = [x.detach().double().requires_grad_() for x in args]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().double().requires_grad_(mask.requires_grad)
    assert_same(ours, run(scaled_dot_product_attention, [*doubles, mask], *doubles, mask, **options), dtype)


# --- against torch ---------------------------------------------------------------------------------------------------
SHAPES = {
    "square": ((2, 3, 5, 8),) * 3,
    "cross": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "value_dim": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    "2d": ((5, 8), (7, 8), (7, 4)),
    "5d": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
    "6d_broadcast": ((2, 1, 2, 3, 5, 8), (1, 3, 1, 3, 7, 8), (2, 1, 1, 1, 7, 8)),
    "one_batch": ((4, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "one_head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one_value_head": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
    "one_query_head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "fewer_dims": ((2, 3, 5, 8), (7, 8), (3, 7, 8)),
    "decode": ((2, 3, 1, 8), (2, 3, 40, 8), (2, 3, 40, 8)),
    "odd": ((1, 2, 17, 33), (1, 2, 65, 33), (1, 2, 65, 31)),
    "head_dim_1": ((1, 2, 4, 1), (1, 2, 5, 1), (1, 2, 5, 1)),
    "head_dim_256": ((1, 1, 3, 256), (1, 1, 5, 256), (1, 1, 5, 256)),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_as_torch(sizes, causal):
    args = [torch.randn(s, requires_grad=True) for s in sizes]
    functions = scaled_dot_product_attention, F.scaled_dot_product_attention
    assert_same(*(run(f, args, *args, is_causal=causal) for f in functions))
    with torch.no_grad():
        torch.testing.assert_close(*(f(*args, scale=0.3, is_causal=causal) for f in functions), rtol=1e-4, atol=1e-5)
    assert not calls.handbacks


@pytest.mark.parametrize(
    "sizes",
    [(5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (1, 5, 7), (2, 4, 5, 7), (2, 1, 5, 7), (1, 4, 1, 7), (2, 1, 1, 7)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_as_torch(kind, sizes):
    args = qkv()
    mask = torch.randn(sizes, requires_grad=True) if kind == "float" else torch.rand(sizes) < 0.6
    functions = scaled_dot_product_attention, F.scaled_dot_product_attention
    assert_same(*(run(f, [*args, mask], *args, mask) for f in functions))
    assert not calls.handbacks


def test_masks_of_a_vector_broadcast():
    """torch's documentation allows what its code refuses with an IndexError."""
    args, mask = qkv(), torch.rand(7) < 0.6
    torch.testing.assert_close(
        scaled_dot_product_attention(*args, mask), scaled_dot_product_attention(*args, mask.expand(5, 7))
    )


def test_mask_of_many_leading_dimensions():
    args = [torch.randn(2, 3, 4, n, 8, requires_grad=True) for n in (5, 7, 7)]
    functions = scaled_dot_product_attention, F.scaled_dot_product_attention
    for lead in ((2, 3, 4), (2, 1, 1), (1, 3, 4), (1, 1, 1), (4,)):
        mask = torch.randn(*lead, 5, 7, requires_grad=True)
        try:
            theirs = run(functions[1], [*args, mask], *args, mask)
        except RuntimeError:  # torch flattens masks of this rank badly
            theirs = run(functions[1], [*args, mask], *args, mask.expand(2, 3, 4, 5, 7))
        assert_same(run(functions[0], [*args, mask], *args, mask), theirs)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (6, 3, 3), (4, 4, 4), (4, 2, 1), (4, 4, 2)], ids=str)
def test_grouped_heads_as_torch(heads):
    H, Hk, Hv = heads
    for lead in ((), (2,), (2, 3)):
        sizes = (*lead, H, 5, 8), (*lead, Hk, 7, 8), (*lead, Hv, 7, 8)
        args = [torch.randn(s, requires_grad=True) for s in sizes]
        functions = scaled_dot_product_attention, F.scaled_dot_product_attention
        assert_same(*(run(f, args, *args, enable_gqa=True) for f in functions))
    assert not calls.handbacks


# --- every pair of options, against float64 --------------------------------------------------------------------------
MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(1, 1, 9, 11) < 0.7,
    "bool_keys": lambda: torch.rand(2, 1, 1, 11) < 0.7,
    "float": lambda: torch.randn(4, 9, 11, requires_grad=True),
    "float_row": lambda: torch.randn(2, 1, 9, 1, requires_grad=True),
}
BANDS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, 1)},
    "left": {"window": (2, None)},
    "causal_window": {"is_causal": True, "window": (3, 5)},
    "none_in_sight": {"window": (0, 0)},
}
EXTRAS = {"": {}, "softcap": {"softcap": 1.5}, "scale": {"scale": -0.7}, "dropout": {"dropout_p": 0.3}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_option_pairs(extra, heads, dtype):
    for band, mask in itertools.product(BANDS, MASKS):
        if mask != "none" and "is_causal" in BANDS[band]:
            continue
        options = EXTRAS[extra] | BANDS[band] | {"enable_gqa": heads != 4}
        args, given = qkv(Hkv=heads, Lq=9, Lk=11, dtype=dtype), MASKS[mask]()
        state = torch.get_rng_state()
        leaves = [*args, given]
        ours = run(scaled_dot_product_attention, leaves, *args, given, **options)
        doubles = [x.detach().double().requires_grad_() for x in args]
        if given is not None and given.is_floating_point():
            given = given.detach().double().requires_grad_()
        torch.set_rng_state(state)  # the same dropout
        theirs = run(scaled_dot_product_attention, [*doubles, given], *doubles, given, **options)
        assert_same(ours, theirs, dtype)
    assert not calls.handbacks


def test_reference_is_torchs_math():
    """The oracle itself, against torch in float64."""
    args = qkv(Hkv=2, dtype=torch.float64)
    mask = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    out, lse = reference.attention(*args, mask, None, None, None, Options(0.4))
    expected = F.scaled_dot_product_attention(*args, mask, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    scores = 0.4 * args[0] @ args[1].repeat_interleave(2, 1).mT + mask
    torch.testing.assert_close(lse.sum(-1), scores.logsumexp(-1), rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(expected.sum(), args)
    written_out = reference.attention_backward(torch.ones_like(out), *args, mask, None, None, None, Options(0.4))
    torch.testing.assert_close(written_out[:3], grads, rtol=1e-10, atol=1e-10)


def test_softcap_and_window_mean_what_they_say():
    q, k, v = qkv(dtype=torch.float64)
    scores = q @ k.mT / math.sqrt(8)
    i, j = torch.arange(5)[:, None], torch.arange(7)
    seen = (j - i >= -2) & (j - i <= 1)
    expected = (2 * torch.tanh(scores / 2)).masked_fill(~seen, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, softcap=2.0, window=(2, 1)), expected)


# --- layouts ---------------------------------------------------------------------------------------------------------
ORDERS = {"BHLD": (0, 1, 2, 3), "BLHD": (0, 2, 1, 3), "LBHD": (2, 0, 1, 3), "HBLD": (1, 0, 2, 3), "BHDL": (0, 1, 3, 2)}


def laid_out(x, order):
    """The same values, dimensions in memory in this order."""
    inverse = [order.index(i) for i in range(4)]
    return x.detach().permute(order).contiguous().permute(inverse).requires_grad_()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_any_strides(order):
    args = qkv(Lq=6, Lk=9)
    expected = run(scaled_dot_product_attention, args, *args)
    ours = [laid_out(x, order) for x in args]
    assert_same(run(scaled_dot_product_attention, ours, *ours), expected)


@pytest.mark.parametrize("name", ["BHLD", "BLHD", "LBHD", "HBLD"])
def test_result_lies_as_query_does(name):
    order = ORDERS[name]
    args = [laid_out(x, order) for x in qkv(Lk=5, Dv=4)]
    out, grads = run(scaled_dot_product_attention, args, *args)
    assert out.permute(order).is_contiguous()
    if name == "BHLD":
        assert out.stride() == F.scaled_dot_product_attention(args[0], args[1], args[2]).stride()
    assert all(grad.permute(order).is_contiguous() for grad in grads)


def test_strides_that_overlap_skip_or_repeat():
    base = torch.randn(2, 4, 20, 24)
    q, k, v = (
        base[:, :, ::4, ::3],
        base[:, :1, 1:15:2, 2:10].expand(2, 4, 7, 8),
        base[:1, :, 1:8, 5:13].expand(2, 4, 7, 8),
    )
    for mask in (None, torch.randn(5, 14)[:, ::2]):
        reference64 = attention_reference(q, k, v, mask, scale=8**-0.5)
        assert_attention_within_bound(scaled_dot_product_attention(q, k, v, mask), reference64)
    negative = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negative.is_neg()
    plain = negative.resolve_neg()  # other strides than q's, so perhaps another kernel
    torch.testing.assert_close(
        scaled_dot_product_attention(negative, k, v), scaled_dot_product_attention(plain, k, v), rtol=0, atol=0
    )


def test_packed_projection_is_read_in_place():
    x = torch.randn(2, 5, 3 * 4 * 8, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in x.unflatten(-1, (3, 4, 8)).unbind(2))
    functions = scaled_dot_product_attention, F.scaled_dot_product_attention
    assert_same(*(run(f, [x], q, k, v, is_causal=True) for f in functions))


# --- dropout ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dropout_is_reproducible_and_the_same_in_backward(dtype):
    q, k, _ = (x.detach() for x in qkv(Lq=33, Lk=40, dtype=dtype))
    v = torch.ones(2, 4, 40, 8, dtype=dtype, requires_grad=True)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(scaled_dot_product_attention(q, k, v, dropout_p=0.4))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    # The output is linear in v: its gradient, times v, is the output again, dropped elements and all.
    (dv,) = torch.autograd.grad(outs[0].sum(), v)
    torch.testing.assert_close((dv * v).double().sum(), outs[0].double().sum(), rtol=2e-2, atol=1e-2)
    assert abs(outs[0].double().mean().item() - 1) < 0.05  # kept elements are scaled up
    assert not torch.equal(*(scaled_dot_product_attention(q, k, v, dropout_p=0.4) for _ in range(2)))


def test_dropout_keeps_what_it_says():
    keep = torch.ops.fastdl.attention_keep(torch.tensor(5), (2, 3, 64, 128), 0.25)
    assert abs(keep.double().mean().item() - 0.75) < 0.02
    for dim in (0, 1, 2):
        assert not torch.equal(*keep.unbind(dim)[:2])


def test_dropout_of_0_draws_nothing_and_of_1_gives_zeros():
    args = qkv()
    state = torch.get_rng_state()
    assert torch.equal(scaled_dot_product_attention(*args, dropout_p=0.0), scaled_dot_product_attention(*args))
    assert torch.equal(torch.get_rng_state(), state)
    for dtype in (torch.float32, torch.float64):
        args = qkv(dtype=dtype)
        out, grads = run(scaled_dot_product_attention, args, *args, dropout_p=1.0)
        assert (out == 0).all() and all((g == 0).all() for g in grads)


# --- packed sequences ------------------------------------------------------------------------------------------------
LENGTHS = [(3, 5), (0, 0), (4, 4), (1, 7), (6, 2), (0, 3), (2, 0)]


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (2, 1), "softcap": 2.0}, {"scale": 0.2, "window": (0, -1)}], ids=str
)
def test_varlen(options, index, dtype):
    q_lengths, k_lengths = zip(*LENGTHS, strict=True)
    q = torch.randn(sum(q_lengths), 4, 8).to(dtype).requires_grad_()
    k, v = (torch.randn(sum(k_lengths), 2, 8).to(dtype).requires_grad_() for _ in range(2))
    cu = offsets(q_lengths, index), offsets(k_lengths, index)
    ours = run(attention_varlen, [q, k, v], q, k, v, *cu, **options)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]

    def one_by_one(q, k, v):
        outs = []
        parts = (x.split(lengths) for x, lengths in zip((q, k, v), (q_lengths, k_lengths, k_lengths), strict=True))
        for a, b, c in zip(*parts, strict=True):
            i, j = torch.arange(len(a))[:, None] + len(b) - len(a), torch.arange(len(b))
            left, right = options.get("window", (-1, -1))
            seen = (j - i >= (-left if left >= 0 else -99)) & (j - i <= (right if right >= 0 else 99))
            seen &= (j <= i) if options.get("is_causal") else True
            rest = {"scale": options.get("scale"), "softcap": options.get("softcap"), "enable_gqa": True}
            a, b, c = (x.transpose(0, 1) for x in (a, b, c))
            outs.append(scaled_dot_product_attention(a, b, c, seen, **rest).transpose(0, 1))
        return torch.cat(outs)

    assert_same(ours, run(one_by_one, doubles, *doubles), dtype)
    assert ours[0].is_contiguous()
    assert not calls.handbacks


def test_varlen_dropout():
    x = torch.randn(9, 2, 8)
    v = torch.ones(9, 2, 8, requires_grad=True)
    cu = offsets((4, 0, 5))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention_varlen(x, x, v, cu, cu, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    (dv,) = torch.autograd.grad(outs[0].sum(), v)
    torch.testing.assert_close((dv * v).sum(), outs[0].sum())
    torch.manual_seed(1)
    double = attention_varlen(x.double(), x.double(), v.double(), cu, cu, dropout_p=0.5)
    torch.testing.assert_close(outs[0].double(), double, rtol=1e-4, atol=1e-5)


def test_varlen_hand_backs_compute_the_same():
    q, k, v = (torch.randn(9, 2, n) for n in (300, 300, 8))
    cu = offsets((4, 5))
    out = attention_varlen(q, k, v, cu, cu, is_causal=True)
    for rows in (slice(0, 4), slice(4, 9)):
        part = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
        causal = torch.ones(out[rows].shape[0], out[rows].shape[0], dtype=torch.bool).tril()
        assert_attention_within_bound(
            out[rows].transpose(0, 1)[None], attention_reference(*part, causal, scale=300**-0.5)
        )
    assert {reason for _, reason in calls.handbacks} == {"head dimension 300: the kernels take 1 to 256"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 4]}, TypeError, "'cu_seqlens_q': expected a torch.Tensor, got list"),
        ({"cu_seqlens_q": torch.tensor([0.0, 4.0])}, RuntimeError, "'cu_seqlens_q': expected int32 or int64"),
        ({"cu_seqlens_q": torch.tensor(4)}, RuntimeError, r"'cu_seqlens_q': expected 1 dimension"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 4])}, RuntimeError, "'cu_seqlens_k': expected 3 entries"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, RuntimeError, "cu_seqlens_q"),
        ({"cu_seqlens_k": torch.tensor([0, 3])}, RuntimeError, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.tensor([1, 4])}, RuntimeError, "cu_seqlens_k"),
        ({"query": torch.ones(4, 8)}, RuntimeError, "'query': expected 3 dimensions"),
        ({"key": torch.ones(4, 2, 7)}, RuntimeError, r"'key': expected \[..., 8\]"),
        ({"value": torch.ones(3, 2, 8)}, RuntimeError, r"'value': expected \[4, 2, Ev\]"),
        ({"key": torch.ones(4, 3, 8), "value": torch.ones(4, 3, 8)}, RuntimeError, "'key': expected a number of heads"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_varlen_errors(change, error, message, dtype):
    x, cu = torch.ones(4, 2, 8), torch.tensor([0, 4])
    given = {"query": x, "key": x, "value": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu} | change
    given = {name: t.to(dtype) if name in ("query", "key", "value") else t for name, t in given.items()}
    with pytest.raises(error, match=rf"^fastdl\.\w+: .*{message}"):
        attention_varlen(**given)


@pytest.mark.parametrize("cu", [[0, 3, 2, 4], [0, 5, 4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_varlen_offsets_that_decrease(cu, dtype):
    x, cu = torch.ones(4, 2, 8, dtype=dtype), torch.tensor(cu)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        attention_varlen(x, x, x, cu, cu)


# --- inputs that must not hurt ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": [1.0]}, TypeError, "'key': expected a torch.Tensor, got list"),
        ({"attn_mask": [1.0]}, TypeError, "'attn_mask': expected a torch.Tensor, got list"),
        ({"key": torch.ones(2, 4, 7, 9)}, RuntimeError, r"'key': expected \[..., 8\]"),
        ({"value": torch.ones(2, 4, 6, 8)}, RuntimeError, r"'value': expected \[..., 7, Ev\]"),
        ({"key": torch.ones(2, 3, 7, 8)}, RuntimeError, "'key': expected 4 heads"),
        ({"value": torch.ones(2, 2, 7, 8)}, RuntimeError, "'value': expected 4 heads"),
        ({"key": torch.ones(2, 3, 7, 8), "enable_gqa": True}, RuntimeError, "'key': .* heads that divides query's 4"),
        ({"key": torch.ones(3, 4, 7, 8)}, RuntimeError, "'key': expected leading dimensions that broadcast"),
        ({"query": torch.ones(8)}, RuntimeError, "'query': expected at least 2 dimensions"),
        ({"query": torch.tensor(1.0)}, RuntimeError, "'query': expected at least 2 dimensions"),
        ({"key": torch.ones(2, 4, 7, 8).double()}, RuntimeError, "one dtype, got query float32, key float64"),
        ({"key": torch.ones(2, 4, 7, 8, device="meta")}, RuntimeError, "one device"),
        ({"attn_mask": torch.ones(5, 7, device="meta")}, RuntimeError, "one device"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, RuntimeError, "'attn_mask': expected bool, float32 or"),
        ({"attn_mask": torch.ones(5, 7).double()}, RuntimeError, "'attn_mask': expected bool, float32 or"),
        ({"attn_mask": torch.ones(5, 7).bfloat16()}, RuntimeError, "'attn_mask': expected bool, float32 or"),
        ({"attn_mask": torch.ones(4, 7)}, RuntimeError, r"'attn_mask': .* broadcasts to \[2, 4, 5, 7\]"),
        ({"attn_mask": torch.ones(1, 2, 4, 5, 7)}, RuntimeError, r"'attn_mask': .* broadcasts to \[2, 4, 5, 7\]"),
        ({"attn_mask": torch.ones(5, 7), "is_causal": True}, RuntimeError, "'attn_mask': expected None with is_causal"),
        ({"dropout_p": 1.5}, RuntimeError, "'dropout_p': expected a probability from 0 to 1, got 1.5"),
        ({"dropout_p": -1.0}, RuntimeError, "'dropout_p': expected a probability"),
        ({"dropout_p": math.nan}, RuntimeError, "'dropout_p': expected a probability"),
        ({"softcap": -1.0}, RuntimeError, "'softcap': expected None or a finite number >= 0"),
        ({"softcap": math.inf}, RuntimeError, "'softcap': expected None or a finite number >= 0"),
        ({"window": 3}, TypeError, r"'window': expected None or \(left, right\)"),
        ({"window": (1, 2.0)}, TypeError, "'window': expected two of int or None"),
        ({"window": (-2, 0)}, RuntimeError, "'window': expected sizes of at least 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_errors(change, error, message, grad):
    given = {"query": torch.ones(2, 4, 5, 8), "key": torch.ones(2, 4, 7, 8), "value": torch.ones(2, 4, 7, 8)}
    given["query"].requires_grad_(grad)
    with pytest.raises(error, match=rf"^fastdl\.scaled_dot_product_attention: .*{message}"):
        scaled_dot_product_attention(**given | change)
    assert not calls.handbacks


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 3, 0, 7), (2, 3, 5, 0), (2, 0, 5, 7), (0, 3, 5, 7), (0, 0, 0, 0), (2, 3, 0, 0)], ids=str
)
def test_empty(sizes, dtype):
    B, H, Lq, Lk = sizes
    args = qkv(B, H, None, Lq, Lk, 8, 4, dtype)
    for options in ({}, {"is_causal": True}, {"dropout_p": 0.5}, {"window": (1, 1)}):
        out, grads = run(scaled_dot_product_attention, args, *args, **options)
        assert out.shape == (B, H, Lq, 4) and (out == 0).all()
        assert all((g == 0).all() for g in grads)
    mask = torch.zeros(Lq, Lk, dtype=dtype, requires_grad=True)
    out, grads = run(scaled_dot_product_attention, [*args, mask], *args, mask)
    assert (out == 0).all() and grads[3].shape == (Lq, Lk)


def test_head_dimensions_beyond_the_kernels_go_to_torch():
    for D, Dv in ((257, 8), (8, 300), (0, 8)):
        args = qkv(D=D, Dv=Dv)
        torch.testing.assert_close(
            scaled_dot_product_attention(*args, scale=0.1), F.scaled_dot_product_attention(*args, scale=0.1)
        )
        options = {"window": (2, 1), "softcap": 3.0, "scale": 0.1}
        out = scaled_dot_product_attention(*args, **options)
        expected = scaled_dot_product_attention(*(x.double() for x in args), **options)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert {op for op, _ in calls.handbacks} == {"scaled_dot_product_attention"}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "window"])
def test_rows_that_see_nothing_are_zero(kind, dtype):
    args = qkv(Lq=6, dtype=dtype)
    hidden = torch.zeros(6, 7, dtype=torch.bool)
    hidden[2] = hidden[5] = True
    mask, options = ~hidden, {}
    if kind == "float":
        mask = torch.zeros(6, 7, dtype=dtype).masked_fill(hidden, -math.inf).requires_grad_()
    elif kind == "window":  # keys from 7 on do not exist
        args = qkv(Lq=12, dtype=dtype)
        mask, options, hidden = None, {"window": (2, 0)}, torch.arange(12)[:, None] - 2 > torch.arange(7)
        hidden = hidden.all(1, keepdim=True).expand(12, 7)
    out, grads = run(scaled_dot_product_attention, [*args, mask], *args, mask, **options)
    dead = hidden.all(1)
    assert dead.any() and (out[:, :, dead] == 0).all() and (out[:, :, ~dead] != 0).any()
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, dead] == 0).all()
    if kind == "float":
        assert (grads[3][dead] == 0).all()


def test_masks_of_the_lowest_number_are_no_holes():
    """As torch: a row of finfo.min is a row of equal scores.

    Its gradients: the test below.
    """
    for dtype in DTYPES:
        args = [x.detach() for x in qkv(dtype=dtype)]
        mask = torch.full((5, 7), torch.finfo(dtype).min, dtype=dtype)
        mask[0, 3] = 0
        doubles = [x.double() for x in (*args, mask)]
        expected = scaled_dot_product_attention(*doubles)
        torch.testing.assert_close(scaled_dot_product_attention(*args, mask).double(), expected, **TOLERANCE[dtype])
        mask[1:, 2:4] = 0
        against_reference(qkv(dtype=dtype), mask, dtype)


def test_gradients_of_rows_of_the_lowest_number():
    args = qkv()
    mask = torch.full((5, 7), torch.finfo(torch.float32).min)
    mask[0, 3] = 0
    against_reference(args, mask, torch.float32)


def test_extreme_scores():
    q, k, v = (x.detach() for x in qkv())
    expected = F.scaled_dot_product_attention(q * 1e20, k, v)
    torch.testing.assert_close(scaled_dot_product_attention(q * 1e20, k, v), expected)
    mask = torch.zeros(5, 7)
    mask[1, 2], mask[2, 3] = math.inf, math.nan
    out = scaled_dot_product_attention(q, k, v, mask)
    assert out[:, :, 1:3].isnan().all() and not out[:, :, [0, 3, 4]].isnan().any()
    for x in (q, k, v):
        x[0, 1, 2, 3] = math.nan
        out = scaled_dot_product_attention(q, k, v)
        expected = scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert torch.equal(out.isnan(), expected.isnan())
        x[0, 1, 2, 3] = 0


def test_changed_in_place_between_forward_and_backward():
    q, k, v = qkv()
    out = scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = scaled_dot_product_attention(q, k, v)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_only_where_wanted():
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [*qkv(), torch.randn(4, 5, 7)]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(leaves, wanted, strict=True)]
        functions = scaled_dot_product_attention, F.scaled_dot_product_attention
        assert_same(*(run(f, leaves, *leaves) for f in functions))


def test_every_plain_call_runs_one_kernel():
    args = qkv()
    _C.reset_counters()
    with torch.no_grad():
        scaled_dot_product_attention(*args, torch.rand(5, 7) < 0.7)
    assert sum(_C.counters().values()) == 1
    scaled_dot_product_attention(*args, dropout_p=0.1).sum().backward()
    assert sum(_C.counters().values()) == 3
    assert not calls.handbacks


@pytest.mark.parametrize("B, H", [(0, 2), (2, 0)])
def test_the_gradient_of_a_mask_of_no_heads_is_zero(B, H):
    q, k, v = (torch.randn(B, H, 64, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 64, 64, requires_grad=True)
    for _ in range(4):
        filled = torch.full((1, 1, 64, 64), 7.0)  # memory that the gradient is likely to be given
        del filled
        scaled_dot_product_attention(q, k, v, mask).sum().backward()
        assert not mask.grad.any()


@pytest.mark.parametrize("length", [2**40, 2**47])
@pytest.mark.parametrize("rows", [4, 300])
def test_keys_that_take_no_memory(rows, length):
    """An expanded key of any length: computed where few of its rows are seen, or refused, and no size overflows."""
    q, k = torch.randn(1, 1024 if rows == 4 else 1, rows, 16), torch.randn(16)
    many = k.expand(1, 1, length, 16)
    expected = torch.zeros_like(q) + k  # of equal keys the values' mean, whatever the weights
    try:
        out = scaled_dot_product_attention(q, many, many, is_causal=True, enable_gqa=True)
    except MemoryError:
        return
    torch.testing.assert_close(out, expected)
