"""LSTM, GRU, RNN and their cells on CUDA tensors as users call them, on the host twin or a GPU, against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastdl
from fastdl.ops import calls, cuda, cuda_rnn
from fastdl.ops.rnn_reference import GATES

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
PRECISION = cuda.precision
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
every_layer = pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
every_cell = pytest.mark.parametrize("cls", CELLS.values(), ids=CELLS)


@pytest.fixture(autouse=True)
def nothing_is_handed_back(monkeypatch):
    monkeypatch.setattr(cuda, "precision", lambda operation: "ieee")
    torch.manual_seed(3)
    calls.handbacks.clear()
    yield
    assert not calls.handbacks


def on(x, where, dtype=torch.float32):
    if isinstance(x, PackedSequence):
        return PackedSequence(on(x.data, where, dtype), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return None if x is None else tuple(on(y, where, dtype) for y in x) if isinstance(x, tuple) else x.to(where, dtype)


def results(module, x, hx):
    """Results, then gradients of the input, the states and the parameters."""
    packed = isinstance(x, PackedSequence)
    states = [] if hx is None else [*hx] if isinstance(hx, tuple) else [hx]
    leaves = [t.detach().requires_grad_() for t in (x.data if packed else x, *states)]
    input = PackedSequence(leaves[0], *x[1:]) if packed else leaves[0]
    hx = None if hx is None else tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]
    out = module(input, hx)
    out = [out[0].data, *tree_leaves(out[1])] if packed else tree_leaves(out)
    loss = sum((y.double() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum() for y in out)
    return [y.detach() for y in out] + list(torch.autograd.grad(loss, [*leaves, *module.parameters()]))


def check(gpu, stock, x, hx=None, dtype=torch.float32, tolerance=2e-5):
    ours = fastdl.optimize(copy.deepcopy(stock).to(gpu.device, dtype))
    exact = copy.deepcopy(ours).cpu().double()
    fastdl.restore(exact)
    got = results(ours, on(x, gpu.device, dtype), on(hx, gpu.device, dtype))
    rounded = on(on(x, "cpu", dtype), "cpu", torch.float64), on(on(hx, "cpu", dtype), "cpu", torch.float64)
    expected = results(exact, *rounded)
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        error, scale = (a.cpu().double() - b).abs(), max([1.0, *b.abs().flatten().tolist()])
        assert bool((error <= tolerance * scale).all()), i


KINDS = {
    "lstm": (nn.LSTM, {}),
    "lstm_proj": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
# Hidden sizes around the units of a group, 8 or 16, and the K of a block, 32; beside each other option, (T, B) and how
# the input comes.
OPTIONS = [
    (7, {"num_layers": 2, "bias": False}, (3, 4), "batched"),
    (8, {"bidirectional": True, "batch_first": True}, (3, 4), "states"),
    (9, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}, (4, 3), "packed"),
    (15, {"bidirectional": True}, (1, 4), "states"),
    (16, {"num_layers": 2}, (3, None), "states"),
    (17, {"bidirectional": True, "num_layers": 2}, (4, 3), "unsorted"),
    (31, {"batch_first": True}, (4, 3), "unsorted states"),
    (32, {}, (1, 1), "batched"),
    (33, {"bidirectional": True, "bias": False}, (2, None), "batched"),
    (5, {"bidirectional": True, "num_layers": 2}, (3, 0), "states"),
    (6, {"dropout": 0.5, "num_layers": 3, "bidirectional": True}, (3, 2), "evaluated"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden, options, sizes, form", OPTIONS, ids=[f"{o[0]}-{o[3]}" for o in OPTIONS])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_every_option(kind, hidden, options, sizes, form, gpu):
    """Against torch's own in float64, results and gradients."""
    cls, more = KINDS[kind]
    stock, (T, B) = cls(5, hidden, **more, **options), sizes
    states, batch = stock.num_layers * (2 if stock.bidirectional else 1), () if B is None else (B,)
    x, hx = torch.randn(T, *batch, 5), None
    if "states" in form:
        h = torch.randn(states, *batch, stock.proj_size or hidden)
        hx = (h, torch.randn(states, *batch, hidden)) if cls is nn.LSTM else h
    if stock.batch_first and batch:
        x = x.transpose(0, 1).contiguous()
    if "packed" in form or "unsorted" in form:
        lengths = torch.tensor([4, 2, 1] if form == "packed" else [2, 4, 1])
        x = pack_padded_sequence(x, lengths, stock.batch_first, enforce_sorted=form == "packed")
    check(gpu, stock.eval() if form == "evaluated" else stock, x, hx)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bits(cls, dtype, gpu):
    check(gpu, cls(5, 6), torch.randn(3, 4, 5), dtype=dtype, tolerance=4e-2)


@every_cell
def test_cells(cls, gpu):
    h = torch.randn(4, 6)
    check(gpu, cls(5, 6), torch.randn(4, 5), (h, torch.randn(4, 6)) if cls is nn.LSTMCell else h)
    check(gpu, cls(5, 6, bias=False), torch.randn(4, 5))


@every_layer
def test_inference_gives_the_bits_of_training(cls, gpu):
    ours = fastdl.optimize(cls(5, 6, num_layers=2).to(gpu.device))
    x = torch.randn(3, 4, 5, device=gpu.device)
    trained = ours(x)[0].detach()
    with torch.inference_mode():
        assert torch.equal(ours(x)[0], trained)


@pytest.mark.sanitized
def test_states_before_packed_steps(gpu):
    sizes = list(range(70, 0, -3))
    rows, first, batch_sizes = sum(sizes), sizes[0], torch.tensor(sizes)
    for dtype, reverse in ((torch.float32, False), (torch.bfloat16, True)):
        y, h0 = torch.randn(rows, 3).to(dtype), torch.randn(first, 3).to(dtype)
        state, steps = h0.clone(), list(y.split(sizes))
        expected = [None] * len(sizes)
        for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
            expected[t] = state[: sizes[t]].clone()
            state = torch.cat([steps[t], state[sizes[t] :]])
        out = torch.full((rows, 3), float("nan"), dtype=dtype, device=gpu.device)
        gpu.module.rnn_states_before(out, y.to(gpu.device), h0.to(gpu.device), batch_sizes, reverse)
        assert torch.equal(out.cpu(), torch.cat(expected))


def test_explain_names_the_kernel(gpu):
    ours = fastdl.optimize(nn.GRU(5, 6).to(gpu.device))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "observer", seen.append)
        ours(torch.randn(3, 4, 5, device=gpu.device))
    assert [call.kernel for call in seen] == ["gru_f32_16x32_resident_sm80"]


def test_dropout_between_layers_is_torchs(gpu):
    """The same masks from the same seed, and gradients through them."""
    if not gpu.is_twin:
        pytest.skip("a GPU draws other masks")
    stock, x = nn.GRU(5, 6, num_layers=3, dropout=0.5, bidirectional=True), torch.randn(3, 2, 5)
    ours, exact = fastdl.optimize(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    found = []
    for module, input in ((ours, x), (exact, x.double())):
        torch.manual_seed(11)
        found.append(results(module, input, None))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


# --- the operations ---------------------------------------------------------------------------------------------------
SAMPLES = [  # mode, dtype, directions, batch sizes, projection
    ("lstm", torch.float32, 2, None, 0),
    ("lstm", torch.float32, 1, (3, 2, 2), 2),
    ("lstm", torch.bfloat16, 1, None, 0),
    ("gru", torch.float32, 2, (3, 2, 2), 0),
    ("gru", torch.float16, 1, None, 0),
    ("rnn_tanh", torch.float32, 1, None, 0),
    ("rnn_relu", torch.float32, 2, (3, 1), 0),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s[0]}-{str(s[1])[6:]}-{s[2]}-{s[3]}-{s[4]}")
def test_opcheck(sample, gpu):
    """Schemas, fakes and strides, of the implementation that CUDA tensors get."""
    mode, dtype, directions, sizes, proj = sample

    def randn(*shape):
        return torch.randn(*shape).to(gpu.device, dtype)

    B, features, H = 3, 5, 4
    x = randn(2, B, features) if sizes is None else randn(sum(sizes), features)
    weights = []
    for _ in range(directions):
        rows = GATES[mode] * H
        weights += [randn(rows, features), randn(rows, proj or H), randn(rows), randn(rows)]
        weights += [randn(proj, H)] if proj else []
    c0 = randn(directions, B, H) if mode == "lstm" else None
    sizes = None if sizes is None else torch.tensor(sizes)
    layer = (x, randn(directions, B, proj or H), c0, weights, sizes, mode, directions, True)
    opcheck(torch.ops.fastdl.rnn_layer.default, layer)
    y, _, c_n, saved = torch.ops.fastdl.rnn_layer(*layer)
    needs = [True, True, c0 is not None] + [True] * len(weights)
    dc = None if c0 is None else torch.ones_like(c_n)
    backward = (torch.ones_like(y), None, dc, *layer[:5], y, saved, mode, directions, needs)
    opcheck(torch.ops.fastdl.rnn_layer_backward.default, backward)


def test_precision_is_that_of_torchs_switch(gpu, monkeypatch):
    """tf32 unless told otherwise, as cuDNN; by FMA where FASTDL_FLOAT32=ieee."""
    monkeypatch.setattr(cuda, "precision", PRECISION)
    x, rnn = torch.randn(2, 1, 5, device=gpu.device), torch.backends.cudnn.rnn
    weights = [torch.randn(*shape, device=gpu.device) for shape in ((4, 5), (4, 4), (4,), (4,))]
    before = rnn.fp32_precision
    try:
        for precision, float32, kernel in (
            ("tf32", "", "rnn_tf32_16x32_resident_sm80"),
            ("ieee", "", "rnn_f32_16x32_resident_sm80"),
            ("tf32", "ieee", "rnn_f32_fma_16x32_resident_sm80"),
        ):
            rnn.fp32_precision = precision
            monkeypatch.setattr(cuda, "_FLOAT32", float32)
            assert cuda_rnn.plan(x, 2, 1, 4, 0, "rnn_tanh")["kernel"] == kernel
            y = torch.ops.fastdl.rnn_layer(x, None, None, weights, None, "rnn_tanh", 1, False)[0]
            assert bool(y.isfinite().all())
    finally:
        rnn.fp32_precision = before
