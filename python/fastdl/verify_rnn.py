"""Checks of the recurrent layers for `fastdl verify`: every kernel of their table, and layers with their gradients.

Exact: where every gate is saturated, or every sum a small integer, the states are known bit for bit. Bound: relative
rms errors of results and gradients against the float64 reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastdl
from fastdl import _C
from fastdl.ops import rnn_reference, rnn_shapes
from fastdl.ops.rnn_reference import GATES, Weights
from fastdl.testing import UNIT_ROUNDOFF, GuardedOutput
from fastdl.verify_attention import Step

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = 32  # relative rms error, in units of roundoff
_ROUNDOFF = {"tf32": 2**-16, "bf16": 2**-8}  # of float32 in fewer parts, by the kernel's precision
_PRECISION = {row["name"]: row["precision"] for row in _C.kernels("rnn")}
_MODES = {"lstm": ("lstm",), "gru": ("gru",), "rnn": ("rnn_tanh", "rnn_relu")}


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _near(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, kernel: str = "") -> None:
    limit = _UNITS * _ROUNDOFF.get(_PRECISION.get(kernel, ""), UNIT_ROUNDOFF[dtype])
    size = expected.square().mean().sqrt().clamp(min=0.1)
    error = ((actual.double() - expected).square().mean().sqrt() / size).item() if expected.numel() else 0.0
    if not error <= limit:
        raise AssertionError(f"{name}: relative rms error {error:.2e} exceeds {limit:.2e}")


def _loop(
    kernel: str,
    mode: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    *,
    bias: Tensor | None = None,
    w_hr: Tensor | None = None,
    sizes: list[int] | None = None,
    reverse: bool = False,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h_n, c_n, saved) of _C.rnn, y in a guarded output."""
    rows, P, H = x.shape[:-1], w_hh.shape[1], w_hh.shape[0] // GATES[mode]
    y = GuardedOutput((*rows, P), dtype=x.dtype)
    h_n, c_n = torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)
    saved = x.new_empty(_C.rnn_saved_shape(mode, rows.numel(), h0.shape[0], H, P))
    packed = None if sizes is None else torch.tensor(sizes)
    options = {"mode": mode, "batch_sizes": packed, "reverse": reverse, "kernel": kernel, "threads": threads}
    _C.rnn(y.view, h_n, c_n, saved, x.clone(), h0, c0, w_hh, bias, w_hr, **options)
    y.assert_guards_intact()
    return y.view, h_n, c_n, saved


def _check_saturated(kernel: str, mode: str, dtype: torch.dtype, T: int, B: int, H: int) -> None:
    """Gates of 0 and 1 by inputs of +-100 count: c_t = f c + i g in integers, h = z h + (1 - z) n in signs."""
    generator = torch.Generator().manual_seed(T * 7919 + B * 31 + H)
    signs = torch.randint(0, 2, (T, B, GATES[mode], H), generator=generator).to(dtype) * 2 - 1
    x, zeros = (100 * signs).flatten(2), torch.zeros(B, H, dtype=dtype)
    w_hh = torch.zeros(GATES[mode] * H, H, dtype=dtype)
    y, _, c_n, _ = _loop(kernel, mode, x, zeros, zeros if mode == "lstm" else None, w_hh)
    on = (signs + 1) / 2
    state, expected = torch.zeros(B, H), []
    for t in range(T):
        if mode == "lstm":
            i, f, g, o = on[t, :, 0], on[t, :, 1], signs[t, :, 2], on[t, :, 3]
            state = f * state + i * g
            expected.append((o * torch.tanh(state.double()), o == 0))
        elif mode == "gru":
            z = on[t, :, 1]
            state = z * state + (1 - z) * signs[t, :, 2]
            expected.append((state.double(), torch.ones(B, H, dtype=torch.bool)))
        else:
            h = signs[t, :, 0] if mode == "rnn_tanh" else 100 * on[t, :, 0]
            expected.append((h.double(), torch.ones(B, H, dtype=torch.bool)))
    values, exact = (torch.stack(x) for x in zip(*expected, strict=True))
    if not torch.equal(y[exact], values.to(dtype)[exact]):
        raise AssertionError(
            f"{int((y[exact] != values.to(dtype)[exact]).sum())} of {y.numel()} saturated states wrong"
        )
    _near("y", y, values, dtype)
    if c_n is not None and not torch.equal(c_n, state.to(dtype)):
        raise AssertionError(f"c_n: {int((c_n != state.to(dtype)).sum())} of {c_n.numel()} counts wrong")


def _check_loop(
    kernel: str, mode: str, dtype: torch.dtype, sizes: list[int], H: int, proj: int, reverse: bool, packed: bool
) -> None:
    """Results of one direction against the float64 reference; the same bits on one thread and three."""
    generator = torch.Generator().manual_seed(sum(sizes) * 31 + H)
    B, P, rows = sizes[0], proj or H, sum(sizes)
    scale = H**-0.5
    x = _normal(generator, dtype, rows, GATES[mode] * H)
    h0, w_hh = _normal(generator, dtype, B, P), _normal(generator, dtype, GATES[mode] * H, P) * scale
    c0 = _normal(generator, dtype, B, H) if mode == "lstm" else None
    bias = _normal(generator, dtype, GATES[mode] * H)
    w_hr = _normal(generator, dtype, proj, H) * scale if proj else None
    form = x if packed else x.view(len(sizes), B, -1)
    given = {"bias": bias, "w_hr": w_hr, "sizes": sizes if packed else None, "reverse": reverse}
    results = [_loop(kernel, mode, form, h0, c0, w_hh, **given, threads=threads) for threads in (1, 3)]
    for a, b in zip(*results, strict=True):
        if a is not None and not torch.equal(a, b):
            raise AssertionError(f"{int((a != b).sum())} elements differ between 1 and 3 threads")
    y, h_n, c_n, _ = results[0]
    # The reference takes the input before W_ih: here that is the identity.
    doubles = [None if t is None else t.double() for t in (w_hh, bias, w_hr)]
    w = Weights(torch.eye(x.shape[1], dtype=torch.float64), doubles[0], None, doubles[1], doubles[2])
    start = h0.double(), None if c0 is None else c0.double()
    steps = rnn_reference.direction(x.double(), *start, w, mode, sizes, reverse)
    _near("y", y.flatten(0, -2), torch.cat([s.h for s in steps]), dtype, kernel)
    states = start
    for s in reversed(steps) if reverse else steps:
        states = tuple(
            None if new is None else torch.cat([new, old[len(new) :]])
            for new, old in zip((s.h, s.c), states, strict=True)
        )
    _near("h_n", h_n, states[0], dtype, kernel)
    if c_n is not None:
        _near("c_n", c_n, states[1], dtype, kernel)


def kernel_steps(row: dict[str, Any], quick: bool) -> Iterator[Step]:
    """Batches around the register tile, hidden sizes around the vector."""
    kernel, dtype, mr, units = row["name"], _DTYPES[row["dtype"]], row["mr"], row["units"]
    batches = (1, mr + 1) if quick else (1, 2, mr - 1, mr, mr + 1, 2 * mr + 1)
    hidden = (1, units + 1) if quick else (1, units - 1, units, units + 1, 3 * units + 2)
    for mode in _MODES[row["kind"]]:
        for B, H in itertools.product(sorted(set(batches)), sorted({n for n in hidden if n > 0})):
            what = f"{mode} {B}x{H}"
            yield kernel, f"exact saturated {what}", partial(_check_saturated, kernel, mode, dtype, 5, B, H)
            falling = sorted({B, (B + 1) // 2, 1}, reverse=True)
            for reverse, packed in itertools.product((False, True), (False, True)):
                if quick and reverse != packed:
                    continue
                sizes = falling if packed else [B] * 4
                for proj in (0, (H + 1) // 2) if mode == "lstm" and H > 1 else (0,):
                    name = f"bound {what}{' proj' * bool(proj)}{' reverse' * reverse}{' packed' * packed}"
                    yield kernel, name, partial(_check_loop, kernel, mode, dtype, sizes, H, proj, reverse, packed)


def _check_layer(dtype: torch.dtype, mode: str, packed: bool, proj: int) -> None:
    """A module with all its gradients, as a model calls it, against float64."""
    torch_class = {"lstm": nn.LSTM, "gru": nn.GRU}.get(mode, nn.RNN)
    options: dict[str, Any] = {"nonlinearity": mode[4:]} if mode.startswith("rnn") else {}
    options |= {"proj_size": proj} if proj else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(2)
        stock = torch_class(19, 23, num_layers=2, bidirectional=True, **options).to(dtype)
        x = torch.randn(7, 5, 19).to(dtype)
    results = []
    for target in (dtype, torch.float64):
        layer = fastdl.optimize(torch_class(19, 23, num_layers=2, bidirectional=True, **options))
        layer.load_state_dict(stock.state_dict())
        layer.to(target)
        leaf = x.to(target).requires_grad_()
        out = tree_leaves(layer(pack_padded_sequence(leaf, [7, 6, 6, 2, 1]) if packed else leaf))
        out = [y for y in out if isinstance(y, Tensor) and y.is_floating_point()]
        dy = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(target) for y in out]
        results.append(out + list(torch.autograd.grad(out, [leaf, *layer.parameters()], dy)))
    for number, (actual, expected) in enumerate(zip(*results, strict=True)):
        _near(f"result {number}", actual, expected, dtype)


def operation_steps(quick: bool) -> Iterator[Step]:
    """Two bidirectional layers with gradients, padded and packed."""
    for (name, dtype), mode, packed in itertools.product(_DTYPES.items(), rnn_shapes.SAVED, (False, True)):
        if not (quick and dtype == torch.float16):
            for proj in (0, 9) if mode == "lstm" else (0,):
                what = f"{name} {mode}{' proj' * bool(proj)}{' packed' * packed}"
                yield "nn.LSTM, GRU, RNN", what, partial(_check_layer, dtype, mode, packed, proj)
