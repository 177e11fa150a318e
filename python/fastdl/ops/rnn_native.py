"""One recurrent layer on plain CPU tensors: the input product, then the recurrence, in one or both directions.

These are the CPU implementations of torch.ops.fastdl.rnn_layer*, and what eager code calls; the native functions check
their arguments. float64 runs the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdl import _C
from fastdl.ops import gemm_native, rnn_reference, rnn_shapes
from fastdl.ops.rnn_reference import GATES, Weights, by_direction

_NAMES = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}


def _require_states(mode: str, h0: Tensor | None, batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None and h0 is None:
        raise RuntimeError(f"fastdl.{_NAMES[mode]}: argument 'h0': expected a tensor with packed input, got None")


def _steps(mode: str, input: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> list[int] | None:
    if batch_sizes is None:
        return None
    return rnn_shapes.steps(_NAMES[mode], batch_sizes, input.shape[0], h0.shape[1])


def _unit(x: Tensor | None) -> Tensor | None:
    """x with elements of the last dimension side by side."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# --- forward ------------------------------------------------------------------------------------------------------
def rnn_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    mode: str,
    directions: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, saved): input [T, B, I] -> y [T, B, D*P], or packed [rows, I] -> [rows, D*P].

    h0, h_n [D, B, P]; c0, c_n [D, B, H], c_n empty but for lstm; saved [D, T, B, ...] or empty, for the backward pass.
    """
    _require_states(mode, h0, batch_sizes)
    y_shape, h_shape, c_shape, saved_shape = rnn_shapes.layer(
        input, h0, weights, batch_sizes is not None, mode, directions
    )
    if input.dtype is torch.float64:
        steps = _steps(mode, input, h0, batch_sizes)
        y, h_n, c_n = rnn_reference.layer(input, h0, c0, weights, mode, directions, steps)
        saved = input.new_zeros(saved_shape if save else (0,))  # of no use here: the gradient computes all anew
        return y, h_n, input.new_empty(0) if c_n is None else c_n, saved
    y, h_n, c_n = input.new_empty(y_shape), input.new_empty(h_shape), input.new_empty(c_shape)
    saved = input.new_empty(saved_shape if save else (0,))
    rows = saved.view(directions, input.shape[:-1].numel(), saved_shape[-1]) if save else None
    P = h_shape[-1]
    for d, w in enumerate(by_direction(weights, directions)):
        _C.rnn(
            y if directions == 1 else y[..., d * P : (d + 1) * P],
            h_n[d],
            c_n[d] if mode == "lstm" else None,
            None if rows is None else rows[d],
            _input_gates(input, w, None if rows is None else rows[d]),
            None if h0 is None else _unit(h0[d]),
            None if c0 is None else _unit(c0[d]),
            w.hh,
            w.bias_hh,
            w.hr,
            mode=mode,
            batch_sizes=batch_sizes,
            reverse=d == 1,
        )
    return y, h_n, c_n, saved


def _input_gates(input: Tensor, w: Weights, saved: Tensor | None) -> Tensor:
    """x_t W_ih^T + b_ih of all steps; where gates are to be saved, in their place, which they leave step by step."""
    GH = w.ih.shape[0]
    if saved is None or saved.shape[-1] < GH:
        return gemm_native.linear(input, w.ih, w.bias_ih)
    lead = input.shape[:-1]
    gates = saved.view(-1)[: lead.numel() * GH].view(*lead, GH)
    _C.linear(gates, input, w.ih, w.bias_ih)
    return gates


# --- backward -----------------------------------------------------------------------------------------------------
class _Gates(NamedTuple):
    """Gradients that the loop over time leaves; the last dimensions are those of the parameters' rows."""

    input: Tensor  # [T, B, G*H]: of x_t W_ih^T + b_ih
    recurrent: Tensor | None  # gru: [T, B, H], of the n gate's h W_hn^T + b_hn; else as `input`
    hidden: Tensor | None  # proj_size: [T, B, P], of h_t
    unprojected: Tensor | None  # proj_size: [T, B, H], sigmoid(o) tanh(c)


def rnn_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    mode: str,
    directions: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dx, dh0, dc0, dweights) for the gradients of y, h_n and c_n, None being zeros.

    needs: whether to compute dx, dh0, dc0, and each of dweights; what is not needed comes back empty. input to saved
    are what `rnn_layer` took and gave.
    """
    _require_states(mode, h0, batch_sizes)
    none = input.new_empty(0)
    if input.dtype is torch.float64:
        steps = _steps(mode, input, h0, batch_sizes)
        dx, dh0, dc0, dweights = rnn_reference.layer_backward(
            (dy, dh_n, dc_n), input, h0, c0, weights, mode, directions, steps
        )
        found = [x if need else input.new_empty(0) for x, need in zip((dx, dh0, dc0, *dweights), needs, strict=True)]
        return found[0], found[1], found[2], found[3:]
    P, each = weights[1].shape[1], len(weights) // directions
    rows = saved.view(directions, input.shape[:-1].numel(), saved.shape[-1])
    dy = _unit(dy)
    dx = None
    dh0 = input.new_empty(h0.shape) if needs[1] else None
    dc0 = input.new_empty(c0.shape) if needs[2] else None
    dweights: list[Tensor] = []
    for d, w in enumerate(by_direction(weights, directions)):
        part = slice(d * P, (d + 1) * P)
        y_part = y if directions == 1 else y[..., part]
        gates = _gate_gradients(
            dy if dy is None or directions == 1 else dy[..., part],
            None if dh_n is None else _unit(dh_n[d]),
            None if dc_n is None or mode != "lstm" else _unit(dc_n[d]),
            None if dh0 is None else dh0[d],
            None if dc0 is None else dc0[d],
            rows[d],
            y_part,
            None if h0 is None else _unit(h0[d]),
            None if c0 is None else _unit(c0[d]),
            w,
            mode,
            batch_sizes,
            d == 1,
        )
        if needs[0] and dx is None:
            dx = gemm_native.matmul(gates.input, w.ih)
        elif needs[0]:
            _C.gemm(dx, gates.input, w.ih, accumulate=True)
        dweights += _weight_gradients(
            gates,
            input,
            y_part,
            None if h0 is None else h0[d],
            w,
            batch_sizes,
            d == 1,
            needs[3 + d * each : 3 + (d + 1) * each],
        )
    return (none if dx is None else dx), (none if dh0 is None else dh0), (none if dc0 is None else dc0), dweights


def _gate_gradients(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    saved: Tensor,
    y: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w: Weights,
    mode: str,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> _Gates:
    """The loop over time, backwards; writes dh0 and dc0 where given."""
    lead, (GH, P) = y.shape[:-1], w.hh.shape
    H = GH // GATES[mode]
    d_gates = y.new_empty(*lead, GH)
    recurrent = y.new_empty(*lead, H) if mode == "gru" else None
    hidden = unprojected = None
    if w.hr is not None:
        hidden, unprojected = y.new_empty(*lead, P), y.new_empty(*lead, H)
    _C.rnn_backward(
        d_gates,
        dh0,
        dc0,
        dy,
        dh_n,
        dc_n,
        saved,
        y,
        h0,
        c0,
        w.hh,
        w.bias_hh,
        w.hr,
        mode=mode,
        batch_sizes=batch_sizes,
        reverse=reverse,
        d_recurrent=recurrent,
        d_hidden=hidden,
        hidden=unprojected,
    )
    return _Gates(d_gates, recurrent, hidden, unprojected)


def _weight_gradients(
    gates: _Gates,
    input: Tensor,
    y: Tensor,
    h0: Tensor | None,
    w: Weights,
    batch_sizes: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The parameters' gradients in their order, each a product or a sum over all steps; empty where not needed."""
    need_ih, need_hh, *rest = needs
    need_b_ih, need_b_hh = rest[:2] if w.bias_ih is not None else (False, False)
    none = y.new_empty(0)
    grads = [gemm_native.linear_wgrad(gates.input, input) if need_ih else none]
    grads.append(_recurrent_gradient(gates, y, h0, batch_sizes, reverse) if need_hh else none)
    if w.bias_ih is not None:
        db = gemm_native.sum_rows(gates.input) if need_b_ih or need_b_hh else none
        grads.append(db if need_b_ih else none)
        if need_b_hh and gates.recurrent is not None:
            H = gates.recurrent.shape[-1]
            grads.append(torch.cat([db[: 2 * H], gemm_native.sum_rows(gates.recurrent)]))
        else:  # a tensor of its own: whoever writes into one gradient must not change the other
            grads.append(db.clone() if need_b_hh else none)
    if w.hr is not None:
        grads.append(gemm_native.linear_wgrad(gates.hidden, gates.unprojected) if rest[-1] else none)
    return [x.new_empty(0) if x is none else x for x in grads]


def _recurrent_gradient(
    gates: _Gates, y: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, reverse: bool
) -> Tensor:
    """dW_hh: the gates' gradients times the h that each step started from."""
    sides = [gates.input]
    if gates.recurrent is not None:
        sides = [gates.input[..., : 2 * gates.recurrent.shape[-1]], gates.recurrent]
    if batch_sizes is not None:
        before = _states_before(y, h0, batch_sizes, reverse)
        parts = [gemm_native.linear_wgrad(g, before) for g in sides]
    else:  # y one step on; h0 apart, which is mostly absent
        later, first = (slice(None, -1), slice(-1, None)) if reverse else (slice(1, None), slice(None, 1))
        before = y[1:] if reverse else y[:-1]
        parts = [gemm_native.linear_wgrad(g[later], before) for g in sides]
        if h0 is not None:
            parts = [p.add_(gemm_native.linear_wgrad(g[first], h0[None])) for p, g in zip(parts, sides, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _states_before(y: Tensor, h0: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """[rows, P]: for each row of packed y, the h of that sequence one step earlier; in reverse, one step later."""
    rows = y.shape[0]
    if reverse:  # the rows of a step that go on are followed by as many in the next
        starts = batch_sizes.cumsum(0) - batch_sizes
        step = torch.repeat_interleave(batch_sizes)
        row = torch.arange(rows) - starts[step]
        following = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])
        goes_on = row < following[step]
        index = torch.where(goes_on, torch.arange(rows) + batch_sizes[step], 0)
        before = y.index_select(0, index)
        begins = (~goes_on).nonzero().flatten()
        return before.index_copy_(0, begins, h0.index_select(0, row[begins]))
    first = h0.shape[0]
    before = y.new_empty(y.shape)
    before[:first] = h0
    if rows > first:
        index = torch.arange(first, rows) - torch.repeat_interleave(batch_sizes[:-1], batch_sizes[1:])
        torch.index_select(y, 0, index, out=before[first:])
    return before
