"""fastdl.functional.linear with activation and residual: values, gradients, and the rest of torch around it."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from fastdl import _C
from fastdl.functional import linear
from fastdl.ops import calls, fused, reference, route
from fastdl.testing import integer_matrix

ACTIVATIONS = [None, *reference.ACTIVATIONS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Roundings of z, of the activation and of the sums behind each gradient, relative to the largest value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}

pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be inst:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def make(generator, shape=(6, 8), N=5, dtype=torch.float32):
    """Input, weight, bias and residual as leaves that require grad."""
    sizes = shape, (N, shape[-1]), (N,), (*shape[:-1], N)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def plain(x, w, b, residual, activation):
    return linear(x, w, b, activation=activation, residual=residual)


def general(x, w, b, residual, activation):
    return route.call(fused._LINEAR_FUSED, x, w, b, residual, constants=(activation, None))


def assert_near(actual, expected64, dtype):
    assert actual.dtype == dtype
    error = (actual.detach().double() - expected64.detach()).abs().max()
    assert error <= TOLERANCE[dtype] * expected64.detach().abs().max().clamp(min=1), error


@pytest.mark.parametrize("way", [plain, general], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given", ["bias", "residual", "both", "neither"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_and_gradients(way, given, activation, dtype, generator):
    x, w, b, residual = make(generator, dtype=dtype)
    b = b if given in ("bias", "both") else None
    residual = residual if given in ("residual", "both") else None
    leaves = [t for t in (x, w, b, residual) if t is not None]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in (x, w, b, residual)]
    y, expected = way(x, w, b, residual, activation), reference.linear_fused(*doubles, activation)
    assert_near(y, expected, dtype)
    with torch.no_grad():
        torch.testing.assert_close(way(x, w, b, residual, activation), y.detach(), rtol=0, atol=0)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    wanted = torch.autograd.grad(expected, [t for t in doubles if t is not None], dy.double())
    for grad, grad64 in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        assert_near(grad, grad64, dtype)
    assert not calls.handbacks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (17, 8), (2, 3, 8), (0, 8), (4, 0)], ids=str)
def test_relu_of_integers_is_exact(shape, dtype, generator):
    sizes = shape, (33, shape[-1]), (33,), (*shape[:-1], 33)
    x, w, b, residual = args = [integer_matrix(s, 64, generator, dtype).requires_grad_() for s in sizes]
    y = linear(x, w, b, activation="relu", residual=residual)
    doubles = [t.detach().double().requires_grad_() for t in args]
    expected = reference.linear_fused(*doubles, "relu")
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)
    dy = integer_matrix(y.shape, 64, generator, dtype)
    wanted = torch.autograd.grad(expected, doubles, dy.double())
    torch.testing.assert_close(torch.autograd.grad(y, args, dy), tuple(g.to(dtype) for g in wanted), rtol=0, atol=0)


def test_one_kernel_call_and_the_pre_activation_only_for_gradients(generator, monkeypatch):
    args = make(generator)
    seen = []
    native = _C.linear_fused

    def watch(out, input, weight, bias, activation, residual, pre, packed):
        seen.append(pre is not None)
        native(out, input, weight, bias, activation, residual, pre, packed)

    monkeypatch.setattr(_C, "linear_fused", watch)
    with torch.no_grad():
        plain(*args, "gelu")
    plain(*args, "gelu")
    plain(*args, None)
    assert seen == [False, True, False]


def test_residual_of_any_strides(generator):
    x, w, b, residual = make(generator)
    turned = residual.detach().t().contiguous().t()
    torch.testing.assert_close(plain(x, w, b, turned, "silu"), plain(x, w, b, residual, "silu"), rtol=0, atol=0)
    negative = torch.complex(torch.zeros(6, 5), -residual.detach()).conj().imag
    torch.testing.assert_close(plain(x, w, b, negative, "silu"), plain(x, w, b, residual, "silu"), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, generator):
    leaves = make(generator, (3, 4), 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *args: plain(*args, activation), leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *args: plain(*args, activation), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compile(activation, generator, compiled):
    args = make(generator)
    y, expected = compiled(plain)(*args, activation), reference.linear_fused(*args, activation)
    torch.testing.assert_close(y, expected)
    dy = torch.linspace(-1, 1, 30).view(6, 5)
    torch.testing.assert_close(torch.autograd.grad(y, args, dy), torch.autograd.grad(expected, args, dy))
    assert not calls.handbacks


@pytest.mark.parametrize("dims", [(0, None, None, 0), (None, 0, None, None), (None, None, None, 0), (0, 0, 0, 0)])
def test_vmap(dims, generator):
    args = [t.detach() for t in make(generator)]
    args = [t if dim is None else torch.stack([t, t + 1, t - 1]) for t, dim in zip(args, dims, strict=True)]

    def gradients(function, args):
        loss = torch.func.grad(lambda *args: function(*args, "gelu").square().sum(), (0, 1, 2, 3))
        values = torch.func.vmap(lambda *args: function(*args, "gelu"), dims)(*args)
        return *torch.func.vmap(loss, dims)(*args), values

    expected = gradients(reference.linear_fused, [t.double() for t in args])
    for ours, expected64 in zip(gradients(plain, args), expected, strict=True):
        assert_near(ours, expected64, torch.float32)


@pytest.mark.parametrize("save_pre", [False, True])
def test_opcheck(save_pre, generator):
    x, w, b, residual = (t.detach() for t in make(generator))
    opcheck(torch.ops.fastdl.linear_fused.default, (x, w, b, residual, "gelu", save_pre))
    opcheck(torch.ops.fastdl.linear_fused.default, (x, w, None, None, "relu", save_pre))
    opcheck(torch.ops.fastdl.activation_grad.default, (residual, residual + 1, "silu"))


def test_handed_back_composes_torchs_functions():
    x, w = torch.full((2, 3), -1.0, device="meta"), torch.ones(4, 3, device="meta")
    assert linear(x, w, activation="relu").shape == (2, 4)
    assert dict(calls.handbacks) == {("linear", "input is on meta"): 1}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation": "tanh"}, RuntimeError, "argument 'activation': expected None, 'relu', .* got 'tanh'"),
        ({"residual": 1.0}, TypeError, "argument 'residual': expected a torch.Tensor, got float"),
        (
            {"residual": torch.ones(5)},
            RuntimeError,
            r"'residual': expected the output's shape \[6, 5\], got shape \[5\]",
        ),
        ({"residual": torch.ones(6, 5).double()}, RuntimeError, "one dtype, got .* residual float64"),
    ],
)
def test_errors(arguments, error, message, grad, generator):
    x, w, b, _ = make(generator)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=f"^fastdl.linear: .*{message}"):
        linear(x, w, b, **arguments)


def test_autocast(generator):
    args = make(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = plain(*args, "gelu")
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.float().sum(), args)} == {torch.float32}
    assert_near(y, F.gelu(F.linear(*(t.double() for t in args[:3]))) + args[3].double(), torch.bfloat16)
