"""The recurrences as plain torch compositions: what float64 runs, and what is run where a gradient is differentiated.

    gates = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh
    lstm  i f g o    c = sigmoid(f) c + sigmoid(i) tanh(g)    h = sigmoid(o) tanh(c), with proj_size times W_hr^T
    gru   r z n      n = tanh(x W_in^T + b_in + r (h W_hn^T + b_hn))    h = (1 - z) n + z h
    rnn_tanh, rnn_relu    h = act(gates)

T steps, B sequences, I features, H hidden units, P features of h (H, or proj_size), D directions, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Weights(NamedTuple):
    """The parameters of one direction of one layer."""

    ih: Tensor  # [G*H, I]
    hh: Tensor  # [G*H, P]
    bias_ih: Tensor | None  # [G*H]
    bias_hh: Tensor | None  # [G*H]
    hr: Tensor | None  # [P, H]


def by_direction(weights: Sequence[Tensor], directions: int) -> list[Weights]:
    """A layer's parameters in torch's order: for each direction w_ih, w_hh, then biases, then w_hr, as there are."""
    count = len(weights) // directions
    parts = []
    for first in range(0, directions * count, count):
        ih, hh, *rest = weights[first : first + count]
        bias_ih, bias_hh = rest[:2] if count >= 4 else (None, None)
        parts.append(Weights(ih, hh, bias_ih, bias_hh, rest[-1] if count % 2 else None))
    return parts


def step(mode: str, x: Tensor, h: Tensor, c: Tensor | None, w: Weights) -> tuple[Tensor, Tensor | None]:
    """(h_t [B, P], c_t [B, H]) from x = x_t W_ih^T + b_ih [B, G*H], h_{t-1} and c_{t-1}."""
    gates = F.linear(h, w.hh, w.bias_hh)
    if mode == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), gates.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return (1 - z) * n + z * h, None
    gates = x + gates
    if mode == "lstm":
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w.hr is None else F.linear(h, w.hr)), c
    return (torch.tanh(gates) if mode == "rnn_tanh" else torch.relu(gates)), None


def direction(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w: Weights,
    mode: str,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y [rows, P], h_n [B, P], c_n [B, H]) over packed input [rows, I]; step t has the first batch_sizes[t] rows."""
    steps = F.linear(input, w.ih, w.bias_ih).split(list(batch_sizes))
    outputs = []
    for x in reversed(steps) if reverse else steps:
        active = x.shape[0]
        new_h, new_c = step(mode, x, h[:active], None if c is None else c[:active], w)
        outputs.append(new_h)
        # A row that has ended, or in reverse not begun, keeps its state.
        h = torch.cat([new_h, h[active:]]) if active < h.shape[0] else new_h
        if c is not None:
            c = torch.cat([new_c, c[active:]]) if active < c.shape[0] else new_c
    if not outputs:
        return F.linear(input, w.ih)[:, :0].expand(0, w.hh.shape[1]), h, c
    return torch.cat(outputs[::-1] if reverse else outputs), h, c


def layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_sizes: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y [T, B, D*P] or [rows, D*P], h_n [D, B, P], c_n [D, B, H] or None) of input [T, B, I], or packed [rows, I].

    h0 [D, B, P] and c0 [D, B, H] of None are zeros; packed input needs h0, since only its shape tells B.
    """
    batch = input.shape[1] if h0 is None else h0.shape[1]
    steps = [batch] * input.shape[0] if batch_sizes is None else batch_sizes
    rows = input.flatten(0, 1) if batch_sizes is None else input
    results = []
    for d, w in enumerate(by_direction(weights, directions)):
        hidden = w.hh.shape[0] // GATES[mode]
        h = input.new_zeros(batch, w.hh.shape[1]) if h0 is None else h0[d]
        c = None
        if mode == "lstm":
            c = input.new_zeros(batch, hidden) if c0 is None else c0[d]
        results.append(direction(rows, h, c, w, mode, steps, reverse=d == 1))
    ys, hs, cs = zip(*results, strict=True)
    y = ys[0] if directions == 1 else torch.cat(ys, -1)
    return y.reshape(*input.shape[:-1], y.shape[-1]), torch.stack(hs), torch.stack(cs) if mode == "lstm" else None


def layer_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_sizes: Sequence[int] | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of input, h0, c0 and weights where `needs` says, None elsewhere, from those of y, h_n and c_n.

    Can be differentiated again, and runs under every transform.
    """
    arguments = [input, h0, c0, *weights]
    wanted = [i for i, need in enumerate(needs) if need]
    given = [i for i, grad in enumerate(grads) if grad is not None]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        full = list(arguments)
        for i, leaf in zip(wanted, leaves, strict=True):
            full[i] = leaf
        results = layer(full[0], full[1], full[2], full[3:], mode, directions, batch_sizes)
        return tuple(results[i] for i in given)

    _, vjp = torch.func.vjp(outputs, *(arguments[i] for i in wanted))
    found = dict(zip(wanted, vjp(tuple(grads[i] for i in given)), strict=True))
    return [found.get(i) for i in range(len(arguments))]
