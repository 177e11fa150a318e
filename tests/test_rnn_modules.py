"""fastdl.nn.LSTM, GRU, RNN and their cells: every option against torch's own."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastdl
from fastdl import _C
from fastdl.ops import calls
from rnn_layers import CELL_X, HIDDEN, INPUT, LAYERS, X, cell_of, every_cell, every_layer, layer_of, swapped

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    torch.manual_seed(5)


@pytest.fixture
def kernel_calls():
    """kernel_calls() -> recurrent kernels run since the last time it was asked."""

    def count():
        total = sum(_C.counters()[row["name"]] for row in _C.kernels("rnn"))
        _C.reset_counters()
        return total

    count()
    return count


def states_for(layer, batch):
    """Random (h_0, c_0) or h_0 for a stock layer; no batch dimension with batch None."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    lead = (count,) if batch is None else (count, batch)
    h = torch.randn(*lead, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(*lead, layer.hidden_size)) if isinstance(layer, nn.LSTM) else h


def tensors(out):
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def run(module, make, input, hx):
    """Results, and gradients of input, states and parameters under a loss that tells every element apart."""
    leaves = [x.detach().clone().requires_grad_() for x in (input, *tree_leaves(hx)) if x is not None]
    x, *states = leaves
    out = tensors(module(make(x), tuple(states) if isinstance(hx, tuple) else states[0] if states else None))
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in out)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(loss, leaves + parameters, allow_unused=True)
    return out, list(grads)


def assert_alike(ours, theirs, input, hx=None, make=lambda x: x, **tolerance):
    found, wanted = run(ours, make, input, hx), run(theirs, make, input, hx)
    torch.testing.assert_close(found, wanted, **tolerance)
    for a, b in zip(found[0], wanted[0], strict=True):
        assert a.stride() == b.stride()
    with torch.no_grad():
        again = tensors(ours(make(input), hx))
    torch.testing.assert_close(again, [x.detach() for x in found[0]], rtol=0, atol=0)
    assert not calls.handbacks


# --- every option -------------------------------------------------------------------------------------------------
FORMS = {
    "batched": {},
    "unbatched": {},
    "packed": {"lengths": [5, 4, 4, 1], "enforce_sorted": True},
    "unsorted": {"lengths": [2, 5, 1, 4], "enforce_sorted": False},
}


@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@every_layer
def test_layers(kind, bidirectional, form, states):
    T, B = 5, 4
    for num_layers, bias, batch_first in ((1, False, True), (2, True, False)):
        stock = layer_of(kind, num_layers=num_layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        input = torch.randn(T, INPUT) if form == "unbatched" else torch.randn(T, B, INPUT)
        if batch_first and form != "unbatched":
            input = input.transpose(0, 1).contiguous()
        hx = states_for(stock, None if form == "unbatched" else B) if states else None
        packing = FORMS[form]

        def make(x, packing=packing, batch_first=batch_first):
            return pack_padded_sequence(x, batch_first=batch_first, **packing) if packing else x

        assert_alike(swapped(stock), stock, input, hx, make)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 0), (23, 2)], ids=str)
@every_layer
def test_lengths_and_batches(kind, shape):
    stock = layer_of(kind, bidirectional=True)
    assert_alike(swapped(stock), stock, torch.randn(*shape, INPUT), states_for(stock, shape[1]))


@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@every_cell
def test_cells(kind, bias, states):
    stock = cell_of(kind, bias=bias)
    for lead in ((), (1,), (5,), (0,)):
        h = torch.randn(*lead, HIDDEN)
        hx = ((h, torch.randn(*lead, HIDDEN)) if kind == "lstm" else h) if states else None
        assert_alike(swapped(stock), stock, torch.randn(*lead, INPUT), hx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_layer
def test_low_precision_is_as_near_as_torchs(kind, dtype):
    """Of the float64 result on the same rounded parameters; torch computes in the dtype as well."""
    stock = layer_of(kind, num_layers=2, bidirectional=True).to(dtype)
    x, exact = torch.randn(30, 3, INPUT).to(dtype), copy.deepcopy(stock).double()
    expected, theirs, ours = exact(x.double())[0], stock(x)[0], swapped(stock)(x)[0]
    assert ours.dtype == dtype
    errors = [(y.double() - expected).square().mean().sqrt() for y in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]


def test_only_needed_gradients():
    stock = layer_of("lstm", num_layers=2)
    for wanted in (["weight_hh_l0"], ["weight_ih_l1", "bias_hh_l0"], ["bias_ih_l1"], []):
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_(name in wanted)
        stock.zero_grad()
        ours, x = swapped(stock), torch.randn(3, 2, INPUT, requires_grad=not wanted)
        for module in (ours, stock):
            module(x)[0].square().sum().backward()
        for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)


def test_gradient_through_the_last_states_alone():
    for kind in LAYERS:
        stock = layer_of(kind, num_layers=2, bidirectional=True)
        grads = []
        for module in (swapped(stock), stock):
            last = tensors(module(torch.ones(4, 3, INPUT))[1])
            grads.append(torch.autograd.grad(sum(h.square().sum() for h in last), list(module.parameters())))
        torch.testing.assert_close(*grads)


def test_dropout_between_layers_draws_as_torch_does():
    stock = layer_of("gru", num_layers=3, dropout=0.5, bidirectional=True)
    ours, x = swapped(stock), torch.randn(5, 3, INPUT)
    results = []
    for module in (ours, stock):
        torch.manual_seed(3)
        results.append(run(module, lambda x: x, x, None))
    torch.testing.assert_close(*results)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))
    everything = swapped(layer_of("lstm", num_layers=2, dropout=1.0))
    torch.manual_seed(0)
    assert everything(x)[0].isfinite().all()


def test_runs_kernels_not_torch(kernel_calls):
    layer = fastdl.optimize(layer_of("lstm", num_layers=2, bidirectional=True))
    x = torch.randn(5, 3, INPUT)
    layer(x)[0].sum().backward()
    assert kernel_calls() == 8
    with torch.no_grad():
        layer(pack_padded_sequence(x, [5, 3, 1]))
    assert kernel_calls() == 4
    cell = fastdl.optimize(cell_of("gru"))
    cell(x[0])
    assert kernel_calls() == 1
    assert not calls.handbacks


def test_padding_does_not_reach_the_results():
    """What lies behind the end of a sequence may be anything."""
    layer = fastdl.optimize(layer_of("gru", bidirectional=True, batch_first=True))
    lengths = torch.tensor([2, 6, 1])
    x = torch.randn(3, 6, INPUT)
    behind = torch.arange(6)[None, :, None] >= lengths[:, None, None]
    clean, dirty = x.masked_fill(behind, 0.0), x.masked_fill(behind, math.nan)
    results = []
    for data in (clean, dirty):
        y, h = layer(pack_padded_sequence(data, lengths, batch_first=True, enforce_sorted=False))
        results.append((pad_packed_sequence(y, batch_first=True)[0], h))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for i, length in enumerate(lengths):
        alone, h = layer(x[i, :length])
        torch.testing.assert_close((results[0][0][i, :length], results[0][1][:, i]), (alone, h))


def test_strides_of_the_input():
    stock = layer_of("lstm")
    ours = swapped(stock)
    for x in (
        torch.randn(INPUT, 4, 5).permute(2, 1, 0),
        torch.randn(5, 4, 2 * INPUT)[..., ::2],
        torch.randn(1, 4, INPUT).expand(5, 4, INPUT),
        torch.randn(5, 4, INPUT).flip(0),
    ):
        h = torch.randn(HIDDEN, 4, 1).permute(2, 1, 0)
        torch.testing.assert_close(ours(x, (h, h.clone())), stock(x, (h, h.clone())))


# --- numbers that are hard ----------------------------------------------------------------------------------------
@every_layer
def test_saturated_gates(kind):
    stock = layer_of(kind)
    if kind == "rnn_relu":
        pytest.skip("grows without bound, in torch as well")
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(1e4)
    assert_alike(swapped(stock), stock, torch.randn(6, 3, INPUT), rtol=1e-3, atol=1e-3)


def test_a_hundred_thousand_steps():
    stock = nn.GRU(2, 3)
    ours, x = swapped(stock), torch.randn(100_000, 1, 2)
    with torch.no_grad():
        y, expected = ours(x)[0], stock(x)[0]
    assert y.shape == expected.shape
    torch.testing.assert_close(y[::1000], expected[::1000], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_error_does_not_grow_with_time(kind):
    """Over 1000 steps, at each of them at most twice torch's error in the same dtype."""
    torch.manual_seed(0)
    cls, options = LAYERS[kind]
    stock = cls(16, 32, **options)
    x = torch.randn(1000, 4, 16)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())[0]
        ours, theirs = (
            (module(x)[0].double() - exact).square().mean((1, 2)).sqrt() for module in (swapped(stock), stock)
        )
    window = torch.ones(1, 1, 50) / 50  # the error of a single step is a matter of chance
    ours, theirs = (torch.nn.functional.conv1d(e[None, None], window.double())[0, 0] for e in (ours, theirs))
    assert (ours <= 2 * theirs + 1e-9).all()


# --- bad input: torch's exception types, our messages ------------------------------------------------------------
H = torch.randn(1, 3, HIDDEN)
BAD_LSTM = {
    "rank 1": (lambda m: m(X[0, 0]), ValueError, "argument 'input': expected 2-D or 3-D, got shape"),
    "rank 4": (lambda m: m(X[None]), ValueError, "argument 'input': expected 2-D or 3-D, got shape"),
    "input size": (lambda m: m(X[..., :5]), RuntimeError, r"argument 'input': expected \[..., 6\] to match input_size"),
    "no tensor": (lambda m: m([1.0]), TypeError, "argument 'input': expected a torch.Tensor, got list"),
    "none": (lambda m: m(None), TypeError, "argument 'input': expected a torch.Tensor, got NoneType"),
    "dtype": (lambda m: m(X.double()), ValueError, "argument 'input': expected the dtype of the parameters"),
    "integers": (lambda m: m(X.long()), ValueError, "argument 'input': expected the dtype of the parameters"),
    "no steps": (lambda m: m(X[:0]), RuntimeError, "argument 'input': expected at least one time step"),
    "bare hx": (lambda m: m(X, H), TypeError, r"argument 'hx': expected a tuple \(h_0, c_0\), got Tensor"),
    "three states": (lambda m: m(X, (H, H, H)), RuntimeError, "argument 'hx': expected two tensors"),
    "hx of numbers": (lambda m: m(X, (1, 2)), TypeError, r"argument 'hx\[0\]': expected a torch.Tensor, got int"),
    "hx rank": (lambda m: m(X, (H[0], H[0])), RuntimeError, "argument 'hx': expected 3-D for a batched"),
    "hx rank unbatched": (lambda m: m(X[:, 0], (H, H)), RuntimeError, "argument 'hx': expected 2-D for an unbatched"),
    "hx batch": (lambda m: m(X, (H[:, :2], H)), RuntimeError, r"argument 'hx': expected \[1, 3, 9\]"),
    "cx features": (lambda m: m(X, (H, H[..., :4])), RuntimeError, r"argument 'cx': expected \[1, 3, 9\]"),
    "hx dtype": (lambda m: m(X, (H.double(), H)), RuntimeError, "expected tensors of one dtype, got input float32"),
    "meta hx": (lambda m: m(X, (H.to("meta"), H)), RuntimeError, "expected all tensors on one device"),
    "packed rank": (
        lambda m: m(PackedSequence(X, torch.tensor([3, 2]))),
        RuntimeError,
        "argument 'input': expected packed 2-D data",
    ),
    "packed too short": (
        lambda m: m(PackedSequence(X[:2, 0], torch.tensor([3, 2]))),
        RuntimeError,
        "batch_sizes",
    ),
    "packed too long": (lambda m: m(PackedSequence(X[:, 0], torch.tensor([2, 1]))), RuntimeError, "batch_sizes"),
    "packed growing": (lambda m: m(PackedSequence(X[:, 0], torch.tensor([2, 3]))), RuntimeError, "batch_sizes"),
    "packed zero": (lambda m: m(PackedSequence(X[:, 0], torch.tensor([3, 2, 0]))), RuntimeError, "batch_sizes"),
    "packed negative": (lambda m: m(PackedSequence(X[:, 0], torch.tensor([7, -2]))), RuntimeError, "batch_sizes"),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("case", BAD_LSTM)
def test_bad_input(case, grad):
    call, exception, message = BAD_LSTM[case]
    with torch.set_grad_enabled(grad), pytest.raises(exception, match=message):
        call(fastdl.optimize(layer_of("lstm")))


@pytest.mark.parametrize("case", ["rank 1", "rank 4", "input size", "dtype", "no steps", "packed too short"])
def test_exceptions_are_torchs(case):
    call, exception, _ = BAD_LSTM[case]
    with pytest.raises(exception):
        call(layer_of("lstm"))


@pytest.mark.parametrize("kind", ["gru", "rnn_tanh"])
def test_bad_states_of_the_others(kind):
    layer = fastdl.optimize(layer_of(kind))
    with pytest.raises(TypeError, match=r"argument 'hx': expected a torch.Tensor, got tuple"):
        layer(X, (H, H))
    with pytest.raises(RuntimeError, match=r"argument 'hx': expected \[1, 3, 9\]"):
        layer(X, H[..., :5])
    with pytest.raises(RuntimeError, match="expected 2-D for an unbatched"):
        layer(X[:, 0], H)


@pytest.mark.parametrize("form", ["padded", "packed", "double"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_ih_l0", (36, 7)),
        ("weight_hh_l1", (36, 8)),
        ("weight_hh_l0_reverse", (27, 9)),
        ("bias_ih_l1", (35,)),
        ("bias_hh_l0", (1, 36)),
    ],
)
def test_wrongly_shaped_parameters(form, name, shape):
    layer = fastdl.optimize(layer_of("lstm", num_layers=2, bidirectional=True))
    setattr(layer, name, nn.Parameter(torch.zeros(shape)))
    layer, x = (layer.double(), X.double()) if form == "double" else (layer, X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"fastdl.lstm: argument '{name}': expected"):
            layer(pack_padded_sequence(x, [5, 4, 2]) if form == "packed" else x)


def test_bad_constructor_arguments_are_torchs():
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
        fastdl.nn.LSTM(3, 4, proj_size=4)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        fastdl.nn.GRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match="dropout should be a number in range"):
        fastdl.nn.RNN(3, 4, dropout=1.5)
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        fastdl.nn.RNN(3, 4, nonlinearity="gelu")


CELL_H = torch.randn(3, HIDDEN)
BAD_CELL = {
    "rank": (lambda m: m(X), ValueError, "argument 'input': expected 1-D or 2-D"),
    "hx rank": (lambda m: m(CELL_X, CELL_H[None]), ValueError, "argument 'hx': expected 1-D or 2-D"),
    "hx batch": (lambda m: m(CELL_X, CELL_H[:2]), RuntimeError, "argument 'hx': expected"),
    "hx unbatched": (lambda m: m(CELL_X, CELL_H[0]), RuntimeError, "argument 'hx': expected 2-D for a 2-D input"),
    "hx features": (lambda m: m(CELL_X, CELL_H[:, :5]), RuntimeError, "argument 'hx': expected"),
    "input size": (lambda m: m(CELL_X[:, :5]), RuntimeError, "to match input_size"),
    "dtype": (lambda m: m(CELL_X.double()), RuntimeError, "expected tensors of one dtype"),
    "hx dtype": (lambda m: m(CELL_X, CELL_H.double()), RuntimeError, "expected tensors of one dtype"),
    "no tensor": (lambda m: m(3), TypeError, "argument 'input': expected a torch.Tensor, got int"),
    "tuple": (lambda m: m(CELL_X, (CELL_H, CELL_H)), TypeError, "argument 'hx': expected a torch.Tensor, got tuple"),
}


@pytest.mark.parametrize("case", BAD_CELL)
def test_bad_input_of_cells(case):
    call, exception, message = BAD_CELL[case]
    with pytest.raises(exception, match=message):
        call(fastdl.optimize(cell_of("gru")))


def test_bad_states_of_lstm_cell():
    cell = fastdl.optimize(cell_of("lstm"))
    with pytest.raises(TypeError, match=r"fastdl.lstm_cell: argument 'hx': expected a tuple \(h_0, c_0\), got Tensor"):
        cell(CELL_X, CELL_H)
    cell.weight_hh = nn.Parameter(torch.zeros(36, 8))
    with pytest.raises(RuntimeError, match=r"argument 'weight_hh': expected shape \[36, 9\]"):
        cell(CELL_X)


@every_layer
def test_a_weight_changed_in_place_before_backward_is_an_error(kind):
    layer = fastdl.optimize(layer_of(kind))
    y = layer(X)[0]
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
