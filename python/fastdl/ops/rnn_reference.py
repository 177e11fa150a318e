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


class Step(NamedTuple):
    """One time step: the states it led to, and what its gradient is made of."""

    h: Tensor  # [B, P]
    c: Tensor | None  # [B, H]
    h_before: Tensor
    c_before: Tensor | None
    gates: tuple[Tensor, ...]  # after activation, each [B, H]
    inner: Tensor | None  # gru: h W_hn^T + b_hn; lstm: h before the projection


def step(mode: str, x: Tensor, h: Tensor, c: Tensor | None, w: Weights) -> Step:
    """From x = x_t W_ih^T + b_ih [B, G*H], h_{t-1} [B, P] and c_{t-1} [B, H]."""
    gates = F.linear(h, w.hh, w.bias_hh)
    if mode == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), gates.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return Step((1 - z) * n + z * h, None, h, None, (r, z, n), hn)
    gates = x + gates
    if mode == "lstm":
        i, f, g, o = gates.chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        new_c = f * c + i * g
        inner = o * torch.tanh(new_c)
        return Step(inner if w.hr is None else F.linear(inner, w.hr), new_c, h, c, (i, f, g, o), inner)
    new_h = torch.tanh(gates) if mode == "rnn_tanh" else torch.relu(gates)
    return Step(new_h, None, h, None, (new_h,), None)


def step_backward(
    mode: str, s: Step, dh: Tensor, dc: Tensor | None, w: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(gradients of x_t W_ih^T + b_ih, of h W_hh^T + b_hh, of h_{t-1}, of c_{t-1}) from those of h_t and c_t."""
    if mode == "gru":
        r, z, n = s.gates
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (s.h_before - n) * z * (1 - z)
        dr = dn * s.inner * r * (1 - r)
        recurrent = torch.cat([dr, dz, dn * r], -1)
        return torch.cat([dr, dz, dn], -1), recurrent, dh * z + recurrent @ w.hh, None
    before = None
    if mode == "lstm":
        i, f, g, o = s.gates
        inner = dh if w.hr is None else dh @ w.hr
        tanh_c = torch.tanh(s.c)
        dc = dc + inner * o * (1 - tanh_c * tanh_c)
        di, df = dc * g * i * (1 - i), dc * s.c_before * f * (1 - f)
        dg, do = dc * i * (1 - g * g), inner * tanh_c * o * (1 - o)
        gates, before = torch.cat([di, df, dg, do], -1), dc * f
    else:
        gates = dh * (1 - s.h * s.h) if mode == "rnn_tanh" else torch.where(s.h > 0, dh, 0)
    return gates, gates, gates @ w.hh, before


def _first(x: Tensor | None, rows: int) -> Tensor | None:
    """By narrow: where a slice is the whole, indexing makes an alias, which gradients in batches cannot map."""
    return x if x is None else x.narrow(0, 0, rows)


def _joined(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """A row that has ended, or in reverse not begun, keeps what it has."""
    return new if new is None or new.shape[0] == old.shape[0] else torch.cat([new, old[new.shape[0] :]])


def direction(
    input: Tensor, h: Tensor, c: Tensor | None, w: Weights, mode: str, batch_sizes: Sequence[int], reverse: bool
) -> list[Step]:
    """The steps over packed input [rows, I] in the order of time, t having the first batch_sizes[t] rows.

    The states after the loop are those of the step taken last, in its rows, and of earlier ones beyond.
    """
    steps = []
    parts = F.linear(input, w.ih, w.bias_ih).split(list(batch_sizes))
    for x in reversed(parts) if reverse else parts:
        active = x.shape[0]
        steps.append(step(mode, x, _first(h, active), _first(c, active), w))
        h, c = _joined(steps[-1].h, h), _joined(steps[-1].c, c)
    return steps[::-1] if reverse else steps


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
    sizes, rows, states = _unpacked(input, h0, c0, weights, mode, batch_sizes)
    results = []
    for d, w in enumerate(by_direction(weights, directions)):
        h, c = (None if x is None else x[d if len(x) > 1 else 0] for x in states)
        steps = direction(rows, h, c, w, mode, sizes, reverse=d == 1)
        y = torch.cat([s.h for s in steps]) if steps else h[:0]
        for s in reversed(steps) if d == 1 else steps:
            h, c = _joined(s.h, h), _joined(s.c, c)
        results.append((y, h, c))
    ys, hs, cs = zip(*results, strict=True)
    y = ys[0] if directions == 1 else torch.cat(ys, -1)
    return y.reshape(*input.shape[:-1], y.shape[-1]), torch.stack(hs), torch.stack(cs) if mode == "lstm" else None


def _unpacked(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    batch_sizes: Sequence[int] | None,
) -> tuple[Sequence[int], Tensor, tuple[Tensor, Tensor | None]]:
    """(batch_sizes, input as rows, (h0, c0)), missing states as zeros [1, B, ...] for every direction."""
    P, H = weights[1].shape[1], weights[1].shape[0] // GATES[mode]
    batch = input.shape[1] if batch_sizes is None else h0.shape[1]
    h0 = input.new_zeros(1, batch, P) if h0 is None else h0
    c0 = None if mode != "lstm" else input.new_zeros(1, batch, H) if c0 is None else c0
    if batch_sizes is not None:
        return batch_sizes, input, (h0, c0)
    return [batch] * input.shape[0], input.flatten(0, 1), (h0, c0)


def layer_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_sizes: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Gradients of input, h0, c0 and weights from those of y, h_n and c_n, None being zeros; all from the input anew.

    Can be differentiated again, and runs under every transform.
    """
    dy, dh_n, dc_n = grads
    sizes, rows, states = _unpacked(input, h0, c0, weights, mode, batch_sizes)
    P = weights[1].shape[1]
    dx, dhs, dcs, dweights = torch.zeros_like(rows), [], [], []
    for d, w in enumerate(by_direction(weights, directions)):
        h, c = (None if x is None else x[d if len(x) > 1 else 0] for x in states)
        steps = direction(rows, h, c, w, mode, sizes, reverse=d == 1)
        dh = torch.zeros_like(h) if dh_n is None else dh_n[d]
        dc = None if c is None else torch.zeros_like(c) if dc_n is None else dc_n[d]
        outer: Sequence[Tensor | None] = [None] * len(steps)
        if dy is not None:
            outer = dy.narrow(-1, d * P, P).reshape(-1, P).split(list(sizes))
        parts = []
        for s, grad in zip(steps, outer, strict=True) if d == 1 else zip(steps[::-1], outer[::-1], strict=True):
            active = s.h.shape[0]
            whole = _first(dh, active) if grad is None else _first(dh, active) + grad
            gates, recurrent, before, c_before = step_backward(mode, s, whole, _first(dc, active), w)
            parts.append((gates, recurrent, whole, s.h_before, s.inner))
            dh, dc = _joined(before, dh), _joined(c_before, dc)
        dhs.append(dh)
        dcs.append(dc)
        parts = parts if d == 1 else parts[::-1]  # in the order of time, as the rows are
        gates, recurrent, whole, before = (
            torch.cat([part[i] for part in parts]) if parts else rows.new_zeros(0, n)
            for i, n in enumerate((w.hh.shape[0], w.hh.shape[0], P, P))
        )
        dx = dx + gates @ w.ih
        dweights += [gates.mT @ rows, recurrent.mT @ before]
        dweights += [] if w.bias_ih is None else [gates.sum(0), recurrent.sum(0)]
        if w.hr is not None:
            inner = torch.cat([part[4] for part in parts]) if parts else rows.new_zeros(0, w.hr.shape[1])
            dweights.append(whole.mT @ inner)
    return dx.view(input.shape), torch.stack(dhs), torch.stack(dcs) if mode == "lstm" else None, dweights
