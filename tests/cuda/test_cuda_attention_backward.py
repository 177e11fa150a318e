"""Gradients of attention on CUDA kernels, against float64 within the bounds of the CPU's tests; on every row."""

import itertools
import math

import pytest
import torch
from test_cuda_attention import DTYPES, attention, on

import fastdl.functional as fastdl_functional
from fastdl.ops import cuda
from fastdl.testing import GuardedOutput, twin
from test_attention_backward import BANDS, EXTRAS, MASKS, assert_close, reference

MODULE = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_depth = pytest.mark.parametrize("D", [20, 100, 200])  # one for each row of a dtype


@pytest.fixture(autouse=True)
def seeded_and_serial():
    torch.manual_seed(23)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(dtype, B=1, H=2, Hkv=None, Lq=5, Lk=7, D=8, Dv=None):
    """query, key, value, dout."""
    Hkv, Dv = H if Hkv is None else Hkv, D if Dv is None else Dv
    return [torch.randn(s).to(dtype) for s in ((B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), (B, H, Lq, Dv))]


def backward(gpu, query, key, value, dout, mask=None, *, dmask=None, want="qkv", **options):
    """dq, dk, dv, dmask; all NaN before the call, rows apart, with guards around. dmask: its shape."""
    options.setdefault("scale", query.shape[3] ** -0.5)
    out, lse = attention(gpu, query, key, value, mask, **options)
    leaves = {"q": query, "k": key, "v": value}
    guards = [GuardedOutput(tuple(x.shape), dtype=x.dtype) if n in want else None for n, x in leaves.items()]
    guards.append(GuardedOutput(tuple(dmask)) if dmask else None)
    grads = [None if g is None else on(gpu, g.view) for g in guards]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32, device=gpu.device)
    tensors = [on(gpu, x) for x in (query, key, value)]
    full = None if mask is None else mask.to(gpu.device).expand(-1, -1, query.shape[2], key.shape[2])
    plan = gpu.module.attention_plan(*tensors, full, backward=True, **options)
    scratch = torch.full((plan["workspace_bytes"],), 255, dtype=torch.uint8, device=gpu.device)
    inputs = (on(gpu, dout), *tensors, on(gpu, out), on(gpu, lse), full)
    gpu.module.attention_backward(*grads, *inputs, workspace=scratch, **options)
    for guard, grad in zip(guards, grads, strict=True):
        if guard is not None:
            if not gpu.is_twin:
                guard.view.copy_(grad)
            guard.assert_guards_intact()
    return [None if g is None else g.cpu() for g in grads]


def check(gpu, q, k, v, do, mask=None, **options):
    dmask = options.pop("dmask", None)
    grads = backward(gpu, q, k, v, do, mask, dmask=dmask, **options)
    assert_close(grads, reference(q, k, v, do, mask, **options))
    return grads


# --- exact ----------------------------------------------------------------------------------------------------------
@every_dtype
@every_depth
def test_equal_weights_give_the_mean_of_dout(gpu, dtype, D):
    """Scale 0: P = 1 / Lk exactly, dV = sum over queries of dO / Lk, dQ = dK = 0."""
    q, k, v, _ = operands(dtype, Lq=9, Lk=64, D=D)
    do = torch.randint(-3, 4, (*v.shape[:2], 9, D)).to(dtype)
    dq, dk, dv, _ = backward(gpu, q, k, v, do, scale=0.0)
    expected = (do.double().sum(2, keepdim=True) / 64).to(dtype).expand_as(dv)
    assert torch.equal(dv, expected)
    assert not dq.any() and not dk.any()


@pytest.mark.sanitized
@every_dtype
@every_depth
def test_odd_sizes_and_strides(gpu, dtype, D):
    """Small, and with sanitizers too: nothing is read or written beside the operands."""
    x = operands(dtype, H=2, Hkv=1, Lq=5, Lk=35, D=D, Dv=7)
    mask = torch.randn(1, 2, 1, 35)
    check(gpu, *x, mask, dmask=mask.shape, dropout_p=0.2, seed=3)


# --- tails ----------------------------------------------------------------------------------------------------------
@every_dtype
@every_depth
def test_tails(gpu, dtype, D):
    for Lq, Lk in [(1, 65), (63, 1), (64, 63), (65, 64), (33, 17), (15, 130)]:
        check(gpu, *operands(dtype, H=1, Lq=Lq, Lk=Lk, D=D, Dv=D // 3 + 1))


@every_dtype
def test_head_dimensions(gpu, dtype):
    for D, Dv in [(1, 1), (2, 3), (17, 15), (64, 80), (128, 63), (8, 129), (256, 31), (255, 256)]:
        check(gpu, *operands(dtype, H=1, Lq=18, Lk=21, D=D, Dv=Dv))


# --- options --------------------------------------------------------------------------------------------------------
@every_dtype
@pytest.mark.parametrize("band", BANDS)
def test_every_pair_of_options(gpu, dtype, band):
    for mask, extra in itertools.product(MASKS, EXTRAS):
        x = operands(dtype, 1, 2, 1, 21, 69, D=20, Dv=33)
        m = MASKS[mask](1, 2, 21, 69, dtype)
        dmask = tuple(m.shape) if mask in ("float", "same", "minus_inf") else None
        check(gpu, *x, m, dmask=dmask, **BANDS[band], **EXTRAS[extra])


@every_dtype
@pytest.mark.parametrize("lacking", ["", "B", "H", "q", "k", "BH", "qk", "BHqk"])
def test_gradient_of_a_mask_is_summed_where_it_is_broadcast(gpu, dtype, lacking):
    B, H, Lq, Lk = sizes = (2, 2, 70, 67)
    shape = tuple(1 if name in lacking else n for name, n in zip("BHqk", sizes, strict=True))
    x = operands(dtype, B, H, 1, Lq, Lk, D=12)
    check(gpu, *x, torch.randn(shape), dmask=shape, hi=40)


@every_dtype
@pytest.mark.parametrize("want", ["q", "k", "v", "kv", ""])
def test_only_what_is_wanted(gpu, dtype, want):
    for D in (20, 140):
        x = operands(dtype, D=D)
        grads = check(gpu, *x, want=want)
        assert [g is not None for g in grads[:3]] == [name in want for name in "qkv"]


@every_dtype
def test_grouped_queries(gpu, dtype):
    for H, Hkv in ((4, 1), (6, 2)):
        check(gpu, *operands(dtype, 2, H, Hkv, 19, 35, D=24), hi=0)


@every_dtype
def test_rows_that_see_nothing_have_no_gradient(gpu, dtype):
    x = operands(dtype, Lq=20, Lk=10)
    dq, _, _, _ = check(gpu, *x, lo=-3, hi=0)
    assert not dq[:, :, 13:].any()
    dq, dk, dv, _ = check(gpu, *x, torch.zeros(1, 1, 20, 10, dtype=torch.bool))
    assert not dq.any() and not dk.any() and not dv.any()


@every_dtype
def test_dropout_of_everything(gpu, dtype):
    grads = backward(gpu, *operands(dtype), dropout_p=1.0, seed=3)
    assert not any(g.any() for g in grads[:3])


@every_dtype
@every_depth
def test_a_key_that_infinity_hides(gpu, dtype, D):
    """-Inf in K where Q is positive: P is 0 there, and only dQ's sum over that column meets 0 * Inf."""
    q, k, v, do = operands(dtype, Lq=9, Lk=35, D=D)
    q, k = q.abs() + 0.1, k * 0.5
    k[0, 0, 17, 3] = -math.inf
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    P = torch.softmax(leaves[0] @ leaves[1].mT * D**-0.5, -1)
    wanted = torch.autograd.grad(P @ leaves[2], leaves, do.double())
    assert wanted[0].isnan().sum() == 9 and not any(x.isnan().any() for x in wanted[1:])
    for actual, expected in zip(backward(gpu, q, k, v, do), wanted, strict=False):
        assert torch.equal(actual.isnan(), expected.isnan()) and actual.isinf().sum() == 0
        there = ~expected.isnan()
        assert (actual.double() - expected)[there].abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


LAYOUTS = {
    "BSHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "column-major": lambda x: x.mT.contiguous().mT,
    "expanded heads": lambda x: x[:, :1].expand_as(x),
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(gpu, dtype, layout):
    x = operands(dtype, B=2, Lq=20, Lk=37, D=24, Dv=40)
    for which in range(4):
        check(gpu, *(layout(t) if which == i else t for i, t in enumerate(x)))


@every_dtype
def test_packed_sequences_are_as_each_alone(gpu, dtype):
    lengths_q, lengths_k = [5, 0, 70, 1, 33], [9, 4, 65, 0, 40]
    cu_q, cu_k = ([0, *itertools.accumulate(x)] for x in (lengths_q, lengths_k))
    for options in ({}, {"hi": 0, "align_end": True}):
        q, k, v, do = operands(dtype, H=4, Hkv=2, Lq=cu_q[-1], Lk=cu_k[-1], D=24, Dv=17)
        grads = backward(gpu, q, k, v, do, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
        for s in range(len(lengths_q)):
            at_q, at_k = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            part = [q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], do[:, :, at_q]]
            mine = [grads[0][:, :, at_q], grads[1][:, :, at_k], grads[2][:, :, at_k]]
            if lengths_q[s] and lengths_k[s]:
                assert_close(mine, reference(*part, **options))
            else:
                assert not any(g.any() for g in mine)


def test_wrong_offsets_touch_nothing_outside(gpu):
    for cu in ([0, 30, 20], [0, -5, 20], [5, 2, 1000], [-9, 40, 3]):
        backward(gpu, *operands(torch.bfloat16, H=1, Lq=20, Lk=20), cu_seqlens_q=cu, cu_seqlens_k=cu)


@every_dtype
@every_depth
def test_bits_do_not_depend_on_the_order(gpu, dtype, D):
    x = operands(dtype, H=2, Hkv=1, Lq=70 if D < 128 else 20, Lk=80, D=D)
    mask = torch.randn(1, 1, 1, 80)
    results = [backward(gpu, *x, mask, dmask=mask.shape) for _ in gpu.orders()]
    for grads in results[1:]:
        assert all(map(torch.equal, grads, results[0]))


def test_small_gradients_survive_float16(gpu):
    """dS far below float16's 6e-8: blocks are lifted by powers of two."""
    q, k, v, do = operands(torch.float16, H=1, Lq=40, Lk=300, D=16)
    do = do * 2.0**-12
    check(gpu, q, k, v, do)


# --- through Python -------------------------------------------------------------------------------------------------
def _module_grads(dtype, run, *x):
    leaves = [t.clone().requires_grad_() for t in x]
    out = run(*leaves)
    return out, torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functional_forward_and_backward(gpu, dtype):
    q, k, v, _ = operands(dtype, 2, 4, 2, 9, 33, D=16)
    mask = torch.randn(4, 1, 33)
    x = [t.to(gpu.device) for t in (q, k, v, mask)]

    def run(q, k, v, mask):
        return fastdl_functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    before = dict(gpu.module.__dict__)["attention"]
    assert before is not None
    out, grads = _module_grads(dtype, run, *x)
    double = [t.double() for t in (q, k, v, mask)]
    expected, wanted = _module_grads(torch.float64, run, *(t.to(gpu.device) for t in double))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip((out, *grads), (expected, *wanted), strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def test_varlen_through_python(gpu):
    cu = torch.tensor([0, 3, 3, 40], device=gpu.device)
    x = [torch.randn(40, 2, 8, device=gpu.device) for _ in range(3)]
    out, grads = _module_grads(None, lambda *x: fastdl_functional.attention_varlen(*x, cu, cu, is_causal=True), *x)
    double = [t.double() for t in x]
    expected, wanted = _module_grads(
        None, lambda *x: fastdl_functional.attention_varlen(*x, cu, cu, is_causal=True), *double
    )
    for a, b in zip((out, *grads), (expected, *wanted), strict=True):
        assert (a.double() - b).abs().max() <= 1e-5
    if gpu.is_twin:
        with pytest.raises(RuntimeError, match="cu_seqlens_q"):
            fastdl_functional.attention_varlen(*x, torch.tensor([0, 50, 40]), cu[[0, 1, 3]])


def test_dropout_is_the_seeds(gpu):
    x = [t.to(gpu.device) for t in operands(torch.float32, Lq=9, Lk=20)[:3]]
    torch.manual_seed(11)
    a = fastdl_functional.scaled_dot_product_attention(*x, dropout_p=0.4)
    b = fastdl_functional.scaled_dot_product_attention(*x, dropout_p=0.4)
    torch.manual_seed(11)
    assert torch.equal(fastdl_functional.scaled_dot_product_attention(*x, dropout_p=0.4), a) and not torch.equal(a, b)


def test_double_backward(gpu):
    x = [t.to(gpu.device).requires_grad_() for t in operands(torch.float32, Lq=5, Lk=6, D=4)[:3]]
    out = fastdl_functional.scaled_dot_product_attention(*x, dropout_p=0.3)
    (dq,) = torch.autograd.grad(out.sum(), x[:1], create_graph=True)
    second = torch.autograd.grad(dq.square().sum(), x)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in second)


@pytest.mark.skipif(MODULE is None or not MODULE.twin, reason="the host twin is not built")
def test_the_plan_is_shown():
    from fastdl.ops import attention as route

    q, k, v, _ = operands(torch.bfloat16)
    with twin():
        extras = (0.0, False, None, False, (-(2**63), 2**63 - 1), 0.0)
        assert route._plan(q, q, k, v, None, *extras) == "attention_bf16_decode_d128_sm80"
    assert math.isfinite(float(q.float().sum()))
