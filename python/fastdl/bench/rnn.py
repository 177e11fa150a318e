"""`fastdl bench rnn`: LSTM, GRU and RNN layers, inference and training, packed sequences, cells, streams.

A family is one function from a shape and the settings to a `Case`; `FAMILIES` names them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastdl
from fastdl.bench import place
from fastdl.bench.harness import Case, Check
from fastdl.bench.operands import normal
from fastdl.bench.settings import Settings
from fastdl.bench.shapes import Shape
from fastdl.ops.rnn_reference import GATES
from fastdl.testing import UNIT_ROUNDOFF

_CHECK_STEPS = 100  # time steps that a check compares with float64
_ERROR_FACTOR = 2.0  # rms error against torch's own
_CLASSES = {"lstm": (nn.LSTM, nn.LSTMCell), "gru": (nn.GRU, nn.GRUCell), "rnn": (nn.RNN, nn.RNNCell)}
FROZEN = ()  # recurrent weights are packed anew on every call
FORCED = ()

Input = Tensor | PackedSequence
Results = list[Tensor]


# --- operands ---------------------------------------------------------------------------------------------------
def _layers(cell: str, shape: Shape, settings: Settings) -> tuple[nn.Module, nn.Module]:
    """A fastdl layer and torch's, over the same parameters."""
    features, H, proj, count, directions = shape.sizes("I", "H", "proj", "layers", "directions")
    options: dict[str, Any] = {"num_layers": count, "bidirectional": directions == 2, "dtype": settings.torch_dtype}
    if cell == "lstm":
        options["proj_size"] = proj
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        theirs = _CLASSES[cell][0](features, H, **options).to(place.device())
    ours = copy.copy(theirs)
    return fastdl.optimize(ours), theirs


def _lengths(T: int, B: int) -> Tensor:
    """From T down to 1, evenly spread."""
    return torch.linspace(T, 1, B).round().long()


def padding(dims: dict[str, int]) -> float:
    """Time steps of a padded batch for each one of the packed batch."""
    T, B = dims["T"], dims["B"]
    return T * B / int(_lengths(T, B).sum())


def _input(shape: Shape, settings: Settings) -> Tensor:
    return normal(2, settings.torch_dtype, *shape.sizes("T", "B", "I"))


def _work(cell: str, shape: Shape, settings: Settings, rows: int, passes: int) -> dict[str, float]:
    """passes: 1 forward, 3 forward and backward."""
    features, H, proj, count, directions = shape.sizes("I", "H", "proj", "layers", "directions")
    P, G = proj or H, GATES["rnn_tanh" if cell == "rnn" else cell]
    weights = sum(
        directions * (G * H * ((features if layer == 0 else P * directions) + P) + proj * H) for layer in range(count)
    )
    values = weights + rows * (features + P * directions)
    return {"flops": 2.0 * passes * rows * weights, "bytes": float(passes * values * settings.torch_dtype.itemsize)}


# --- checks -----------------------------------------------------------------------------------------------------
def _tensors(out: Any) -> Results:
    """y, h_n and, for an LSTM, c_n."""
    y, states = out
    y = y.data if isinstance(y, PackedSequence) else y
    return [y, *(states if isinstance(states, tuple) else (states,))]


def _step(layer: nn.Module, x: Input, grad: Tensor | None) -> Results:
    """Results; with the gradient of y, those of the input and of all parameters instead."""
    if grad is None:
        return _tensors(layer(x))
    data = x.data if isinstance(x, PackedSequence) else x
    return list(torch.autograd.grad(_tensors(layer(x))[0], [data, *layer.parameters()], grad))


def _check(ours: nn.Module, theirs: nn.Module, x: Tensor, lengths: Tensor | None, training: bool) -> Check:
    """rms errors of every result against a float64 layer, over the first steps: at most twice torch's own."""
    x = x[:_CHECK_STEPS].detach()
    lengths = None if lengths is None else lengths.clamp(max=_CHECK_STEPS)
    exact = copy.deepcopy(theirs).double()
    results = []
    for layer in (exact, ours, theirs):
        leaf = x.to(next(layer.parameters()).dtype).requires_grad_(training)
        given = leaf if lengths is None else pack_padded_sequence(leaf, lengths)
        if training:
            y = _tensors(layer(given))[0]
            grad = normal(3, x.dtype, *y.shape).to(y.dtype)
            results.append(list(torch.autograd.grad(y, [leaf, *layer.parameters()], grad)))
        else:
            results.append(_tensors(layer(given)))
    error = torch_error = 0.0
    for number, (expected, actual, other) in enumerate(zip(*results, strict=True)):
        size = expected.square().mean().sqrt().item() or 1.0
        a, b = ((t.double() - expected).square().mean().sqrt().item() / size for t in (actual, other))
        error, torch_error = max(error, a), max(torch_error, b)
        if not a <= _ERROR_FACTOR * b + UNIT_ROUNDOFF[x.dtype]:
            return Check(error, torch_error, f"result {number}: relative rms error {a:.2e}, torch's own {b:.2e}")
    return Check(error, torch_error)


# --- families ---------------------------------------------------------------------------------------------------
def _passes(shape: Shape) -> int:
    """Native loops of one pass."""
    return shape.dims["layers"] * shape.dims["directions"]


def inference(cell: str, shape: Shape, settings: Settings) -> Case:
    """A layer without grad."""
    ours, theirs = _layers(cell, shape, settings)
    x = _input(shape, settings)
    return Case(
        partial(ours, x),
        partial(theirs, x),
        lambda: _check(ours, theirs, x, None, training=False),
        kernel_calls=2 * _passes(shape),  # the product of the input, and the loop
        **_work(cell, shape, settings, x.shape[0] * x.shape[1], 1),
    )


def train(cell: str, shape: Shape, settings: Settings) -> Case:
    """Forward, and backward to the input and all parameters."""
    ours, theirs = _layers(cell, shape, settings)
    x = _input(shape, settings).requires_grad_()
    P = shape.dims["proj"] or shape.dims["H"]
    grad = normal(3, x.dtype, *x.shape[:2], P * shape.dims["directions"])
    return Case(
        partial(_step, ours, x, grad),
        partial(_step, theirs, x, grad),
        lambda: _check(ours, theirs, x, None, training=True),
        kernel_calls=4 * _passes(shape),
        grad=True,
        **_work(cell, shape, settings, x.shape[0] * x.shape[1], 3),
    )


def packed(cell: str, shape: Shape, settings: Settings) -> Case:
    """Forward and backward of a PackedSequence with lengths T to 1; "padded" is the same layer on the padded input."""
    ours, theirs = _layers(cell, shape, settings)
    padded, lengths = _input(shape, settings), _lengths(*shape.sizes("T", "B"))
    rows = int(lengths.sum())
    sequence = pack_padded_sequence(padded, lengths)
    sequence.data.requires_grad_()
    grad = normal(3, padded.dtype, rows, (shape.dims["proj"] or shape.dims["H"]) * shape.dims["directions"])
    case = Case(
        partial(_step, ours, sequence, grad),
        partial(_step, theirs, sequence, grad),
        lambda: _check(ours, theirs, padded, lengths, training=True),
        kernel_calls=4 * _passes(shape),
        grad=True,
        **_work(cell, shape, settings, rows, 3),
    )
    whole = train(cell, shape, settings)
    case.parts["padded"] = (whole.candidate, whole.baseline)
    return case


def step(cell: str, shape: Shape, settings: Settings) -> Case:
    """One step of a cell without grad, states given."""
    features, H, B = shape.sizes("I", "H", "B")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        theirs = _CLASSES[cell][1](features, H, dtype=settings.torch_dtype).to(place.device())
    ours = fastdl.optimize(copy.copy(theirs))
    x, h, c = (normal(seed, settings.torch_dtype, B, n) for seed, n in ((2, features), (3, H), (4, H)))
    hx = (h, c) if cell == "lstm" else h

    def check() -> Check:
        doubles = (h.double(), c.double()) if cell == "lstm" else h.double()
        expected = copy.deepcopy(theirs).double()(x.double(), doubles)
        found, other = ours(x, hx), theirs(x, hx)
        first = [y[0] if cell == "lstm" else y for y in (expected, found, other)]
        error, torch_error = ((y.double() - first[0]).square().mean().sqrt().item() for y in first[1:])
        passed = error <= _ERROR_FACTOR * torch_error + UNIT_ROUNDOFF[x.dtype]
        return Check(error, torch_error, "" if passed else f"h: rms error {error:.2e}, torch's own {torch_error:.2e}")

    flat = Shape(shape.model, shape.layer, shape.families, shape.tags, shape.dims | {"layers": 1, "directions": 1})
    work = _work(cell, flat, settings, B, 1)
    return Case(partial(ours, x, hx), partial(theirs, x, hx), check, kernel_calls=2, **work)


FAMILIES: dict[str, Callable[[Shape, Settings], Case]] = {
    f"{cell}-{name}" if name != "inference" else cell: partial(function, cell)
    for cell in _CLASSES
    for name, function in (("inference", inference), ("train", train), ("packed", packed), ("cell", step))
} | {"stream": partial(inference, "lstm"), "lengths": partial(inference, "lstm")}
