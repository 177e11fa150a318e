"""The short way of recurrent cells: one native call for what nearly every eager call is."""

import pytest
import torch

from fastdl import _C
from fastdl.ops.rnn_reference import GATES


def cell_arguments(mode, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(1)
    G, H, draw = GATES[mode], 11, lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    c = draw(3, H) if mode == "lstm" else None
    return [
        mode,
        H,
        draw(3, 7),
        draw(3, H),
        c,
        draw(G * H, 7),
        draw(G * H, H),
        *([draw(G * H), draw(G * H)] if bias else [None, None]),
    ]


@pytest.mark.parametrize("mode", GATES)
def test_one_call_gives_what_the_layer_gives(mode):
    for dtype, bias in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        _, _, x, h, c, *weights = arguments = cell_arguments(mode, dtype, bias)
        got = _C.rnn_cell(*arguments)
        weights = [w for w in weights if w is not None]
        _, h_n, c_n, _ = torch.ops.fastdl.rnn_layer(
            x[None], h[None], None if c is None else c[None], weights, None, mode, 1, False
        )
        assert torch.equal(got[0] if mode == "lstm" else got, h_n[0])
        assert mode != "lstm" or torch.equal(got[1], c_n[0])
        strided = [
            t.t().contiguous().t() if isinstance(t, torch.Tensor) and i not in (3, 4) else t
            for i, t in enumerate(arguments)
        ]
        again = _C.rnn_cell(*strided)
        assert torch.allclose(again[0] if mode == "lstm" else again, h_n[0], atol=2e-2)


def test_one_call_declines_what_does_not_fit():
    good = cell_arguments("lstm")
    assert _C.rnn_cell(*good) is not None
    bad = {0: ("elman", "gru", None, 3), 1: (0, -1, 12, 2**70, 1.0, None)}
    bad |= {
        i: (None, 5, torch.zeros(3), torch.zeros(()), torch.zeros(2, 9), good[i].double(), good[i][None])
        for i in (2, 3, 4, 5, 6)
    }
    bad |= {i: (5, torch.zeros(3), torch.zeros(44, 1), good[i].bfloat16()) for i in (7, 8)}
    bad[3] += (good[3].t().contiguous().t(), torch.zeros(4, 11))
    for place, values in bad.items():
        for value in values:
            assert _C.rnn_cell(*good[:place], value, *good[place + 1 :]) is None, (place, value)
    with pytest.raises(TypeError, match="expected 9 arguments"):
        _C.rnn_cell(*good[:8])
