"""Recurrent layers inside the rest of torch: the compiler, autograd, torch.func, autocast, modes and tracers."""

import copy

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastdl
from fastdl import _C
from fastdl.ops import calls, route
from fastdl.ops.rnn_reference import GATES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
every_layer = pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
every_cell = pytest.mark.parametrize("cls", CELLS.values(), ids=CELLS)


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


def pair(cls, *args, **options):
    """(ours, stock) with the same parameters."""
    stock = cls(*args, **options)
    return fastdl.optimize(copy.deepcopy(stock)), stock


def tensors(out):
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def results(module, *args, leaves=()):
    """Results, and gradients of leaves and parameters."""
    out = tensors(module(*args))
    loss = sum((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in out)
    return out, list(torch.autograd.grad(loss, [*leaves, *module.parameters()]))


class Recorded(TorchDispatchMode):
    """fastdl's operations dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdl":
            self.names.append(func._schema.name.removeprefix("fastdl::"))
        return func(*args, **kwargs or {})


# --- operations ---------------------------------------------------------------------------------------------------
def operation_samples():
    """Arguments of rnn_layer: every mode, both forms of input, one and two directions, a projection."""
    cases = [
        ("lstm", torch.float32, 1, None, 0),
        ("lstm", torch.bfloat16, 2, None, 0),
        ("lstm", torch.float32, 2, (3, 2, 2), 0),
        ("lstm", torch.float32, 1, None, 2),
        ("lstm", torch.float64, 1, (3, 1), 2),
        ("gru", torch.float32, 2, None, 0),
        ("gru", torch.float16, 1, (3, 2, 2), 0),
        ("gru", torch.float64, 2, None, 0),
        ("rnn_tanh", torch.float32, 1, None, 0),
        ("rnn_relu", torch.float64, 1, None, 0),
    ]
    for mode, dtype, directions, sizes, proj in cases:
        generator = torch.Generator().manual_seed(1)

        def randn(*shape, dtype=dtype, generator=generator):
            return torch.randn(shape, generator=generator).to(dtype)

        B, features, H, rows = 3, 5, 4, GATES[mode] * 4
        P = proj or H
        x = randn(2, B, features) if sizes is None else randn(sum(sizes), features)
        weights = []
        for _ in range(directions):
            weights += [randn(rows, features), randn(rows, P), randn(rows), randn(rows)]
            weights += [randn(proj, H)] if proj else []
        c0 = randn(directions, B, H) if mode == "lstm" else None
        sizes = None if sizes is None else torch.tensor(sizes)
        yield x, randn(directions, B, P), c0, weights, sizes, mode, directions, True


every_sample = pytest.mark.parametrize(
    "sample",
    [
        pytest.param(s, id=f"{s[5]}-{str(s[0].dtype)[6:]}-{s[6]}{'-packed' * (s[4] is not None)}")
        for s in operation_samples()
    ],
)


@every_sample
def test_opcheck(sample):
    opcheck(torch.ops.fastdl.rnn_layer.default, sample)


@every_sample
def test_opcheck_backward(sample):
    x, h0, c0, weights, sizes, mode, directions, _ = sample
    y, _, c_n, saved = torch.ops.fastdl.rnn_layer(*sample)
    needs = [True, True, c0 is not None] + [True] * len(weights)
    dc = None if c0 is None else torch.ones_like(c_n)
    arguments = (torch.ones_like(y), None, dc, x, h0, c0, weights, sizes, y, saved, mode, directions, needs)
    opcheck(torch.ops.fastdl.rnn_layer_backward.default, arguments)


@pytest.mark.parametrize("mode", GATES)
def test_saved_shape_is_the_kernels(mode):
    H, T, B = 7, 5, 3
    weights = [torch.empty(GATES[mode] * H, 2), torch.empty(GATES[mode] * H, H)]
    saved = torch.ops.fastdl.rnn_layer(torch.ones(T, B, 2), None, None, weights, None, mode, 1, True)[3]
    assert tuple(saved.flatten(0, -2).shape) == _C.rnn_saved_shape(mode, T * B, B, H, H)
    assert torch.ops.fastdl.rnn_layer(torch.ones(T, B, 2), None, None, weights, None, mode, 1, False)[3].numel() == 0


def test_operations_refuse_other_dtypes():
    x = torch.ones(2, 2, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="expected a float32, bfloat16 or float16 tensor on cpu"):
        torch.ops.fastdl.rnn_layer(x, None, None, [x[0], x[0]], None, "rnn_tanh", 1, False)


@every_layer
def test_flops(cls):
    T, B, features, H = 5, 3, 8, 16
    layer = fastdl.optimize(cls(features, H, bidirectional=True))
    x = torch.randn(T, B, features, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)[0]
    forward = counter.get_total_flops()
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[cls]
    assert forward == 2 * 2 * T * B * gates * H * (features + H)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    x = x.detach()
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    assert counter.get_total_flops() == 3 * forward - 2 * 2 * T * B * gates * H * features


# --- gradcheck, on the reference path ------------------------------------------------------------------------------
GRADCHECKS = {
    "lstm": (nn.LSTM, {"bidirectional": True}, None),
    "lstm_layers": (nn.LSTM, {"num_layers": 2, "bias": False}, None),
    "lstm_proj": (nn.LSTM, {"proj_size": 2}, None),
    "lstm_packed": (nn.LSTM, {}, [3, 1]),
    "gru": (nn.GRU, {}, None),
    "gru_packed": (nn.GRU, {"bidirectional": True}, [3, 2]),
    "rnn": (nn.RNN, {"bidirectional": True}, None),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}, None),
}


def functional(layer, lengths):
    """layer as a function of input, states and parameters, giving a tuple."""
    names = [name for name, _ in layer.named_parameters()]
    lstm = layer.mode == "LSTM"

    def function(x, *rest):
        states, parameters = rest[: 1 + lstm], rest[1 + lstm :]
        x = x if lengths is None else pack_padded_sequence(x, lengths)
        given = (x, tuple(states) if lstm else states[0])
        return tuple(tensors(torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), given)))

    return function


def leaves_of(layer, T=3, B=2, dtype=torch.float64):
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(directions, B, layer.proj_size or layer.hidden_size, dtype=dtype)]
    states += [torch.randn(directions, B, layer.hidden_size, dtype=dtype)] if layer.mode == "LSTM" else []
    x = torch.randn(T, B, layer.input_size, dtype=dtype)
    return [x.requires_grad_() for x in (x, *states, *(p.detach() for p in layer.parameters()))]


@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck(case):
    cls, options, lengths = GRADCHECKS[case]
    layer = fastdl.optimize(cls(2, 3, **options).double())
    leaves = leaves_of(layer)
    assert torch.autograd.gradcheck(functional(layer, lengths), leaves, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(functional(layer, lengths), leaves, fast_mode=True)
    assert not calls.handbacks


@every_layer
def test_create_graph_with_float32(cls):
    ours, stock = pair(cls, 4, 5, num_layers=2, bidirectional=True)

    leaves = leaves_of(stock, dtype=torch.float32)

    def penalty(layer):
        out = functional(layer, None)(*leaves)
        first = torch.autograd.grad(sum(y.square().sum() for y in out), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(penalty(ours), penalty(stock), rtol=1e-3, atol=1e-4)
    assert not calls.handbacks


# --- torch.compile ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@every_layer
def test_compile(cls, options, compiled):
    """Forward and backward in one graph, where torch's own layers break it."""
    ours, stock = pair(cls, 4, 5, **options)
    x = torch.randn(3, 2, 4, requires_grad=True)
    torch.testing.assert_close(results(compiled(ours), x, leaves=[x]), results(stock, x, leaves=[x]))


def test_compile_with_states_and_packed_input(compiled):
    ours, stock = pair(nn.LSTM, 4, 5, bidirectional=True)
    x, hx = torch.randn(4, 3, 4), tuple(torch.randn(2, 3, 5) for _ in range(2))
    torch.testing.assert_close(compiled(ours)(x, hx), stock(x, hx))
    packed = pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False)
    for given in ((packed,), (packed, hx)):
        torch.testing.assert_close(results(compiled(ours), *given), results(stock, *given))


@every_cell
def test_compile_cells(cls, compiled):
    ours, stock = pair(cls, 4, 5)

    def roll(cell):
        def function(x):
            state = None
            for step in x:
                state = cell(step, state)
            return state

        return function

    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(compiled(roll(ours))(x), roll(stock)(x))


def test_compile_projection_dropout_and_unbatched(compiled):
    ours, stock = pair(nn.LSTM, 4, 5, num_layers=2, proj_size=3, dropout=0.5)
    torch.testing.assert_close(compiled(ours.eval())(torch.ones(3, 4)), stock.eval()(torch.ones(3, 4)))
    y = compiled(ours.train())(torch.ones(3, 2, 4))[0]
    assert y.shape == (3, 2, 3)


def test_compiled_graphs_hold_fastdls_operations(compiled):
    names = []

    def collect(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=collect, bw_compiler=collect)
    layer = fastdl.optimize(nn.GRU(4, 5))
    compiled(layer, backend=backend)(torch.ones(3, 2, 4))[0].sum().backward()
    assert [n for n in names if n.startswith("fastdl")] == [
        "fastdl.rnn_layer.default",
        "fastdl.rnn_layer_backward.default",
    ]


def test_compile_with_dynamic_lengths_compiles_once(compiled):
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    ours, stock = pair(nn.LSTM, 4, 5)
    function = compiled(ours, backend=backend, dynamic=True)
    for T, B in ((3, 2), (5, 4), (9, 3)):
        x = torch.randn(T, B, 4)
        torch.testing.assert_close(function(x), stock(x))
    assert len(frames) == 1


@pytest.mark.slow
def test_compile_with_inductor(compiled):
    ours, stock = pair(nn.LSTM, 4, 5, num_layers=2, bidirectional=True)
    x = torch.randn(3, 2, 4, requires_grad=True)
    expected = results(stock, x, leaves=[x])
    torch.testing.assert_close(results(compiled(ours, backend="inductor"), x, leaves=[x]), expected)


def test_torch_func_inside_compile_is_left_to_torch(compiled):
    ours, stock = pair(nn.GRU, 4, 5)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = torch.randn(3, 2, 4)

    def build(layer):
        return lambda: torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].square().sum())(
            parameters
        )

    torch.testing.assert_close(compiled(build(ours))(), build(stock)())
    assert {reason for _, reason in calls.handbacks} == {"torch.func inside torch.compile"}


# --- torch.func ---------------------------------------------------------------------------------------------------
@every_layer
def test_vmap(cls):
    layer = fastdl.optimize(cls(4, 5, num_layers=2, bidirectional=True))
    x = torch.randn(3, 2, 6, 4)
    for dim in (0, 1, 2):
        found = tensors(torch.func.vmap(lambda x: layer(x), dim)(x))
        each = [tensors(layer(y)) for y in x.unbind(dim)]
        torch.testing.assert_close(found, [torch.stack(y) for y in zip(*each, strict=True)])
    assert not calls.handbacks


@every_layer
def test_per_sample_gradients(cls):
    ours, stock = pair(cls, 4, 5)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = torch.randn(6, 3, 1, 4)

    def grad(layer):
        return torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,))[0].square().sum())

    found = torch.func.vmap(grad(ours), (None, 0))(parameters, x)
    each = [grad(stock)(parameters, y) for y in x]
    torch.testing.assert_close(found, {name: torch.stack([g[name] for g in each]) for name in found})
    assert not calls.handbacks


def test_vmapped_ensembles():
    models = [fastdl.optimize(nn.LSTM(4, 5)) for _ in range(3)]
    stacked = torch.func.stack_module_state(models)
    x = torch.randn(3, 2, 4)
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,))[0])(*stacked)
    torch.testing.assert_close(found, torch.stack([m(x)[0] for m in models]))


def test_forward_mode_is_left_to_torch():
    ours, stock = pair(nn.GRU, 4, 5)
    x = torch.randn(3, 2, 4)
    tangents = []
    for layer in (ours, stock):
        with forward_ad.dual_level(), torch.no_grad():
            y = layer(forward_ad.make_dual(x, torch.ones_like(x)))[0]
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)
    assert dict(calls.handbacks) == {("gru", "forward-mode differentiation"): 1}


# --- autocast, inference mode -------------------------------------------------------------------------------------
def torch_has_float16_lstm():
    """Some processors have float16 but not all that oneDNN's LSTM wants: it says so when called."""
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return False
    try:
        with torch.autocast("cpu", dtype=torch.float16):
            torch.nn.LSTM(4, 5)(torch.randn(3, 2, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["float32", "low", "states", "packed"])
@every_layer
def test_autocast_gives_torchs_dtypes(cls, form, dtype):
    if dtype == torch.float16 and not torch_has_float16_lstm():
        pytest.skip("torch's own float16 LSTM finds no kernel for this processor")
    ours, stock = pair(cls, 4, 5, num_layers=2)
    x = torch.randn(3, 2, 4)
    given = (x.to(dtype),) if form == "low" else (x,)
    if form == "states":
        h = torch.randn(2, 2, 5)
        given = (x.to(dtype), (h, h.clone()) if cls is nn.LSTM else h)
    if form == "packed":
        given = (pack_padded_sequence(x, [3, 2]),)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = tensors(ours(*given)), tensors(stock(*given))
    assert [y.dtype for y in found] == [y.dtype for y in expected]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(found[0].float().sum(), list(ours.parameters()))
    assert {g.dtype for g in grads} == {torch.float32}
    assert not calls.handbacks


@every_cell
def test_autocast_of_cells(cls):
    ours, stock = pair(cls, 4, 5)
    x = torch.randn(3, 4)
    with torch.autocast("cpu"):
        found, expected = tensors(ours(x)), tensors(stock(x))
    assert [y.dtype for y in found] == [y.dtype for y in expected]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_inference_mode():
    ours, stock = pair(nn.LSTM, 4, 5, num_layers=2)
    with torch.inference_mode():
        y = ours(torch.ones(3, 2, 4))
        assert y[0].is_inference()
        torch.testing.assert_close(y, stock(torch.ones(3, 2, 4)))


def test_inference_saves_nothing():
    layer = fastdl.optimize(nn.LSTM(4, 5))
    x = torch.ones(3, 2, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            layer(x)
        layer.requires_grad_(False)(x)
    assert not saved


# --- modes, tracers, hooks ----------------------------------------------------------------------------------------
def test_dispatch_modes_see_the_operations():
    layer = fastdl.optimize(nn.LSTM(4, 5, num_layers=2))
    x = torch.ones(3, 2, 4)
    with Recorded() as forward, torch.no_grad():
        layer(x)
    assert forward.names == ["rnn_layer"] * 2
    y = layer(x)[0].sum()
    with Recorded() as backward:
        y.backward()
    assert backward.names == ["rnn_layer_backward"] * 2


def test_profiler_shows_the_operations():
    layer = fastdl.optimize(nn.GRU(4, 5))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.ones(3, 2, 4))[0].sum().backward()
    assert {"fastdl::rnn_layer", "fastdl::rnn_layer_backward"} <= {event.key for event in profile.key_averages()}


def test_fake_and_meta_tensors():
    layer = fastdl.optimize(nn.LSTM(4, 5, bidirectional=True))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y, (h, c) = layer(torch.empty(3, 2, 4))
        assert isinstance(y, torch._subclasses.FakeTensor)
        assert (y.shape, h.shape, c.shape) == ((3, 2, 10), (2, 2, 5), (2, 2, 5))
        with pytest.raises(RuntimeError, match="to match input_size"):
            layer(torch.empty(3, 2, 5))
    assert not calls.handbacks
    assert layer.to("meta")(torch.empty(3, 2, 4, device="meta"))[0].shape == (3, 2, 10)
    assert {reason for _, reason in calls.handbacks} == {"input is on meta"}


class Output(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def test_jit_tracing_records_torchs_lstm():
    model = fastdl.optimize(Output(nn.LSTM(4, 5)))
    x = torch.randn(3, 2, 4)
    expected = model(x)
    traced = torch.jit.trace(model, (x,))
    assert "aten::lstm" in {node.kind() for node in traced.inlined_graph.nodes()}
    torch.testing.assert_close(traced(x), expected)
    assert set(calls.handbacks) == {("lstm", "torch.jit.trace")}


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("keep", [False, True], ids=["aten", "fastdl"])
def test_export(keep, strict, monkeypatch):
    monkeypatch.setattr(route, "EXPORT_OPS", keep)
    torch._dynamo.reset()
    model = fastdl.optimize(Output(nn.LSTM(4, 5))).eval()
    x = torch.randn(3, 2, 4)
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ("fastdl.rnn_layer.default" if keep else "aten.lstm.input") in targets
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint(use_reentrant):
    ours, stock = pair(nn.LSTM, 4, 5, num_layers=2, dropout=0.5)
    x = torch.randn(3, 2, 4, requires_grad=True)
    torch.manual_seed(1)
    y = checkpoint(lambda x: ours(x)[0], x, use_reentrant=use_reentrant)
    y.sum().backward()
    torch.manual_seed(1)
    expected = torch.autograd.grad(stock(x)[0].sum(), [x, *stock.parameters()])
    torch.testing.assert_close([x.grad, *(p.grad for p in ours.parameters())], list(expected))


class Wrapped(torch.Tensor):
    pass


def test_subclasses_are_left_to_torch():
    ours, _ = pair(nn.GRU, 4, 5)
    x = torch.randn(3, 2, 4)
    assert isinstance(ours(x.as_subclass(Wrapped))[0], Wrapped)
    assert dict(calls.handbacks) == {("gru", "input is a Wrapped"): 1}


def test_other_dtypes_are_left_to_torch():
    ours, stock = pair(nn.RNN, 4, 5)
    for layer in (ours, stock):
        for p in layer.parameters():
            p.data = p.data + 0j
    x = torch.randn(3, 2, 4) + 0j
    torch.testing.assert_close(ours(x), stock(x))
    assert dict(calls.handbacks) == {("rnn", "dtype complex64"): 1}


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_hand_backs_give_what_torch_gives(kind, monkeypatch):
    """All forms of a call, run by torch because this build is said to have no vector level."""
    monkeypatch.setattr(route, "HAS_VECTOR_LEVEL", False)
    monkeypatch.setattr("fastdl.ops.rnn.PLAIN_TYPES", frozenset())
    x = torch.randn(3, 2, 4)
    for options in ({}, {"num_layers": 2, "bidirectional": True, "bias": False}):
        ours, stock = pair(LAYERS[kind], 4, 5, **options)
        for given in (x, x[:, 0], pack_padded_sequence(x, [3, 1])):
            torch.testing.assert_close(ours(given), stock(given), rtol=0, atol=0)
    for options in ({}, {"bias": False}):
        ours, stock = pair(CELLS[kind], 4, 5, **options)
        torch.testing.assert_close(ours(x[0]), stock(x[0]), rtol=0, atol=0)
    if kind == "rnn":
        ours, stock = pair(nn.RNN, 4, 5, nonlinearity="relu")
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)
    names = {op for op, _ in calls.handbacks}
    assert names == {kind, f"{kind}_cell"}
