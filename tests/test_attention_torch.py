"""Attention inside the rest of torch: the compiler, autograd, torch.func, autocast, modes and tracers."""

import threading

import pytest
import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastdl import _C
from fastdl.functional import attention_varlen
from fastdl.functional import scaled_dot_product_attention as attention
from fastdl.ops import attention_reference as reference
from fastdl.ops import calls, route
from fastdl.ops.attention_reference import Options

# What torch warns of its own doing: tracing an autograd.Function, and loading forward-mode decompositions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
torchs = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(23)


@pytest.fixture
def args():
    """query, key, value, additive mask: leaves."""
    return [torch.randn(s, requires_grad=True) for s in ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), (4, 5, 7))]


@pytest.fixture
def compiled():
    """compiled(function, **options): torch.compile with fullgraph=True on a fresh compiler."""
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)
    torch._dynamo.reset()


def assert_same_gradients(ours, theirs, args):
    out, expected = ours(*args), theirs(*args)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
    grads, wanted = torch.autograd.grad(out, args, grad), torch.autograd.grad(expected, args, grad)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


class Recorded(TorchDispatchMode):
    """fastdl's operations dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("fastdl"):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


# --- operations ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k, v = (torch.randn(s).to(dtype) for s in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    none = None, None, None
    seed = torch.tensor(5)
    ops = torch.ops.fastdl
    for mask in (None, torch.randn(4, 1, 7).to(dtype)[None], torch.rand(2, 1, 5, 7) < 0.6):
        options = Options(0.3, hi=0, softcap=2.0)
        opcheck(ops.attention.default, (q, k, v, mask, *none, *options, True))
        options = Options(0.3, dropout_p=0.3)
        opcheck(ops.attention.default, (turned, k, v, mask, None, None, seed, *options, False))
        out, lse = ops.attention(turned, k, v, mask, None, None, seed, *options, True)
        needs = [True, True, False, mask is not None and mask.dtype != torch.bool]
        given = (out, turned, k, v, mask, out, lse, None, None, seed, *options, needs)
        opcheck(ops.attention_backward.default, given)
    packed = (x[:1].contiguous() for x in (q, k, v))
    cu = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7])
    opcheck(ops.attention.default, (*packed, None, *cu, None, *Options(0.3, align_end=True), True))
    opcheck(ops.attention_keep.default, (seed, [1, 2, 3, 4], 0.3))


def test_operations_refuse_what_does_not_fit():
    x = torch.ones(1, 2, 3, 4)
    for dtype in (torch.float32, torch.float64, torch.int64):
        for change in ((x, x[:, :, :, :3], x, None), (x, x, x[:, :, :2], None), (x[0], x[0], x[0], None)):
            given = [t if t is None else t.to(dtype) for t in change]
            with pytest.raises(RuntimeError):
                torch.ops.fastdl.attention(*given, None, None, None, *Options(1.0), False)
    with pytest.raises(RuntimeError):
        torch.ops.fastdl.attention(x.long(), x.long(), x.long(), None, None, None, None, *Options(1.0), False)


def test_flops():
    q, k, v = (torch.randn(s, requires_grad=True) for s in ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)))
    pairs = 2 * 4 * 5 * 7
    with FlopCounterMode(display=False) as counter:
        out = attention(q, k, v)
    assert counter.get_total_flops() == 2 * pairs * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 6)
    x, cu = torch.randn(7, 4, 8), torch.tensor([0, 3, 7])
    with FlopCounterMode(display=False) as counter:
        attention_varlen(x, x, x, cu, cu)
    assert counter.get_total_flops() == 2 * 4 * (3 * 3 + 4 * 4) * 16


# --- gradcheck, on the reference path --------------------------------------------------------------------------------
GRADCHECKS = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
    "softcap_window": {"softcap": 1.5, "window": (1, 1)},
    "mask": {"mask": (2, 1, 3, 4)},
    "mask_row": {"mask": (3, 1), "softcap": 2.0},
}


@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck(case):
    options = dict(GRADCHECKS[case])
    heads = 1 if options.get("enable_gqa") else 2
    sizes = [(2, 2, 3, 2), (2, heads, 4, 2), (2, heads, 4, 3)]
    if "mask" in options:
        sizes.append(options.pop("mask"))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradcheck(lambda *args: attention(*args, **options), leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *args: attention(*args, **options), leaves)
    assert not calls.handbacks


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_gradcheck_with_dropout(varlen):
    cu = torch.tensor([0, 1, 4])
    shape = (4, 2, 2) if varlen else (1, 2, 3, 2)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(*args):
        torch.manual_seed(3)
        return attention_varlen(*args, cu, cu, dropout_p=0.4) if varlen else attention(*args, dropout_p=0.4)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_create_graph_with_float32(args):
    def penalty(function):
        first = torch.autograd.grad(function(*args).square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), args)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = penalty(torchs)
    torch.testing.assert_close(penalty(attention), expected, rtol=1e-3, atol=1e-3)
    assert not calls.handbacks


def test_double_backward_in_low_precision_is_finite(args):
    args = [x.detach().bfloat16().requires_grad_() for x in args]
    first = torch.autograd.grad(attention(*args).float().square().sum(), args, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), args)
    assert [g.dtype for g in second] == [torch.bfloat16] * 4 and all(g.isfinite().all() for g in second)


# --- torch.compile ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.2}, {"softcap": 2.0, "window": (2, 1)}, {"window": (None, 0)}],
    ids=["plain", "scale", "softcap_window", "band"],
)
def test_compile(options, args, compiled):
    assert_same_gradients(compiled(lambda *a: attention(*a, **options)), lambda *a: attention(*a, **options), args)
    assert not calls.handbacks


@pytest.mark.parametrize("sizes", [((5, 8),) * 3, ((3, 5, 8),) * 3, ((2, 2, 3, 5, 8),) * 3], ids=["2d", "3d", "5d"])
def test_compile_other_ranks(sizes, compiled):
    args = [torch.randn(s, requires_grad=True) for s in sizes]
    assert_same_gradients(
        compiled(lambda *a: attention(*a, is_causal=True)), lambda *a: torchs(*a, is_causal=True), args
    )


def test_compile_varlen(compiled):
    x, cu = torch.randn(7, 4, 8, requires_grad=True), torch.tensor([0, 3, 7])

    def function(x):
        return attention_varlen(x, x, x, cu, cu, is_causal=True)

    assert_same_gradients(compiled(function), function, [x])


def test_compiled_graphs_hold_fastdls_operations(args, compiled):
    names = []

    def collect(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=collect, bw_compiler=collect)
    compiled(attention, backend=backend)(*args).sum().backward()
    operations = [name for name in names if name.startswith("fastdl")]
    assert operations == ["fastdl.attention.default", "fastdl.attention_backward.default"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_dropout_is_drawn_anew_and_the_same_in_backward(backend, args, compiled):
    q, k, _, _ = args
    v = torch.ones(2, 4, 7, 6, requires_grad=True)
    function = compiled(lambda q, k, v: attention(q, k, v, dropout_p=0.4) * 1.0, backend=backend)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(function(q, k, v))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    (dv,) = torch.autograd.grad(outs[0].sum(), v)
    torch.testing.assert_close((dv * v).sum(), outs[0].sum())
    if backend == "aot_eager":
        torch.manual_seed(1)
        torch.testing.assert_close(outs[0], attention(q, k, v, dropout_p=0.4))


@pytest.mark.slow
def test_compile_with_inductor(args, compiled):
    def model(function):
        return lambda q, k, v, m: torch.relu(function(q * 2, k, v, m)) + 1

    assert_same_gradients(compiled(model(attention), backend="inductor"), model(torchs), args)


def test_compile_with_dynamic_shapes_compiles_once(compiled):
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    function = compiled(attention, backend=backend, dynamic=True)
    for n in (3, 5, 9):
        q, k = torch.randn(2, 4, n, 8), torch.randn(2, 4, n + 4, 8)
        torch.testing.assert_close(function(q, k, k), torchs(q, k, k), rtol=1e-4, atol=1e-5)
    assert len(frames) == 1


def test_compile_with_autocast_inside(args, compiled):
    def function(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(*args)

    out = compiled(function)(*args)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, function(*args))
    assert {grad.dtype for grad in torch.autograd.grad(out.float().sum(), args)} == {torch.float32}


# --- checkpointing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compile"])
def test_checkpoint_repeats_dropout(compile, use_reentrant, args, compiled):
    if compile and use_reentrant:
        pytest.skip("the compiler takes the other form only")
    q, k, _, _ = args
    v = torch.ones(2, 4, 7, 6, requires_grad=True)

    def block(q, k, v):
        return attention(q, k, v, dropout_p=0.4)

    def function(q, k, v):
        return checkpoint(block, q, k, v, use_reentrant=use_reentrant)

    out = (compiled(function) if compile else function)(q, k, v)
    torch.rand(3)  # the generator has moved on when the backward pass repeats the forward
    out.sum().backward()
    torch.testing.assert_close((v.grad * v).sum(), out.sum())


# --- torch.func ------------------------------------------------------------------------------------------------------
MAPS = {  # in_dims of query, key, value, mask; 3 is the mapped dimension
    "query": (0, None, None, None),
    "query_last": (4, None, None, None),
    "key_value": (None, 0, 1, None),
    "mask": (None, None, None, 0),
    "all": (0, 1, 2, 3),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask_shape", [(1, 4, 5, 7), (4, 5, 7), (2, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("dims", MAPS.values(), ids=MAPS)
def test_vmap(dims, mask_shape, batch):
    if mask_shape[0] == 2 and batch == 1:
        mask_shape = (1, *mask_shape[1:])
    sizes = (batch, 4, 5, 8), (batch, 4, 7, 8), (batch, 4, 7, 6), mask_shape
    args = [torch.randn(s) for s in sizes]
    args = [
        x if dim is None else torch.stack([x, x + 1, x - 1], min(dim, x.ndim))
        for x, dim in zip(args, dims, strict=True)
    ]
    dims = tuple(None if dim is None else min(dim, x.ndim - 1) for x, dim in zip(args, dims, strict=True))

    def both(function):
        gradients = torch.func.grad(lambda *a: function(*a).square().sum(), (0, 1, 2, 3))
        return torch.func.vmap(function, dims)(*args), torch.func.vmap(gradients, dims)(*args)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = both(torchs)
    torch.testing.assert_close(both(attention), expected, rtol=1e-3, atol=1e-4)
    assert not calls.handbacks


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_dropout(randomness):
    q, k = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 4, 7, 8)
    v = torch.ones(3, 2, 4, 7, 6)

    def function(q, k, v):
        return attention(q, k, v, dropout_p=0.4).sum()

    same_inputs = torch.func.vmap(lambda q: function(q, k[0], v[0]), randomness=randomness)
    outs = same_inputs(q[:1].expand(q.shape))
    assert torch.equal(outs[0], outs[1]) == (randomness == "same")
    mapped = torch.func.vmap(torch.func.grad_and_value(function, 2), randomness=randomness)
    grads, values = mapped(q, k, v)
    torch.testing.assert_close((grads * v).flatten(1).sum(1), values)


def test_vmap_varlen():
    x, cu = torch.randn(3, 7, 4, 8), torch.tensor([0, 3, 7])

    def function(x):
        return attention_varlen(x, x, x, cu, cu)

    torch.testing.assert_close(torch.func.vmap(function)(x), torch.stack([function(part) for part in x]))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "vjp", "grad_of_vmap", "functionalize"])
def test_torch_func(transform):
    q, k, v = (torch.randn(1, 2, n, 3) for n in (3, 4, 4))

    def build(function):
        def loss(q):
            return function(q, k, v).square().mean()

        if transform == "vjp":
            return torch.func.vjp(function, q, k, v)[1](torch.ones(1, 2, 3, 3))
        if transform == "grad_of_vmap":
            return torch.func.grad(lambda k: torch.func.vmap(lambda q: function(q, k[0], v[0]))(q).square().sum())(k)
        if transform == "functionalize":
            return torch.func.functionalize(lambda q: function(q.clone().mul_(2), k, v))(q)
        return getattr(torch.func, transform)(loss)(q)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = build(torchs)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(build(attention), expected, rtol=1e-4, atol=1e-5)


def test_forward_mode_is_left_to_torch(args):
    q, k, v, _ = (x.detach() for x in args)
    with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = forward_ad.unpack_dual(attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v))
    assert tangent is not None
    assert dict(calls.handbacks) == {("scaled_dot_product_attention", "forward-mode differentiation"): 1}


def test_batched_gradients(args):
    out = attention(*args)
    eye = torch.randn(5, *out.shape)
    batched = torch.autograd.grad(out, args, eye, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        single = torch.autograd.grad(out, args, eye[i], retain_graph=True)
        torch.testing.assert_close(tuple(g[i] for g in batched), single, rtol=1e-4, atol=1e-5)


# --- autocast, inference mode, other kinds of tensor -----------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(dtype, args):
    with torch.autocast("cpu", dtype=dtype):
        out, expected = attention(*args), torchs(*args)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.float().sum(), args)
    assert {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(grads, torch.autograd.grad(expected.float().sum(), args), rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", dtype=dtype):
        mixed = attention(args[0].to(dtype), args[1], args[2], args[3] > 0)
        assert mixed.dtype == dtype
        doubles = [x.detach().double() for x in args]
        assert attention(*doubles).dtype == torch.float64
    assert not calls.handbacks


def test_inference_mode(args):
    with torch.inference_mode():
        out = attention(*args)
    assert out.is_inference()
    torch.testing.assert_close(out, torchs(*args), rtol=1e-4, atol=1e-5)


def test_default_dtype_and_device_do_not_leak_in(args):
    torch.set_default_dtype(torch.float64)
    try:
        assert attention(*args, dropout_p=0.1).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        out = attention(*args, dropout_p=0.1)
        out.sum().backward()
    assert out.device.type == "cpu" and args[0].grad.device.type == "cpu"


class Special(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.detach().to("meta"), "query is on meta"),
        (lambda x: torch.Tensor._make_subclass(Special, x.detach()), "query is a Special"),
        (lambda x: x.detach() + 0j, "dtype complex64"),
    ],
    ids=["meta", "subclass", "complex"],
)
def test_handed_back(make, reason, args):
    q, k, v, _ = map(make, args)
    try:
        expected = torchs(q, k, v)
    except RuntimeError as error:  # torch takes no complex numbers either
        with pytest.raises(type(error)):
            attention(q, k, v)
    else:
        assert attention(q, k, v).shape == expected.shape
        assert attention(q, k, v, window=(2, 1), softcap=2.0, dropout_p=0.1).shape == expected.shape
    assert ("scaled_dot_product_attention", reason) in calls.handbacks


def test_nested_tensors_are_handed_back():
    jagged = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    out = attention(jagged, jagged, jagged)
    torch.testing.assert_close(out.values(), torchs(jagged, jagged, jagged).values())
    assert {op for op, _ in calls.handbacks} == {"scaled_dot_product_attention"}


# --- modes, tracers, hooks -------------------------------------------------------------------------------------------
def test_dispatch_modes_see_the_operations(args):
    with Recorded() as forward, torch.no_grad():
        attention(*args)
    assert forward.names == ["fastdl.attention.default"]
    out = attention(*args)
    with Recorded() as backward:
        out.sum().backward()
    assert backward.names == ["fastdl.attention_backward.default"]


def test_fake_tensors(args):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in args]
        out = attention(*fakes, dropout_p=0.1)
        assert isinstance(out, torch._subclasses.FakeTensor) and out.shape == (2, 4, 5, 6)
        with pytest.raises(RuntimeError, match=r"argument 'value': expected \[..., 7, Ev\]"):
            attention(fakes[0], fakes[1], torch.empty(2, 4, 6, 8))
        assert [g.shape for g in torch.autograd.grad(out.sum(), fakes)] == [x.shape for x in args]
    assert not calls.handbacks


def test_profiler_shows_the_operations(args):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(*args).sum().backward()
    assert {"fastdl::attention", "fastdl::attention_backward"} <= {event.key for event in profile.key_averages()}


def test_tracers_record_torchs(args):
    graph = torch.fx.symbolic_trace(lambda q, k, v: attention(q, k, v))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [torchs]
    traced = torch.jit.trace(attention, tuple(t.detach() for t in args))
    assert "aten::scaled_dot_product_attention" in [node.kind() for node in traced.inlined_graph.nodes()]


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v, dropout_p=0.0)


@pytest.mark.parametrize("keep", [False, True], ids=["aten", "fastdl"])
def test_export(keep, args, monkeypatch):
    monkeypatch.setattr(route, "EXPORT_OPS", keep)
    torch._dynamo.reset()
    given = tuple(x.detach() for x in args[:3])
    program = torch.export.export(Model(), given, strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    name = "fastdl.attention.default" if keep else "aten.scaled_dot_product_attention.default"
    assert name in targets
    torch.testing.assert_close(program.module()(*given), torchs(*given), rtol=1e-4, atol=1e-5)


def test_saved_tensor_hooks_are_called(args):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(tuple(t.shape)) or t.clone(), lambda t: t):
        out = attention(*args)
    lse = (2, 4, 5, 2)
    assert packed == [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), (1, 4, 5, 7), (2, 4, 5, 6), lse]
    grads = torch.autograd.grad(out.sum(), args)
    torch.testing.assert_close(grads, torch.autograd.grad(torchs(*args).sum(), args), rtol=1e-4, atol=1e-5)


def test_lse_is_the_references(args):
    q, k, v, mask = (x.detach() for x in args)
    options = Options(0.3, hi=1)
    out, lse = torch.ops.fastdl.attention(q, k, v, mask[None], None, None, None, *options, True)
    doubles = (x.double() for x in (q, k, v, mask[None]))
    expected, wanted = reference.attention(*doubles, None, None, None, options)
    torch.testing.assert_close((out.double(), lse.double()), (expected, wanted), rtol=1e-4, atol=1e-5)
    assert lse.shape == wanted.shape and lse.dtype == torch.float32


def test_threads_share_nothing(args):
    expected = torch.autograd.grad(attention(*args).sum(), args)
    results = []

    def work():
        for _ in range(10):
            results.append(torch.autograd.grad(attention(*args).sum(), args))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_deterministic_at_any_thread_count(args):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            out = attention(*args, dropout_p=0.2)
            results.append((out, *torch.autograd.grad(out.sum(), args)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_kernels_are_counted(args):
    _C.reset_counters()
    attention(*args).sum().backward()
    assert sum(_C.counters().values()) == 2
