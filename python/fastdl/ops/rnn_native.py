"""One recurrent layer on plain CPU tensors: the input product, then the recurrence, in one or both directions.

These are the CPU implementations of torch.ops.fastdl.rnn_layer*, and what eager code calls; the native functions check
their arguments. float64 runs the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdl import _C
from fastdl.ops import gemm_native, rnn_reference, rnn_shapes
from fastdl.ops.rnn_reference import GATES, Weights, by_direction

_NAMES = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}


def require_states(mode: str, h0: Tensor | None, batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None and h0 is None:
        raise RuntimeError(f"fastdl.{_NAMES[mode]}: argument 'h0': expected a tensor with packed input, got None")


def _steps(mode: str, input: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> list[int] | None:
    if batch_sizes is None:
        return None
    return rnn_shapes.steps(_NAMES[mode], batch_sizes, input.shape[0], h0.shape[1])


def unit(x: Tensor | None) -> Tensor | None:
    """x with elements of the last dimension side by side."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _fresh(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An output that is written piece by piece, on huge pages where it is large."""
    out = x.new_empty(shape)
    _C.advise_huge_pages(out)
    return out


# --- pieces of time -----------------------------------------------------------------------------------------------
# Set by what they stand for; of other sizes no timings were kept. Results of 32 MB and more are mapped anew on every
# call, so that the product which makes the gates also touches their pages for the first time: uncut, T=2000 B=8 H=256,
# float32, the input product took 57 ms for 36 ms of arithmetic (Zen 4). A piece packs W_ih and W_hh once more, as much
# work as 8 rows each, below 2% of 512; and reads them anew, which is why layers of more weights than 2 MB are not cut.
_CUT_BYTES = 32 << 20  # gates from here on are mapped anew on every call, and no cache holds them
_PIECE_BYTES, _PIECE_ROWS = 4 << 20, 512  # gates that a cache holds, and rows that are worth packing the weights for
_MOST_WEIGHTS = 1 << 19  # elements of W_ih


def _pieces(lead: Sequence[int], w: Weights, dtype: torch.dtype, reverse: bool) -> list[slice]:
    """Steps of [T, B] that are worked on together, in the order of the forward pass.

    A gate leaves the cache neither between the product that makes it and the step that takes it, nor between the loop
    backwards and the three products of its gradients. In float32 alone: the state between pieces is a tensor, where the
    kernel itself keeps c in float32.
    """
    GH = w.ih.shape[0]
    whole = [slice(0, lead[0])]
    if len(lead) != 2 or dtype is not torch.float32 or w.ih.numel() > _MOST_WEIGHTS:
        return whole
    T, B = lead
    if T * B * GH * dtype.itemsize < _CUT_BYTES:
        return whole
    steps = max(1, max(_PIECE_ROWS, _PIECE_BYTES // (GH * dtype.itemsize)) // B)
    pieces = [slice(begin, min(T, begin + steps)) for begin in range(0, T, steps)]
    return pieces[::-1] if reverse else pieces


def _last_step(piece: slice, reverse: bool) -> int:
    """The step of a piece that the forward pass takes last."""
    return piece.start if reverse else piece.stop - 1


def _saved_of(saved: Tensor, piece: slice, lead: Sequence[int]) -> Tensor:
    """The rows of `saved` that belong to a piece."""
    if len(lead) != 2:
        return saved
    return saved[piece.start * lead[1] : piece.stop * lead[1]]


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
    require_states(mode, h0, batch_sizes)
    y_shape, h_shape, c_shape, saved_shape = rnn_shapes.layer(
        input, h0, weights, batch_sizes is not None, mode, directions
    )
    if input.dtype is torch.float64:
        steps = _steps(mode, input, h0, batch_sizes)
        y, h_n, c_n = rnn_reference.layer(input, h0, c0, weights, mode, directions, steps)
        saved = input.new_zeros(saved_shape if save else (0,))  # of no use here: the gradient computes all anew
        return y, h_n, input.new_empty(0) if c_n is None else c_n, saved
    y, h_n, c_n = _fresh(input, y_shape), input.new_empty(h_shape), input.new_empty(c_shape)
    saved = _fresh(input, saved_shape if save else (0,))
    rows = saved.view(directions, input.shape[:-1].numel(), saved_shape[-1]) if save else None
    P = h_shape[-1]
    for d, w in enumerate(by_direction(weights, directions)):
        _direction(
            y if directions == 1 else y[..., d * P : (d + 1) * P],
            h_n[d],
            c_n[d] if mode == "lstm" else None,
            None if rows is None else rows[d],
            input,
            None if h0 is None else unit(h0[d]),
            None if c0 is None else unit(c0[d]),
            w,
            mode,
            batch_sizes,
            d == 1,
        )
    return y, h_n, c_n, saved


def _direction(
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    saved: Tensor | None,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w: Weights,
    mode: str,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> None:
    """One direction of a layer; writes y, h_n, c_n and saved."""
    lead = input.shape[:-1]
    pieces = _pieces(lead, w, input.dtype, reverse)
    for piece in pieces[:-1]:
        part = None if saved is None else _saved_of(saved, piece, lead)
        gates = _input_gates(input[piece], w, part)
        c_next = None if c_n is None else c_n.new_empty(c_n.shape)
        _C.rnn(y[piece], None, c_next, part, gates, h, c, w.hh, w.bias_hh, w.hr, mode=mode, reverse=reverse)
        h, c = y[_last_step(piece, reverse)], c_next
    piece = pieces[-1]
    part = None if saved is None else _saved_of(saved, piece, lead)
    _C.rnn(
        y[piece],
        h_n,
        c_n,
        part,
        _input_gates(input[piece], w, part),
        h,
        c,
        w.hh,
        w.bias_hh,
        w.hr,
        mode=mode,
        batch_sizes=batch_sizes,
        reverse=reverse,
    )


def _input_gates(input: Tensor, w: Weights, saved: Tensor | None) -> Tensor:
    """x_t W_ih^T + b_ih of all steps; where gates are to be saved, in their place, which they leave step by step."""
    GH = w.ih.shape[0]
    if saved is None or saved.shape[-1] < GH:
        gates = input.new_empty(*input.shape[:-1], GH)
    else:
        gates = first_part(saved, input.shape[:-1], GH)
    _C.linear(gates, input, w.ih, w.bias_ih, switch="rnn")
    return gates


def first_part(saved: Tensor, lead: Sequence[int], GH: int) -> Tensor:
    """The gates [*lead, G*H] in what a native call saves; behind them lies [rows, H]."""
    rows = math.prod(lead)
    return saved.view(-1)[: rows * GH].view(*lead, GH)


# --- backward -----------------------------------------------------------------------------------------------------
class Gates(NamedTuple):
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
    require_states(mode, h0, batch_sizes)
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
    dy = unit(dy)
    dx = _fresh(input, input.shape) if needs[0] else None
    dh0 = input.new_empty(h0.shape) if needs[1] else None
    dc0 = input.new_empty(c0.shape) if needs[2] else None
    dweights: list[Tensor] = []
    for d, w in enumerate(by_direction(weights, directions)):
        part = slice(d * P, (d + 1) * P)
        dweights += _direction_backward(
            _Backward(
                input=input,
                y=y[..., part],
                saved=rows[d],
                h0=None if h0 is None else unit(h0[d]),
                c0=None if c0 is None else unit(c0[d]),
                w=w,
                mode=mode,
                batch_sizes=batch_sizes,
                reverse=d == 1,
                dy=None if dy is None else dy[..., part],
                dh_n=None if dh_n is None else unit(dh_n[d]),
                dc_n=None if dc_n is None or mode != "lstm" else unit(dc_n[d]),
                dx=dx,
                dh0=None if dh0 is None else dh0[d],
                dc0=None if dc0 is None else dc0[d],
                needs=needs[3 + d * each : 3 + (d + 1) * each],
            )
        )
    return (none if dx is None else dx), (none if dh0 is None else dh0), (none if dc0 is None else dc0), dweights


class _Backward(NamedTuple):
    """One direction of a layer on its way back: what it took and gave, gradients given, and gradients wanted."""

    input: Tensor
    y: Tensor
    saved: Tensor
    h0: Tensor | None
    c0: Tensor | None
    w: Weights
    mode: str
    batch_sizes: Tensor | None
    reverse: bool
    dy: Tensor | None
    dh_n: Tensor | None
    dc_n: Tensor | None
    dx: Tensor | None  # written, in reverse added to; None: not wanted, as below
    dh0: Tensor | None  # written
    dc0: Tensor | None
    needs: Sequence[bool]  # of the parameters


def _direction_backward(b: _Backward) -> list[Tensor]:
    """The parameters' gradients; writes dx, dh0 and dc0.

    Piece by piece the loop over time, then the products of its gradients, while a cache has them.
    """
    w, y, lead = b.w, b.y, b.input.shape[:-1]
    pieces = _pieces(lead, w, b.input.dtype, b.reverse)
    whole = gates_like(y[min(pieces, key=lambda x: x.start)], w, b.mode)  # the others are not longer
    sums: list[Tensor | None] = [None] * len(b.needs)
    dh, dc = b.dh_n, b.dc_n
    for index in reversed(range(len(pieces))):
        piece = pieces[index]
        part, gates = _saved_of(b.saved, piece, lead), whole
        h, c, dh_before, dc_before = b.h0, b.c0, b.dh0, b.dc0
        if index:
            earlier = pieces[index - 1]
            h = y[_last_step(earlier, b.reverse)]
            dh_before = y.new_empty(h.shape)
            if b.mode == "lstm":
                c = _last_state(_saved_of(b.saved, earlier, lead), lead[1], w.hh.shape[0], b.reverse)
                dc_before = y.new_empty(c.shape)
        if len(pieces) > 1:
            gates = Gates(*(None if x is None else x[: piece.stop - piece.start] for x in whole))
        _C.rnn_backward(
            gates.input,
            dh_before,
            dc_before,
            None if b.dy is None else b.dy[piece],
            dh,
            dc,
            part,
            y[piece],
            h,
            c,
            w.hh,
            w.bias_hh,
            w.hr,
            mode=b.mode,
            batch_sizes=b.batch_sizes,
            reverse=b.reverse,
            d_recurrent=gates.recurrent,
            d_hidden=gates.hidden,
            hidden=gates.unprojected,
        )
        dh, dc = dh_before, dc_before
        if b.dx is not None:
            _C.gemm(b.dx[piece], gates.input, w.ih, accumulate=b.reverse, switch="rnn")
        _add_weight_gradients(sums, gates, piece, b)
    none = y.new_empty(0)
    return [none.new_empty(0) if x is None else x for x in sums]


def gates_like(y: Tensor, w: Weights, mode: str) -> Gates:
    """Room for the gradients of the steps of y."""
    lead, (GH, P) = y.shape[:-1], w.hh.shape
    H = GH // GATES[mode]
    return Gates(
        y.new_empty(*lead, GH),
        y.new_empty(*lead, H) if mode == "gru" else None,
        None if w.hr is None else y.new_empty(*lead, P),
        None if w.hr is None else y.new_empty(*lead, H),
    )


def _last_state(saved: Tensor, B: int, GH: int, reverse: bool) -> Tensor:
    """What a piece of an lstm saved as the c of its last step [B, H]."""
    rows, H = saved.shape[0], saved.shape[1] - GH
    states = saved.view(-1)[rows * GH :].view(rows, H)
    return states[:B] if reverse else states[-B:]


def _add_weight_gradients(sums: list[Tensor | None], gates: Gates, piece: slice, b: _Backward) -> None:
    """The parameters' gradients in their order, each a product or a sum over the steps of a piece; None: not needed."""
    need_ih, need_hh, *rest = b.needs
    need_b_ih, need_b_hh = rest[:2] if b.w.bias_ih is not None else (False, False)
    if need_ih:
        sums[0] = _wgrad(sums[0], gates.input, b.input[piece])
    if need_hh:
        sums[1] = _recurrent_gradient(sums[1], gates, piece, b)
    if need_b_ih or need_b_hh:
        db = gemm_native.sum_rows(gates.input)
        if need_b_hh:  # a tensor of its own: whoever writes into one gradient must not change the other
            other = db.clone()
            if gates.recurrent is not None:
                gemm_native.sum_rows(gates.recurrent, other[-gates.recurrent.shape[-1] :])
            sums[3] = other if sums[3] is None else sums[3].add_(other)
        if need_b_ih:
            sums[2] = db if sums[2] is None else sums[2].add_(db)
    if b.w.hr is not None and rest[-1]:
        sums[-1] = _wgrad(sums[-1], gates.hidden, gates.unprojected)


def _wgrad(sum: Tensor | None, grad: Tensor, input: Tensor) -> Tensor:
    """sum + grad[..., N]^T input[..., K], in place; None: 0."""
    first = sum is None
    if first:
        sum = grad.new_empty(grad.shape[-1], input.shape[-1])
    _C.linear_wgrad(sum, grad, input, accumulate=not first, switch="rnn")
    return sum


def _recurrent_gradient(sum: Tensor | None, gates: Gates, piece: slice, b: _Backward) -> Tensor:
    """dW_hh: the gates' gradients times the h that each step started from; added to `sum` where given."""
    y, h0, reverse = b.y, b.h0, b.reverse
    GH = gates.input.shape[-1]
    accumulate = sum is not None
    if sum is None:
        sum = y.new_empty(GH, y.shape[-1])
    sides = [(sum, gates.input)]
    if gates.recurrent is not None:
        split = GH - gates.recurrent.shape[-1]
        sides = [(sum[:split], gates.input[..., :split]), (sum[split:], gates.recurrent)]
    if b.batch_sizes is not None:
        before = _states_before(y, h0, b.batch_sizes, reverse)
        for part, g in sides:
            _C.linear_wgrad(part, g, before, switch="rnn")
        return sum
    # y one step on; h0 apart, which is mostly absent
    before = y[piece.start + 1 : piece.stop + 1] if reverse else y[max(0, piece.start - 1) : piece.stop - 1]
    count = before.shape[0]
    for part, g in sides:
        later, first = (g[:count], g[count:]) if reverse else (g[g.shape[0] - count :], g[: g.shape[0] - count])
        _C.linear_wgrad(part, later, before, accumulate=accumulate, switch="rnn")
        if h0 is not None and first.shape[0]:
            _C.linear_wgrad(part, first, h0[None], accumulate=True, switch="rnn")
    return sum


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
