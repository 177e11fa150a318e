"""Convolutions inside the rest of torch: the compiler, autograd, torch.func, autocast, modes and tracers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastdl
from fastdl import functional
from fastdl.ops import calls, conv_shapes
from fastdl.testing import UNIT_ROUNDOFF

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(3)


@pytest.fixture
def compiled():
    """compiled(function, **options): torch.compile with fullgraph=True on a fresh compiler."""
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)
    torch._dynamo.reset()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- operations ---------------------------------------------------------------------------------------------------
def samples():
    """(input, weight, bias, residual, geometry, activation, channels_last) of torch.ops.fastdl.conv."""
    ones, zeros = (1, 1), (0, 0)
    yield "2d", torch.float32, (2, 4, 6, 5), (6, 2, 3, 3), ((2, 1), (1, 1), zeros, ones, 2, False), "gelu", False
    yield "2d_last", torch.bfloat16, (2, 4, 6, 5), (6, 4, 3, 3), (ones, (1, 0), (0, 1), ones, 1, False), None, True
    yield "2d_double", torch.float64, (2, 4, 6, 5), (6, 4, 3, 3), (ones, (1, 1), (1, 0), ones, 1, False), "silu", True
    yield "1d", torch.float16, (1, 3, 9), (3, 1, 4), ((2,), (1,), (0,), (2,), 3, False), "relu", True
    yield "t2d", torch.float32, (2, 4, 4, 5), (4, 3, 3, 2), ((2, 2), (1, 0), (1, 0), ones, 1, True), None, True
    yield (
        "t3d",
        torch.float64,
        (1, 2, 3, 4, 3),
        (2, 3, 2, 2, 2),
        ((1, 2, 1), (0, 1, 0), (0,) * 3, (1,) * 3, 1, True),
        None,
        False,
    )


every_sample = pytest.mark.parametrize("sample", [pytest.param(s[1:], id=s[0]) for s in samples()])


def arguments(sample):
    dtype, x, w, geometry, activation, last = sample
    x, w = torch.randn(x).to(dtype), torch.randn(w).to(dtype)
    shape = conv_shapes.result(x, w, conv_shapes.Geometry(*geometry))
    return x, w, torch.randn(shape[1]).to(dtype), torch.randn(shape).to(dtype), *geometry, activation, last


@every_sample
def test_opcheck(sample):
    for save in (False, True):
        opcheck(torch.ops.fastdl.conv.default, (*arguments(sample), save))


@every_sample
def test_opcheck_wgrad(sample):
    x, w, _, y, *geometry, _, last = arguments(sample)
    stride, padding, extra, dilation, groups, transposed = geometry
    if transposed:
        x, y, extra = y, x, tuple(-n for n in extra)
    for bias in (False, True):
        rest = (w.shape[2:], stride, padding, extra, dilation, groups, last, bias)
        opcheck(torch.ops.fastdl.conv_wgrad.default, (y, x, *rest))
        # the layout is that which is asked for, and the fake's
        dw = torch.ops.fastdl.conv_wgrad(y, x, *rest)[0]
        assert dw.stride() == conv_shapes.empty(w, w.shape, last).stride()


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose2d"])
def test_flops_are_torchs(name):
    n = int(name[-2])
    x, w = torch.randn(2, 4, *(5, 6, 7)[:n]), torch.randn(4, 4, *(3, 2, 3)[:n])
    totals = []
    for module in (functional, F):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            out = getattr(module, name)(a, b, None, 2)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        totals.append((forward, counter.get_total_flops()))
    assert totals[0] == totals[1]


# --- gradcheck, on the reference path, and second derivatives by the kernels -----------------------------------------
GRADCHECKS = {
    "conv1d": ((2, 2, 7), (4, 1, 3), {"stride": 2, "groups": 2, "padding": 1}),
    "conv2d": ((1, 2, 5, 6), (3, 2, 3, 2), {"padding": "same"}),
    "conv2d_strided": ((1, 2, 6, 5), (3, 2, 2, 2), {"stride": (3, 2), "dilation": (1, 2)}),
    "conv3d": ((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), {"stride": 2, "padding": 1}),
    "conv_transpose1d": ((1, 2, 4), (2, 3, 3), {"stride": 2, "output_padding": 1}),
    "conv_transpose2d": ((1, 4, 3, 3), (4, 1, 3, 2), {"stride": (2, 1), "groups": 2, "padding": (1, 0)}),
    "conv_transpose2d_beyond": ((1, 2, 3, 3), (2, 1, 2, 2), {"dilation": 2, "output_padding": 1}),
}


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck(case, activation):
    x, w, options = GRADCHECKS[case]
    name = "_".join(part for part in case.split("_") if part not in ("strided", "beyond"))
    K = w[1] * options.get("groups", 1) if "transpose" in name else w[0]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (x, w, (K,))]

    def function(*args):
        return getattr(functional, name)(*args, **options, activation=activation)

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    assert not calls.handbacks


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("case", [c for c in GRADCHECKS if c != "conv_transpose2d_beyond"])
def test_create_graph_with_float32(case, activation):
    x, w, options = GRADCHECKS[case]
    name = case.removesuffix("_strided")
    leaves = [torch.randn(s, requires_grad=True) for s in (x, w)]

    def penalty(convolution):
        first = torch.autograd.grad(convolution(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    kind = F.silu if activation else (lambda z: z)
    ours = penalty(lambda a, b: getattr(functional, name)(a, b, **options, activation=activation))
    theirs = penalty(lambda a, b: kind(getattr(F, name)(a, b, **options)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    assert not calls.handbacks


# --- torch.func ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize(
    "dims", [(0, None, None), (None, 0, None), (None, None, 0), (1, 0, 0), (0, 2, None), (2, None, 0)]
)
def test_vmap(name, dims):
    V, tensors = 3, []
    for shape, dim in zip(((2, 4, 6, 5), (4, 2, 3, 3), (4,)), dims, strict=True):
        dim = None if dim is None else min(dim, len(shape))
        tensors.append(torch.randn(shape if dim is None else (*shape[:dim], V, *shape[dim:])))
    dims = tuple(None if d is None else min(d, t.ndim - 1) for d, t in zip(dims, tensors, strict=True))

    def run(module, **options):
        return torch.vmap(lambda x, w, b: getattr(module, name)(x, w, b, 2, 1, groups=2, **options), dims)(*tensors)

    close(run(functional), run(F))
    close(run(functional, activation="gelu"), F.gelu(run(F)))
    assert not calls.handbacks


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_gradients_a_sample(name):
    x, w, b = torch.randn(3, 4, 6, 5), torch.randn(4, 4, 3, 3), torch.randn(4)

    def per_sample(module):
        def loss(w, b, x):
            return getattr(module, name)(x[None], w, b, 2, 1).square().sum()

        return torch.vmap(torch.func.grad(loss, (0, 1, 2)), (None, None, 0))(w, b, x)

    close(per_sample(functional), per_sample(F))
    assert not calls.handbacks


def test_jacobians():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(*(transform(lambda w, m=m: m.conv2d(x, w, padding=1))(w) for m in (functional, F)))
    assert set(calls.handbacks) == {("conv2d", "forward-mode differentiation")}
    close(*(torch.func.hessian(lambda w, m=m: m.conv2d(x, w).square().sum())(w) for m in (functional, F)))


# --- torch.compile ------------------------------------------------------------------------------------------------
def block():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.Conv2d(4, 5, 1, padding_mode="reflect", padding=1),
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(compiled, backend, layout):
    """Forward and backward in one graph, in the layouts of eager code."""
    stock = block().to(memory_format=layout)
    ours = fastdl.optimize(copy.deepcopy(stock))
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout).requires_grad_()
    results = []
    for model in (compiled(ours, backend=backend), stock):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    close(*results)
    assert results[0][0].stride() == results[1][0].stride()
    assert not calls.handbacks


def test_compile_epilogue_and_dynamic_shapes(compiled):
    w, b = torch.randn(3, 3, 3, 3, requires_grad=True), torch.randn(3)
    function = compiled(lambda x: functional.conv2d(x, w, b, padding=1, activation="gelu", residual=x), dynamic=True)
    for size in (5, 6, 9):
        x = torch.randn(2, 3, size, size + 1, requires_grad=True)
        expected = F.gelu(F.conv2d(x, w, b, padding=1)) + x
        close(function(x), expected)
        close(*(torch.autograd.grad(y.square().sum(), (x, w)) for y in (function(x), expected)))


def test_compiled_graph_holds_the_operation(compiled):
    graphs = []

    def backend(graph, _):
        from functorch.compile import aot_module_simplified

        def record(g, _):
            graphs.append([str(n.target) for n in g.graph.nodes if n.op == "call_function"])
            return make_boxed_func(g.forward)

        return aot_module_simplified(graph, _, fw_compiler=record)

    layer = fastdl.optimize(nn.Conv2d(3, 4, 3))
    compiled(layer, backend=backend)(torch.randn(1, 3, 6, 6)).sum().backward()
    forward, backward = graphs
    assert "fastdl.conv.default" in forward and "fastdl.conv_wgrad.default" in backward


# --- autocast, checkpoint, export, tracers --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv_transpose2d"])
def test_autocast(name, dtype):
    n = int(name[-2])
    x, w = torch.randn(2, 4, *(8, 8)[:n], requires_grad=True), torch.randn(4, 4, *(3, 3)[:n], requires_grad=True)
    results = []
    for module in (functional, F):
        with torch.autocast("cpu", dtype):
            y = getattr(module, name)(x, w)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, w))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.02, atol=want.abs().max().item() * 4 * UNIT_ROUNDOFF[dtype])
    assert not calls.handbacks


def test_checkpoint():
    layer = fastdl.optimize(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = checkpoint(lambda x: layer(x).square().sum(), x, use_reentrant=False)
    assert all(
        torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(again, [x, *layer.parameters()]), strict=True)
    )


def test_export_writes_torchs_operations():
    stock = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(4, 2, 2))
    ours = fastdl.optimize(copy.deepcopy(stock))
    x = torch.randn(1, 3, 6, 6)
    program = torch.export.export(ours, (x,))
    assert not [n for n in program.graph.nodes if "fastdl" in str(n.target)]
    close(program.module()(x), stock(x))


@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(1, 3, 6, 6)), torch.fx.symbolic_trace]
)
def test_tracers(how):
    stock = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)
    )
    ours = fastdl.optimize(copy.deepcopy(stock))
    x = torch.randn(1, 3, 6, 6)
    close(how(ours)(x), stock(x))


def test_subclasses_are_handed_back():
    class Marked(torch.Tensor):
        pass

    x, w = torch.randn(1, 3, 6, 6).as_subclass(Marked), torch.randn(4, 3, 3, 3)
    out = functional.conv2d(x, w)
    assert type(out) is Marked and set(calls.handbacks) == {("conv2d", "input is a Marked")}
