"""Long sequences are cut in time: states carried from piece to piece, gradients summed over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdl import nn
from fastdl.ops import rnn_native

MODULES = {
    "lstm": lambda: nn.LSTM(12, 20),
    "two_ways": lambda: nn.LSTM(12, 20, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(12, 20, proj_size=7, bidirectional=True),
    "no_bias": lambda: nn.LSTM(12, 20, bias=False),
    "gru": lambda: nn.GRU(12, 20, bidirectional=True),
    "tanh": lambda: nn.RNN(12, 20, bidirectional=True),
}


def results(module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """Inference, training, and gradients of the input, the states and all parameters."""
    hx = None if not states else states if len(states) == 2 else states[0]

    def run() -> list[Tensor]:
        y, last = module(x, hx)
        return [y, *(last if isinstance(last, tuple) else (last,))]

    with torch.no_grad():
        found = run()
    trained = run()
    weight = torch.linspace(-1, 1, trained[0].numel()).view_as(trained[0])
    loss = (trained[0] * weight).sum() + sum(s.square().sum() for s in trained[1:])
    return [*found, *trained, *torch.autograd.grad(loss, [x, *states, *module.parameters()])]


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of 5 steps of 3 rows; the list is of the pieces of each call."""
    counts: list[int] = []
    pieces = rnn_native._pieces

    def counted(*args: object) -> list[slice]:
        out = pieces(*args)
        counts.append(len(out))
        return out

    monkeypatch.setattr(rnn_native, "_CUT_BYTES", 1)
    monkeypatch.setattr(rnn_native, "_PIECE_BYTES", 1)
    monkeypatch.setattr(rnn_native, "_PIECE_ROWS", 15)
    monkeypatch.setattr(rnn_native, "_pieces", counted)
    return counts


@pytest.mark.parametrize("T", (5, 6, 17))
@pytest.mark.parametrize("given", (False, True), ids=("zeros", "states"))
@pytest.mark.parametrize("name", MODULES)
def test_pieces_give_what_the_whole_gives(name: str, given: bool, T: int, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(1)
    module = MODULES[name]()
    x = torch.randn(T, 3, 12, requires_grad=True)
    states: tuple[Tensor, ...] = ()
    if given:
        _, last = module(x)
        states = tuple(torch.randn_like(s).requires_grad_() for s in (last if isinstance(last, tuple) else (last,)))
    expected = results(module, x, states)
    counts = request.getfixturevalue("cut")
    found = results(module, x, states)
    assert set(counts) == {-(-T // 5)}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


def test_narrow_dtypes_and_packed_input_stay_whole(cut: list[int]) -> None:
    module = nn.LSTM(12, 20)
    with torch.no_grad():
        module(torch.nn.utils.rnn.pack_padded_sequence(torch.randn(17, 3, 12), [17, 9, 2]))
        module.to(torch.bfloat16)(torch.randn(17, 3, 12, dtype=torch.bfloat16))
    assert cut == [1, 1]


def test_long_sequences_are_cut() -> None:
    w = rnn_native.Weights(torch.empty(1024, 256), torch.empty(1024, 256), None, None, None)
    whole = rnn_native._pieces((1000, 8), w, torch.float32, False)
    assert whole == [slice(0, 1000)]
    pieces = rnn_native._pieces((2000, 8), w, torch.float32, False)
    assert len(pieces) == 16 and pieces[0] == slice(0, 128) and pieces[-1] == slice(1920, 2000)
    assert rnn_native._pieces((2000, 8), w, torch.float32, True) == pieces[::-1]


def test_a_hundred_thousand_steps() -> None:
    torch.manual_seed(2)
    theirs = torch.nn.LSTM(4, 24)
    ours = nn.LSTM(4, 24)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(100_000, 4, 4)
    with torch.no_grad():
        assert rnn_native._pieces(x.shape[:2], rnn_native.Weights(*theirs.parameters(), None), x.dtype, False)[1:]
        found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(found[1][1], expected[1][1], rtol=1e-4, atol=1e-5)
