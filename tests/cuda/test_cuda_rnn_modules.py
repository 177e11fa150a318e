"""LSTM, GRU, RNN and their cells on CUDA tensors as users call them, on the host twin or a GPU, against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastdl
from fastdl.ops import calls, cuda

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
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
        scale = max(1.0, b.abs().max().item())
        assert (a.cpu().double() - b).abs().max().item() <= tolerance * scale, i


@every_layer
def test_layers(cls, gpu):
    """Two layers in both directions, with and without states."""
    stock = cls(5, 6, num_layers=2, bidirectional=True)
    x = torch.randn(3, 4, 5)
    check(gpu, stock, x)
    h = torch.randn(4, 4, 6)
    check(gpu, cls(5, 6, num_layers=2, bidirectional=True, batch_first=True), x.transpose(0, 1).contiguous(),
          (h, torch.randn(4, 4, 6)) if cls is nn.LSTM else h)  # fmt: skip


@every_layer
def test_packed(cls, gpu):
    x = pack_padded_sequence(torch.randn(4, 3, 5), torch.tensor([2, 4, 1]), enforce_sorted=False)
    stock = cls(5, 17, bidirectional=True, bias=cls is not nn.GRU)
    h = torch.randn(2, 3, 17)
    check(gpu, stock, x)
    check(gpu, stock, x, (h, torch.randn(2, 3, 17)) if cls is nn.LSTM else h)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_projections(gpu):
    check(gpu, nn.LSTM(5, 9, proj_size=3, bidirectional=True, num_layers=2), torch.randn(3, 2, 5))


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
