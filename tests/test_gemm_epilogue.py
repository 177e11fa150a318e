"""linear_fused and activation_grad against torch.nn.functional and autograd in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from conftest import DTYPES, every_dtype
from fastdl import _C, testing
from fastdl.testing import GuardedOutput

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
GRADIENT_ERROR = 2e-6
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def problem(M, N, K, dtype, generator):
    """x [M, K], weight [N, K], bias [N], residual [M, N]; z of order 1 with some far in the tails."""
    x = torch.randn(M, K, generator=generator) * torch.linspace(0.1, 6, M).unsqueeze(1)
    weight = torch.randn(N, K, generator=generator) / math.sqrt(K)
    rest = torch.randn(N, generator=generator), torch.randn(M, N, generator=generator)
    return [t.to(dtype) for t in (x, weight, *rest)]


def check_fused(x, weight, bias, activation, residual, with_pre, kernel="", threads=0, precision="ieee"):
    """One call against float64: out within the bound, pre the z that the activation saw, guards intact."""
    (M, _), N, dtype = x.shape, weight.shape[0], x.dtype
    out, pre = GuardedOutput((M, N), dtype=dtype), GuardedOutput((M, N), dtype=dtype)
    beside = GuardedOutput((M, N), dtype=dtype)  # residual and pre lie as out does
    if residual is not None:
        beside.view.copy_(residual)
    _C.linear_fused(
        out.view,
        x,
        weight,
        bias,
        activation,
        beside.view if residual is not None else None,
        pre.view if with_pre else None,
        kernel=kernel,
        threads=threads,
    )
    reference = testing.gemm_reference(x, weight.t(), bias)
    z = reference.expected
    add = torch.zeros_like(z) if residual is None else residual.double()
    expected = ACTIVATIONS[activation](z) + add
    bound = testing.epilogue_bound(reference, expected, add, dtype, precision=precision)
    error = (out.view.double() - expected).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max().item():.3f} times the bound"
    if with_pre:
        testing.assert_within_bound(pre.view, reference, precision=precision)
    else:
        assert bool(pre.view.isnan().all())
    for guarded in (out, pre, beside):
        guarded.assert_guards_intact()
    return out.view


@every_activation
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("with_pre", [False, True], ids=["", "pre"])
def test_every_row_of_the_table(kernel, activation, with_residual, with_pre, generator):
    """Tails of the tile in M and N, K of one and of several blocks, with and without a bias."""
    mr, nr, dtype = kernel["mr"], kernel["nr"], DTYPES[kernel["dtype"]]
    for M, N, K in ((1, 1, 1), (mr, nr, 33), (mr + 1, nr + 1, 70), (2 * mr + 1, 2 * nr - 1, 1100), (3, 5 * nr + 3, 17)):
        x, weight, bias, residual = problem(M, N, K, dtype, generator)
        for b in (None, bias):
            added = residual if with_residual else None
            check_fused(x, weight, b, activation, added, with_pre, kernel["name"], precision=kernel["precision"])


@every_dtype
@every_activation
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_default_kernel_gives_the_same_bits_at_any_team(dtype, activation, with_residual, generator):
    for M, N, K in ((1, 900, 700), (5, 300, 64), (150, 260, 300)):
        x, weight, bias, residual = problem(M, N, K, dtype, generator)
        residual = residual if with_residual else None
        results = [check_fused(x, weight, bias, activation, residual, True, threads=n) for n in (1, 2, 3)]
        assert all(torch.equal(results[0], other) for other in results[1:]), (M, N, K)


def test_without_an_epilogue_it_is_linear(kernel, generator):
    dtype = DTYPES[kernel["dtype"]]
    x, weight, bias, _ = problem(40, 70, 90, dtype, generator)
    fused, plain = (torch.empty(40, 70, dtype=dtype) for _ in range(2))
    _C.linear_fused(fused, x, weight, bias, kernel=kernel["name"])
    _C.linear(plain, x, weight, bias, kernel=kernel["name"])
    assert torch.equal(fused, plain)


def test_a_subnormal_bias_is_written_as_it_is(kernel):
    """Where products are zero: what narrows sums must not flush them."""
    dtype = DTYPES[kernel["dtype"]]
    bias = (torch.arange(1, 71) * torch.finfo(dtype).smallest_normal / 128).to(dtype)
    out = torch.empty(40, 70, dtype=dtype)
    _C.linear(out, torch.zeros(40, 90, dtype=dtype), torch.zeros(70, 90, dtype=dtype), bias, kernel=kernel["name"])
    assert bool((bias != 0).all()) and torch.equal(out, bias.expand(40, 70))


@every_dtype
def test_pre_is_linear(dtype, generator):
    x, weight, bias, residual = problem(40, 70, 90, dtype, generator)
    out, pre, plain = (torch.empty(40, 70, dtype=dtype) for _ in range(3))
    _C.linear_fused(out, x, weight, bias, "gelu", residual, pre)
    _C.linear(plain, x, weight, bias)
    assert torch.equal(pre, plain)


@every_dtype
@pytest.mark.parametrize("K", [0, 3])
def test_leading_dimensions_and_gaps(dtype, K, generator):
    """3-D input; out, residual and pre with gaps between rows and matrices; K = 0 leaves the bias."""
    x = torch.randn(4, 5, K, generator=generator).to(dtype)
    weight, bias = torch.randn(18, K, generator=generator).to(dtype), torch.randn(18, generator=generator).to(dtype)
    out, residual, pre = (torch.ones(5, 3, 4, 30, dtype=dtype)[:, 1, :, 4:22].transpose(0, 1) for _ in range(3))
    _C.linear_fused(out, x, weight, bias, "relu", residual, pre)
    z = x.double() @ weight.double().t() + bias.double()
    tolerance = 4 * testing.UNIT_ROUNDOFF[dtype]
    torch.testing.assert_close(pre.double(), z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.double(), z.relu() + 1, rtol=tolerance, atol=tolerance)


@every_dtype
@every_activation
def test_special_values(dtype, activation):
    """NaN goes through; Inf and large z give what torch gives: x, 0, or NaN for -Inf * 0."""
    z = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 60000.0, -60000.0, 1e3, -1e3] * 3)
    z = z.to(dtype)
    out = torch.empty(1, len(z), dtype=dtype)
    _C.linear_fused(out, torch.ones(1, 0, dtype=dtype), torch.ones(len(z), 0, dtype=dtype), z, activation)
    expected = ACTIVATIONS[activation](z.double()).to(dtype)
    torch.testing.assert_close(out[0], expected, rtol=0, atol=0, equal_nan=True)


@every_dtype
@every_activation
def test_gradient_on_a_dense_grid(dtype, activation):
    """dy * slope, slope within 2e-6 of autograd in float64 on every 2^-10 of [-20, 20]; 16 bits: rounded once."""
    z = torch.linspace(-20, 20, 40 * 1024 + 1).to(dtype)
    grad = torch.linspace(-2, 2, 97).to(dtype).repeat(len(z) // 97 + 1)[: len(z)]
    z64 = z.double().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](z64).sum(), z64)
    expected = expected * grad.double()
    results = []
    for threads in (1, 2, 3):
        out = torch.empty_like(z)
        _C.activation_grad(out, grad, z, activation, threads=threads)
        results.append(out)
    bound = GRADIENT_ERROR * grad.double().abs()
    if dtype != torch.float32:
        info = torch.finfo(dtype)
        bound = bound + testing.UNIT_ROUNDOFF[dtype] * (expected.abs() + bound) + info.smallest_normal * info.eps / 2
    error = (results[0].double() - expected).abs()
    assert bool((error <= bound).all()), (z[(error - bound).argmax()], error.max())
    assert all(torch.equal(results[0], other) for other in results[1:])


@every_dtype
@every_activation
def test_gradient_at_special_values(dtype, activation):
    """At zeros of either sign and far out; NaN where torch's own gradient of a NaN is one."""
    z = torch.tensor([0.0, -0.0, math.nan, 1e3, -1e3, 6e4, -6e4] * 5).to(dtype)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](leaf).sum(), leaf)
    out = torch.empty_like(z)
    _C.activation_grad(out, torch.ones_like(z), z, activation)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@every_dtype
@every_activation
@pytest.mark.parametrize("count", [0, 1, 3, 15, 16, 17, 33, 1023, 1025])
def test_gradient_tails(dtype, activation, count, generator):
    """Any count, nothing written behind it; far out the slope is 0 or 1."""
    z = torch.randn(count, generator=generator).to(dtype) * 300
    z[:1] = 0
    grad = torch.randn(count, generator=generator).to(dtype)
    memory = torch.full((count + 40,), 7.0, dtype=dtype)
    _C.activation_grad(memory[20 : 20 + count], grad, z, activation)
    z64 = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](z64).sum(), z64)
    tolerance = max(GRADIENT_ERROR, testing.UNIT_ROUNDOFF[dtype])
    torch.testing.assert_close(
        memory[20 : 20 + count].double(), slope * grad.double(), rtol=tolerance, atol=GRADIENT_ERROR
    )
    assert bool((memory[:20] == 7).all()) and bool((memory[20 + count :] == 7).all())


@pytest.mark.parametrize("argument", ["residual", "pre"])
@pytest.mark.parametrize("shift", [0, 4, 15])
def test_out_must_not_overlap(argument, shift):
    memory = torch.zeros(100)
    out, other = memory[20:36].view(4, 4), memory[20 + shift : 36 + shift].view(4, 4)
    with pytest.raises(RuntimeError, match=rf"linear.*\bout\b.*\b{argument}\b"):
        _C.linear_fused(out, torch.zeros(4, 3), torch.zeros(4, 3), None, "relu", **{argument: other})


@pytest.mark.parametrize("argument", ["input", "weight", "bias", "residual"])
def test_pre_must_not_overlap_an_input(argument):
    """pre is an output too: what it overwrites must not be read after."""
    shapes = {"out": (4, 4), "input": (4, 4), "weight": (4, 4), "bias": (4,), "residual": (4, 4)}
    args = {name: torch.ones(shape) for name, shape in shapes.items()}
    memory = torch.ones(16)
    args[argument] = memory[: args[argument].numel()].view(shapes[argument])
    with pytest.raises(RuntimeError, match=r"linear.*\bpre\b"):
        _C.linear_fused(**args, activation="relu", pre=memory.view(4, 4))


def test_gradient_must_not_overlap_its_inputs():
    for which in ("grad", "pre"):
        with pytest.raises(RuntimeError, match=rf"activation_grad.*\b{which}\b"):
            args = {"grad": torch.ones(6), "pre": torch.ones(6)}
            _C.activation_grad(args[which], **args, activation="relu")
