"""linear and matmul inside the rest of torch: the compiler, autograd, torch.func, autocast, modes and tracers."""

import math
import threading

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from conftest import assert_sums_of_products
from fastdl import _C
from fastdl.functional import linear, matmul
from fastdl.ops import calls, route
from fastdl.ops.gemm import linear_wgrad, sum_rows

# What torch 2.13 warns of its own doing: tracing an autograd.Function, and loading forward-mode decompositions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()


@pytest.fixture
def args(generator):
    """Input [4, 8], weight [5, 8], bias [5]; float32, leaves that require grad."""
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 8), (5, 8), (5,))]


@pytest.fixture
def compiled():
    """compiled(function, **options): torch.compile with fullgraph=True on a fresh compiler."""
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)
    torch._dynamo.reset()


def assert_same_gradients(ours, theirs, args):
    """Value and gradients of two functions of the same leaves agree to float32 rounding."""
    y, expected = ours(*args), theirs(*args)
    torch.testing.assert_close(y, expected)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    grads, wanted = torch.autograd.grad(y, args, dy), torch.autograd.grad(expected, args, dy)
    torch.testing.assert_close(grads, wanted)


class Recorded(TorchDispatchMode):
    """The operations dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


# --- operations ---------------------------------------------------------------------------------------------------
def operation_samples():
    def randn(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    pack = torch.empty(_C.pack_numel(8, 5, _C.pack_kernel()))
    _C.pack(pack, randn(5, 8).t(), _C.pack_kernel())
    yield "linear", (randn(4, 8), randn(5, 8), randn(5))
    yield "linear", (randn(2, 3, 8), randn(5, 8), None)
    yield "linear", (randn(8), randn(5, 8).double().float(), randn(5))
    yield "linear", (randn(4, 8).double(), randn(5, 8).double(), randn(5).double())
    yield "linear", (randn(4, 8), randn(5, 8), randn(5), pack)
    yield "linear", (randn(2, 3, 8), randn(5, 8), None, pack)
    yield "matmul", (randn(4, 8), randn(8, 3))
    yield "matmul", (randn(2, 1, 4, 8), randn(3, 8, 3))
    yield "matmul", (randn(8), randn(8))
    yield "matmul", (randn(4, 8), randn(8))
    yield "matmul", (randn(4, 8).double(), randn(8, 3).double())
    yield "linear_wgrad", (randn(4, 5), randn(4, 8))
    yield "linear_wgrad", (randn(2, 3, 5).transpose(0, 1), randn(3, 2, 8))
    yield "linear_wgrad", (randn(4, 5).double(), randn(4, 8).double())
    yield "linear", (randn(4, 8).bfloat16(), randn(5, 8).bfloat16(), randn(5).bfloat16())
    yield "matmul", (randn(4, 8).half(), randn(8, 3).half())
    yield "linear_wgrad", (randn(4, 5).bfloat16(), randn(4, 8).bfloat16())
    yield "sum_rows", (randn(4, 5).half(),)
    yield "sum_rows", (randn(4, 5),)
    yield "sum_rows", (randn(5).double(),)
    yield "activation_grad", (randn(3, 4).mT, randn(4, 3), "gelu_tanh")
    yield "activation_grad", (randn(3, 4).double().mT, randn(4, 3).double(), "gelu_tanh")


@pytest.mark.parametrize(("name", "sample"), list(operation_samples()))
def test_opcheck(name, sample):
    opcheck(getattr(torch.ops.fastdl, name).default, sample)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_operations_refuse_other_dtypes(dtype):
    x = torch.ones(2, 2).to(dtype)
    for call in (lambda: torch.ops.fastdl.linear(x, x, None), lambda: torch.ops.fastdl.matmul(x, x)):
        with pytest.raises(RuntimeError, match="expected a float32, bfloat16 or float16 tensor on cpu"):
            call()


@pytest.mark.parametrize("function", [linear, lambda x, w: matmul(x, w.mT)], ids=["linear", "matmul"])
def test_flops_are_counted_as_torchs(function, args):
    def flops(f):
        with FlopCounterMode(display=False) as counter:
            f(*args[:2]).sum().backward()
        return counter.get_total_flops()

    assert flops(function) == flops(F.linear) == 3 * 2 * 4 * 5 * 8


# --- gradcheck, on the reference path ------------------------------------------------------------------------------
GRADCHECKS = {
    "linear": (linear, [(3, 4), (2, 4), (2,)]),
    "linear_no_bias": (linear, [(3, 4), (2, 4)]),
    "linear_vector": (linear, [(4,), (2, 4), (2,)]),
    "linear_batch": (linear, [(2, 3, 4), (2, 4), (2,)]),
    "matmul": (matmul, [(3, 4), (4, 2)]),
    "matmul_dot": (matmul, [(4,), (4,)]),
    "matmul_row": (matmul, [(4,), (2, 4, 3)]),
    "matmul_column": (matmul, [(2, 3, 4), (4,)]),
    "matmul_shared": (matmul, [(2, 3, 4), (4, 2)]),
    "matmul_broadcast": (matmul, [(2, 1, 3, 4), (2, 4, 2)]),
    "linear_wgrad": (linear_wgrad, [(2, 3, 2), (2, 3, 4)]),
    "sum_rows": (sum_rows, [(2, 3, 4)]),
}


@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck(case, generator):
    function, shapes = GRADCHECKS[case]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert not calls.handbacks


# --- torch.compile ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_compile_linear(bias, args, compiled):
    assert_same_gradients(compiled(linear), F.linear, args if bias else args[:2])


@pytest.mark.parametrize(("a", "b"), [((3, 4), (4, 2)), ((2, 3, 4), (4, 2)), ((4,), (2, 4, 3)), ((2, 3, 4), (4,))])
def test_compile_matmul(a, b, compiled, generator):
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in (a, b)]
    assert_same_gradients(compiled(matmul), torch.matmul, leaves)


def test_compiled_graphs_hold_fastdls_operations(args, compiled):
    names = []

    def collect(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=collect, bw_compiler=collect)
    compiled(linear, backend=backend)(*args).sum().backward()
    operations = [name for name in names if name.startswith("fastdl")]
    assert operations == [f"fastdl.{n}.default" for n in ("linear", "matmul", "linear_wgrad", "sum_rows")]


def test_compile_without_grad(args, compiled):
    with torch.no_grad():
        torch.testing.assert_close(compiled(linear)(*args), F.linear(*args))


def test_compile_with_dynamic_shapes_compiles_once(args, compiled):
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    function = compiled(linear, backend=backend, dynamic=True)
    for rows in (3, 5, 9):
        x = torch.ones(rows, 8)
        torch.testing.assert_close(function(x, *args[1:]), F.linear(x, *args[1:]))
    assert len(frames) == 1


@pytest.mark.slow
def test_compile_with_inductor(args, compiled):
    def model(function):
        return lambda x, w, b: torch.relu(function(x, w, b)) + 1

    assert_same_gradients(compiled(model(linear), backend="inductor"), model(F.linear), args)


def test_compile_leaves_a_record_of_hand_backs(args, compiled):
    integers = [t.detach().long() for t in args]
    torch.testing.assert_close(compiled(linear)(*integers), F.linear(*integers))
    assert dict(calls.handbacks) == {("linear", "dtype int64"): 1}


def test_compile_with_autocast_inside(args, compiled):
    def function(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear(*args)

    y = compiled(function)(*args)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, function(*args))
    assert {grad.dtype for grad in torch.autograd.grad(y.float().sum(), args)} == {torch.float32}
    assert not calls.handbacks


@pytest.mark.parametrize("transform", ["grad", "vmap_grad", "jvp"])
def test_torch_func_inside_compile(transform, args, compiled):
    x, w, b = (t.detach() for t in args)

    def build(function):
        def loss(w, b, x):
            return function(x, w, b).square().sum()

        return {
            "grad": lambda: torch.func.grad(loss, argnums=(0, 1, 2))(w, b, x),
            "vmap_grad": lambda: torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(w, b, x),
            "jvp": lambda: torch.func.jvp(lambda x: function(x, w, b), (x,), (torch.ones_like(x),)),
        }[transform]

    torch.testing.assert_close(compiled(build(linear))(), build(F.linear)())
    assert {reason for _, reason in calls.handbacks} == {"torch.func inside torch.compile"}


# --- torch.func ---------------------------------------------------------------------------------------------------
LINEAR_MAPS = {  # in_dims, shapes with the mapped dimension 3
    "input": ((0, None, None), [(3, 4, 8), (5, 8), (5,)]),
    "input_last": ((2, None, None), [(4, 8, 3), (5, 8), (5,)]),
    "vector_input": ((0, None, None), [(3, 8), (5, 8), (5,)]),
    "weight": ((None, 0, None), [(4, 8), (3, 5, 8), (5,)]),
    "weight_middle": ((None, 1, None), [(2, 4, 8), (5, 3, 8), (5,)]),
    "bias": ((None, None, 0), [(4, 8), (5, 8), (3, 5)]),
    "bias_of_vector": ((None, None, 1), [(8,), (5, 8), (5, 3)]),
    "input_bias": ((0, None, 0), [(3, 2, 4, 8), (5, 8), (3, 5)]),
    "all": ((0, 0, 0), [(3, 4, 8), (3, 5, 8), (3, 5)]),
    "all_mixed": ((1, 2, 1), [(4, 3, 8), (5, 8, 3), (5, 3)]),
    "empty": ((0, 0, None), [(3, 0, 8), (3, 5, 8), (5,)]),
}
MATMUL_MAPS = {
    "matrices": ((0, 0), [(3, 4, 8), (3, 8, 2)]),
    "input": ((0, None), [(3, 4, 8), (8, 2)]),
    "other": ((None, 2), [(4, 8), (8, 2, 3)]),
    "rows": ((0, 0), [(3, 8), (3, 8, 2)]),
    "columns": ((0, 1), [(3, 4, 8), (8, 3)]),
    "dots": ((0, 0), [(3, 8), (3, 8)]),
    "dot_shared": ((None, 0), [(8,), (3, 8)]),
    "row_of_batch": ((0, None), [(3, 8), (2, 8, 4)]),
    "column_of_batch": ((None, 0), [(2, 4, 8), (3, 8)]),
    "longer_input": ((0, 0), [(3, 2, 4, 8), (3, 8, 2)]),
    "longer_other": ((0, 0), [(3, 4, 8), (3, 2, 5, 8, 2)]),
    "broadcast": ((1, 0), [(2, 3, 1, 4, 8), (3, 5, 8, 2)]),
}


@pytest.mark.parametrize(
    ("ours", "theirs", "dims", "shapes"),
    [(linear, F.linear, *case) for case in LINEAR_MAPS.values()]
    + [(matmul, torch.matmul, *case) for case in MATMUL_MAPS.values()],
    ids=[f"linear-{name}" for name in LINEAR_MAPS] + [f"matmul-{name}" for name in MATMUL_MAPS],
)
def test_vmap(ours, theirs, dims, shapes, generator):
    args = [torch.randn(shape, generator=generator) for shape in shapes]

    def values(function, args):
        return [torch.func.vmap(function, dims)(*args)]

    def gradients(function, args):
        """Per-sample gradients: vmap rules of the backward operations."""
        grad = torch.func.grad(lambda *args: function(*args).square().sum(), tuple(range(len(args))))
        return torch.func.vmap(grad, dims)(*args)

    most = max(math.prod(shape) for shape in shapes)  # at least the terms of any sum
    assert_sums_of_products(values, ours, theirs, args, roundings=most)
    assert_sums_of_products(gradients, ours, theirs, args, roundings=2 * most + 1)
    assert not calls.handbacks


TRANSFORMS = [
    "jacrev",
    "jacfwd",
    "hessian",
    "vjp",
    "functional_call",
    "grad_of_vmap",
    "grad_of_mapped",
    "functionalize",
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform, args):
    x, w, b = (t.detach() for t in args)

    def build(function):
        def loss(w):
            return function(x, w, b).square().mean()

        if transform == "vjp":
            return torch.func.vjp(function, x, w, b)[1](torch.ones(4, 5))
        if transform == "functional_call":
            layer = nn.Linear(8, 5)
            layer.forward = lambda x: function(x, layer.weight, layer.bias)
            return torch.func.functional_call(layer, {"weight": w, "bias": b}, x)
        if transform == "grad_of_vmap":
            return torch.func.grad(lambda w: torch.func.vmap(lambda x: function(x, w, b))(x).square().sum())(w)
        if transform == "grad_of_mapped":
            mapped = torch.func.vmap(lambda w, b: function(x, w.unsqueeze(0), b.unsqueeze(0)))
            return torch.func.grad(lambda w: mapped(w, b).square().sum())(w)
        if transform == "functionalize":
            return torch.func.functionalize(lambda x: function(x.clone().mul_(2), w, b))(x)
        return getattr(torch.func, transform)(loss)(w)

    torch.testing.assert_close(build(linear), build(F.linear))


def test_packed_maps_input_and_bias(generator):
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((3, 4, 8), (5, 8), (3, 5)))
    pack = torch.empty(_C.pack_numel(8, 5, _C.pack_kernel()))
    _C.pack(pack, w.t(), _C.pack_kernel())

    def packed(x, b):
        return torch.ops.fastdl.linear(x, w, b, pack)

    for dims in ((0, None), (None, 0), (0, 0)):
        inputs = (x if dims[0] == 0 else x[0], b if dims[1] == 0 else b[0])
        expected = torch.func.vmap(lambda x, b: F.linear(x, w, b), dims)(*inputs)
        torch.testing.assert_close(torch.func.vmap(packed, dims)(*inputs), expected)


def test_forward_mode_is_left_to_torch(args):
    x, w, b = args
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with torch.no_grad():
            y, tangent = forward_ad.unpack_dual(linear(dual, w, b))
    torch.testing.assert_close(y, F.linear(x, w, b))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ w.t())
    assert dict(calls.handbacks) == {("linear", "forward-mode differentiation"): 1}


def test_batched_gradients(args):
    x, w, b = args
    eye = torch.eye(20).view(20, 4, 5)
    (dx,) = torch.autograd.grad(linear(x, w, b), x, eye, is_grads_batched=True)
    torch.testing.assert_close(dx, eye @ w)


# --- autocast, inference mode, defaults ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(dtype, args):
    with torch.autocast("cpu", dtype=dtype):
        y, expected = linear(*args), F.linear(*args)
        product, wanted = matmul(args[0], args[1].mT), torch.matmul(args[0], args[1].mT)
    assert y.dtype == product.dtype == dtype
    assert (expected.dtype, wanted.dtype) == (dtype, dtype)
    torch.testing.assert_close((y, product), (expected, wanted))
    grads = torch.autograd.grad(y.float().sum(), args)
    assert {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(grads, torch.autograd.grad(expected.float().sum(), args), rtol=1e-2, atol=1e-2)
    assert not calls.handbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_kernels_of_its_dtype(dtype, args):
    _C.reset_counters()
    with torch.autocast("cpu", dtype=dtype):
        linear(args[0], args[1].to(dtype), args[2]).float().sum().backward()
    used = {name for name, count in _C.counters().items() if count}
    dtypes = {row["dtype"] for row in _C.kernels("gemm") if row["name"] in used}
    assert dtypes == {str(dtype).removeprefix("torch.")}


def test_autocast_leaves_float64_alone(args):
    doubles = [t.detach().double() for t in args]
    with torch.autocast("cpu"):
        assert linear(*doubles).dtype == F.linear(*doubles).dtype == torch.float64


def test_autocast_switched_off_inside(args):
    with torch.autocast("cpu"):
        with torch.autocast("cpu", enabled=False):
            assert linear(*args).dtype == torch.float32
        assert linear(*args).dtype == torch.bfloat16
    assert not calls.handbacks


def test_autocast_of_another_device_does_not_matter(args):
    torch.set_autocast_enabled("cuda", True)
    try:
        torch.testing.assert_close(linear(*args), F.linear(*args))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert not calls.handbacks


def test_inference_mode(args):
    with torch.inference_mode():
        y = linear(*args)
    assert y.is_inference()
    torch.testing.assert_close(y, F.linear(*args))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        linear(y, torch.ones(2, 5, requires_grad=True))


def test_default_dtype_and_device_do_not_leak_in(args):
    torch.set_default_dtype(torch.float64)
    try:
        assert linear(*args).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert linear(*args).device.type == "cpu"
        with torch.no_grad():
            assert linear(*args).device.type == "cpu"


# --- modes, tracers, hooks ----------------------------------------------------------------------------------------
def test_dispatch_modes_see_the_operations(args):
    with Recorded() as forward, torch.no_grad():
        y = linear(*args)
    assert forward.names == ["fastdl.linear.default"]
    torch.testing.assert_close(y, F.linear(*args))
    y = linear(*args)
    with Recorded() as backward:
        y.backward(torch.ones_like(y))
    operations = [name for name in backward.names if name.startswith("fastdl")]
    assert operations == [f"fastdl.{n}.default" for n in ("matmul", "linear_wgrad", "sum_rows")]


def test_gradient_of_a_shared_matrix_is_one_product(generator):
    a, b = torch.randn(6, 4, 8, generator=generator), torch.randn(8, 5, generator=generator).requires_grad_()
    c = matmul(a, b)
    with Recorded() as backward:
        c.sum().backward()
    assert [name for name in backward.names if name.startswith("fastdl")] == ["fastdl.linear_wgrad.default"]


def test_function_modes_see_the_operation(args):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **kwargs or {})

    with Watch():
        linear(*args)
    assert any("fastdl.linear" in name for name in seen)


def test_fake_tensors(args):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in args]
        y = linear(*fakes)
        assert isinstance(y, torch._subclasses.FakeTensor)
        assert y.shape == (4, 5)
        assert matmul(fakes[0], fakes[1].mT).shape == (4, 5)
        with pytest.raises(RuntimeError, match=r"argument 'input': expected \[..., 8\]"):
            linear(torch.empty(4, 7), fakes[1])
        torch.autograd.grad(y.sum(), fakes)
    assert not calls.handbacks


def test_profiler_shows_the_operations(args):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(*args).sum().backward()
    keys = {event.key for event in profile.key_averages()}
    assert {"fastdl::linear", "fastdl::matmul", "fastdl::linear_wgrad", "fastdl::sum_rows"} <= keys


def test_fx_tracing_records_torchs_linear(args):
    graph = torch.fx.symbolic_trace(lambda x, w, b: linear(x, w, b))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [F.linear]
    assert dict(calls.handbacks) == {("linear", "input is a Proxy"): 1}


def test_jit_tracing_records_torchs_linear(args):
    traced = torch.jit.trace(linear, tuple(t.detach() for t in args))
    assert [node.kind() for node in traced.inlined_graph.nodes()] == ["aten::linear"]
    assert ("linear", "torch.jit.trace") in calls.handbacks


class Model(nn.Module):
    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w.detach()), nn.Parameter(b.detach())

    def forward(self, x):
        return linear(x, self.w, self.b)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("keep", [False, True], ids=["aten", "fastdl"])
def test_export(keep, strict, args, monkeypatch):
    monkeypatch.setattr(route, "EXPORT_OPS", keep)
    torch._dynamo.reset()
    x, w, b = args
    program = torch.export.export(Model(w, b), (x.detach(),), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["fastdl.linear.default" if keep else "aten.linear.default"]
    torch.testing.assert_close(program.module()(x), F.linear(x, w, b))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint(use_reentrant, args):
    y = checkpoint(linear, *args, use_reentrant=use_reentrant)
    y.sum().backward()
    expected = torch.autograd.grad(F.linear(*args).sum(), args)
    torch.testing.assert_close(tuple(t.grad for t in args), expected)


def test_saved_tensor_hooks_are_called(args):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        y = linear(*args)
    assert packed == [(4, 8), (5, 8)]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), args), torch.autograd.grad(F.linear(*args).sum(), args))


def test_create_graph_with_float32(args):
    def penalty(function):
        first = torch.autograd.grad(function(*args).square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), args)

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-3)
    assert not calls.handbacks


def test_threads_share_nothing(args):
    expected = torch.autograd.grad(F.linear(*args).sum(), args)
    results = []

    def work():
        for _ in range(20):
            results.append(torch.autograd.grad(linear(*args).sum(), args))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        torch.testing.assert_close(result, expected)
