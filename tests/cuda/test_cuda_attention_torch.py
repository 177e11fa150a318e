"""Attention on CUDA kernels as torch sees it: registered operations, every pair of options with gradients, torch's
switch of float32's precision, GPUs whose shared memory is too small."""

import itertools

import pytest
import torch
from test_cuda_attention import MODULE, attention, needs_module
from test_cuda_attention import operands as forward_operands
from test_cuda_attention_backward import backward, operands
from torch.library import opcheck

from attention_reference64 import assert_forward_close, forward_reference
from fastdl.functional import attention_varlen, scaled_dot_product_attention
from fastdl.ops import calls, cuda_attention
from fastdl.ops.attention_reference import Options
from fastdl.testing import PRODUCT_ERROR
from test_attention_backward import assert_close, reference

PARTS = {"ieee": 3, "tf32": 2, "bf16": 1}


@pytest.fixture(autouse=True)
def seeded_and_serial():
    torch.manual_seed(31)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls.handbacks.clear()
    yield
    torch.set_num_threads(threads)


# --- registered operations ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(gpu, dtype):
    q, k, v = (torch.randn(s).to(dtype).to(gpu.device) for s in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    seed, ops = torch.tensor(5), torch.ops.fastdl
    for mask in (None, torch.randn(1, 4, 1, 7).to(dtype).to(gpu.device)):
        opcheck(ops.attention.default, (q, k, v, mask, None, None, None, *Options(0.3, hi=0, softcap=2.0), True))
        options = Options(0.3, dropout_p=0.3)
        opcheck(ops.attention.default, (turned, k, v, mask, None, None, seed, *options, False))
        out, lse = ops.attention(turned, k, v, mask, None, None, seed, *options, True)
        given = (out, turned, k, v, mask, out, lse, None, None, seed, *options, [True, True, False, mask is not None])
        opcheck(ops.attention_backward.default, given)
    packed = (x[:1].contiguous() for x in (q, k, v))
    cu = (torch.tensor(x, dtype=torch.int32, device=gpu.device) for x in ([0, 2, 5], [0, 4, 7]))
    opcheck(ops.attention.default, (*packed, None, *cu, None, *Options(0.3, align_end=True), True))


# --- every pair of options ------------------------------------------------------------------------------------------
CHOICES = {
    "causal": {"is_causal": True},
    "window": {"window": (4, 2)},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.3},
    "scale": {"scale": -0.4},
    "bool": {"attn_mask": lambda: torch.rand(2, 1, 6, 9) < 0.7},
    "float": {"attn_mask": lambda: torch.randn(4, 1, 9)},
    "grouped": {"enable_gqa": True},
}
PAIRS = [
    p
    for p in itertools.combinations(CHOICES, 2)
    if p not in (("causal", "bool"), ("causal", "float"), ("bool", "float"))
]


def graded(run, dtype, leaves, mask):
    """The result and the gradients of sum(result * ramp)."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    if mask is not None:
        mask = mask.to(dtype).requires_grad_() if mask.is_floating_point() else mask
        leaves += [mask] if mask.requires_grad else []
    torch.manual_seed(7)  # dropout's
    out = run(*leaves[:3], mask)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=out.device).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, ramp)]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_options_with_gradients(gpu, pair):
    options = {name: value for choice in pair for name, value in CHOICES[choice].items()}
    mask = options.pop("attn_mask", lambda: None)()
    heads = 2 if "grouped" in pair else 4
    leaves = [torch.randn(s).to(gpu.device) for s in ((2, 4, 6, 8), (2, heads, 9, 8), (2, heads, 9, 5))]
    mask = mask if mask is None else mask.to(gpu.device)

    def run(q, k, v, m):
        return scaled_dot_product_attention(q, k, v, m, **options)

    ours, expected = (graded(run, dtype, leaves, mask) for dtype in (torch.float32, torch.float64))
    assert not calls.handbacks
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= 2e-5 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(["causal", "window", "softcap", "dropout", "scale"], 2)), ids="-".join
)
def test_every_pair_of_options_of_packed_sequences(gpu, pair):
    options = {name: value for choice in pair for name, value in CHOICES[choice].items()}
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=gpu.device) for x in ([0, 3, 3, 10], [0, 2, 6, 14]))
    leaves = [torch.randn(s).to(gpu.device) for s in ((10, 4, 8), (14, 2, 8), (14, 2, 5))]

    def run(q, k, v, _):
        return attention_varlen(q, k, v, cu_q, cu_k, **options)

    ours, expected = (graded(run, dtype, leaves, None) for dtype in (torch.float32, torch.float64))
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= 2e-5 * max(1.0, b.abs().max().item())


# --- how exact products of float32 are ------------------------------------------------------------------------------
@pytest.mark.parametrize("Lq, D", [(3, 40), (70, 40), (3, 200)])
def test_fewer_parts_keep_their_promise(gpu, Lq, D):
    q, k, v = forward_operands(torch.float32, H=2, Lq=Lq, Lk=100, D=D)
    expected, _, S, _ = forward_reference(q, k, v)
    error = {}
    for precision in PARTS:
        out, _ = attention(gpu, q, k, v, precision=precision)
        error[precision] = ((out.double() - expected) / S).square().mean().sqrt().item()
        assert error[precision] <= 4 * PRODUCT_ERROR[precision]
    assert error["ieee"] < error["tf32"] / 16 and error["tf32"] < error["bf16"] / 16
    assert_forward_close(*attention(gpu, q, k, v, precision="fma"), q, k, v)  # all parts


@pytest.mark.parametrize("D", [20, 200])
def test_gradients_by_fewer_parts_are_within_their_bounds(gpu, D):
    x = operands(torch.float32, H=2, Hkv=1, Lq=35, Lk=70, D=D)
    mask = torch.randn(1, 1, 1, 70)
    results = {}
    for precision, parts in PARTS.items():
        row = {"dtype": "float32", "k_unit": 0, "precision": precision, "planes": parts}
        results[precision] = backward(gpu, *x, mask, dmask=mask.shape, precision=precision)
        assert_close(results[precision], reference(*x, mask, row=row))
    for a, b, c in zip(*results.values(), strict=True):
        assert (a - b).abs().max() < (a - c).abs().max() / 16


def test_products_of_one_part_are_those_of_bfloat16(gpu):
    """Operands that bfloat16 holds: scores are the same at any precision, so is O where P is."""
    q, k, v = (x.bfloat16().float() for x in forward_operands(torch.float32, H=2, Lq=9, Lk=64, D=24))
    full, lse = attention(gpu, q, k, v, scale=0.0)
    for precision in PARTS:
        assert torch.equal(attention(gpu, q, k, v, precision=precision)[1], attention(gpu, q, k, v)[1])
        again = attention(gpu, q, k, v, scale=0.0, precision=precision)
        assert torch.equal(again[0], full) and torch.equal(again[1], lse)


@pytest.fixture
def switch():
    """switch(value): torch.backends.cuda.matmul.fp32_precision, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda value: setattr(matmul, "fp32_precision", value)
    matmul.fp32_precision = before


def test_torchs_switch_is_asked_on_every_call(gpu, switch):
    q, k, v, do = (x.to(gpu.device) for x in operands(torch.float32, Lq=9, Lk=20, D=16))

    def run():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, do)]

    results = {}
    for asked in ("ieee", "tf32", "none"):
        switch(asked)
        results[asked] = run()
    assert all(map(torch.equal, results["ieee"], results["none"]))
    assert not any(map(torch.equal, results["ieee"], results["tf32"]))
    out, _ = attention(gpu, q.cpu(), k.cpu(), v.cpu(), precision="tf32")
    assert torch.equal(out, results["tf32"][0].cpu())
    with pytest.raises(RuntimeError, match="'precision': expected fma, ieee, tf32 or bf16"):
        attention(gpu, q.cpu(), k.cpu(), v.cpu(), precision="high")


@needs_module
def test_the_plan_says_how_exact():
    if not MODULE.twin:
        pytest.skip("plans of CPU tensors are the twin's")
    x = forward_operands(torch.float32, D=16)
    for backward_ in (False, True):
        assert " f32 tf32 " in MODULE.attention_plan(*x, precision="tf32", backward=backward_)["text"]
        assert "tf32" not in MODULE.attention_plan(*x, backward=backward_)["text"]


# --- small GPUs -----------------------------------------------------------------------------------------------------
@needs_module
def test_which_head_dimensions_a_small_gpu_takes():
    """sm_86, 89 and 120 have 99 KiB a block: all but float32 above 128."""
    for name, dtype, D in itertools.product(
        ("sm80", "sm86", "sm90"), ("float32", "bfloat16", "float16"), (1, 128, 129, 256)
    ):
        why = MODULE.attention_refusal(dtype=dtype, D=D, Dv=8, gpu=name)
        assert bool(why) == (name == "sm86" and dtype == "float32" and D > 128), (name, dtype, D, why)
        assert why == MODULE.attention_refusal(dtype=dtype, D=8, Dv=D, gpu=name)
        if MODULE.twin and not why:
            x = forward_operands(getattr(torch, dtype), Lq=9, Lk=300, D=D)
            for backward_ in (False, True):
                MODULE.attention_plan(*x, gpu=name, backward=backward_)


def test_what_a_gpu_has_no_room_for_is_torchs(gpu, monkeypatch):
    monkeypatch.setattr(
        cuda_attention, "_refusal", lambda D, Dv, device: gpu.module.attention_refusal(D=D, Dv=Dv, gpu="sm86")
    )
    wide = [torch.randn(1, 2, 5, 160, device=gpu.device) for _ in range(3)]
    assert scaled_dot_product_attention(*wide).shape == wide[0].shape
    assert any("bytes of shared memory" in reason for _, reason in calls.handbacks)
    calls.handbacks.clear()
    scaled_dot_product_attention(*(x.bfloat16() for x in wide))
    scaled_dot_product_attention(*(x[..., :128] for x in wide))
    assert not calls.handbacks
