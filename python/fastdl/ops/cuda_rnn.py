"""One recurrent layer on CUDA tensors, and on CPU tensors under the host twin, in one or both directions.

The CUDA implementations of torch.ops.fastdl.rnn_layer*, with the signatures of `rnn_native`: the input products of all
steps are one product, so is each gradient of a weight. float64 runs the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import cuda, rnn_native, rnn_shapes
from fastdl.ops.rnn_native import Gates, first_part, gates_like, require_states, unit
from fastdl.ops.rnn_reference import GATES, Weights, by_direction


def plan(like: Tensor, T: int, B: int, H: int, P: int, mode: str, backward: bool = False) -> dict[str, Any]:
    """What the native call would do on the device of `like`."""
    return cuda.require("rnn", like).rnn_plan(
        T,
        B,
        H,
        P,
        mode=mode,
        backward=backward,
        dtype=str(like.dtype).removeprefix("torch."),
        precision=_precision(like),
        device=like.device.index or 0,
    )


def _precision(x: Tensor) -> str:
    return cuda.precision("rnn") if x.dtype is torch.float32 else "ieee"


def _workspace(x: Tensor, batch_sizes: Tensor | None, w: Weights, mode: str, backward: bool) -> Tensor:
    """Scratch of one call on x [T, B, ...] or packed."""
    if batch_sizes is None:
        T, B = x.shape[:2]
    else:
        T = batch_sizes.shape[0]
        B = int(batch_sizes[0]) if T else 0
    P = 0 if w.hr is None else w.hr.shape[0]
    bytes = plan(x, T, B, w.hh.shape[0] // GATES[mode], P, mode, backward)["workspace_bytes"]
    return torch.empty(bytes, dtype=torch.uint8, device=x.device)


def _gemm(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, accumulate: bool = False) -> None:
    """out[M, N] = [out +] a[M, K] @ b[K, N] [+ bias[N]]"""
    if not out.numel():
        return
    if not a.shape[1]:
        if not accumulate:
            out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    native, precision = cuda.require("rnn", out), _precision(out)
    scratch = cuda.workspace(out, native.gemm_workspace(a, b, out, precision=precision))
    native.gemm(a, b, out, bias, accumulate=accumulate, precision=precision, workspace=scratch)


def _rows(x: Tensor) -> Tensor:
    """[..., N] -> [rows, N], a view where the leading dimensions have one stride."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _sum_rows(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[-1])
    if x.numel():
        cuda.require("rnn", x).sum_rows(_rows(x), out)
    return out


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
    """`rnn_native.rnn_layer` on a GPU."""
    if input.dtype is torch.float64:
        return rnn_native.rnn_layer(input, h0, c0, weights, batch_sizes, mode, directions, save)
    require_states(mode, h0, batch_sizes)
    shapes = rnn_shapes.layer(input, h0, weights, batch_sizes is not None, mode, directions)
    y, h_n, c_n = (input.new_empty(shape) for shape in shapes[:3])
    saved = input.new_empty(shapes[3] if save else (0,))
    lead, P = input.shape[:-1], h_n.shape[-1]
    rows = saved.view(directions, math.prod(lead), shapes[3][-1]) if save else None
    for d, w in enumerate(by_direction(weights, directions)):
        part, GH = None if rows is None else rows[d], w.ih.shape[0]
        in_place = part is not None and part.shape[-1] >= GH  # gates lie where they are saved
        gates = first_part(part, lead, GH) if in_place else input.new_empty(*lead, GH)
        _gemm(_rows(gates), _rows(input), w.ih.mT, w.bias_ih)
        cuda.require("rnn", input).rnn(
            y[..., d * P : (d + 1) * P],
            h_n[d],
            c_n[d] if mode == "lstm" else None,
            part,
            gates,
            None if h0 is None else unit(h0[d]),
            None if c0 is None else unit(c0[d]),
            w.hh,
            w.bias_hh,
            w.hr,
            _workspace(input, batch_sizes, w, mode, False),
            mode=mode,
            batch_sizes=batch_sizes,
            reverse=d == 1,
            precision=_precision(input),
        )
    return y, h_n, c_n, saved


# --- backward -----------------------------------------------------------------------------------------------------
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
    """`rnn_native.rnn_layer_backward` on a GPU."""
    if input.dtype is torch.float64:
        return rnn_native.rnn_layer_backward(
            dy, dh_n, dc_n, input, h0, c0, weights, batch_sizes, y, saved, mode, directions, needs
        )
    require_states(mode, h0, batch_sizes)
    none = input.new_empty(0)
    native, P, each = cuda.require("rnn", input), weights[1].shape[1], len(weights) // directions
    rows = saved.view(directions, math.prod(input.shape[:-1]), saved.shape[-1])
    dy = unit(dy)
    dx = torch.empty(input.shape, dtype=input.dtype, device=input.device) if needs[0] else None
    dh0 = h0.new_empty(h0.shape) if h0 is not None and needs[1] else None
    dc0 = c0.new_empty(c0.shape) if c0 is not None and needs[2] else None
    dweights: list[Tensor] = []
    for d, w in enumerate(by_direction(weights, directions)):
        own = y[..., d * P : (d + 1) * P]
        start = None if h0 is None else unit(h0[d])
        gates = gates_like(own, w, mode)
        native.rnn_backward(
            gates.input,
            None if dh0 is None else dh0[d],
            None if dc0 is None else dc0[d],
            None if dy is None else dy[..., d * P : (d + 1) * P],
            None if dh_n is None else unit(dh_n[d]),
            None if dc_n is None or mode != "lstm" else unit(dc_n[d]),
            rows[d],
            own,
            start,
            None if c0 is None else unit(c0[d]),
            w.hh,
            w.bias_hh,
            w.hr,
            _workspace(input, batch_sizes, w, mode, True),
            mode=mode,
            batch_sizes=batch_sizes,
            reverse=d == 1,
            d_recurrent=gates.recurrent,
            d_hidden=gates.hidden,
            hidden=gates.unprojected,
            precision=_precision(input),
        )
        if dx is not None:
            _gemm(_rows(dx), _rows(gates.input), w.ih, accumulate=d == 1)
        dweights += _weight_gradients(
            gates, input, own, start, w, batch_sizes, d == 1, needs[3 + d * each : 3 + (d + 1) * each]
        )
    return (none if dx is None else dx), (none if dh0 is None else dh0), (none if dc0 is None else dc0), dweights


def _wgrad(grad: Tensor, input: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """[out +] grad[..., N]^T input[..., K]"""
    out = grad.new_empty(grad.shape[-1], input.shape[-1]) if out is None else out
    _gemm(out, _rows(grad).mT, _rows(input), accumulate=accumulate)
    return out


def _weight_gradients(
    gates: Gates,
    input: Tensor,
    y: Tensor,
    h0: Tensor | None,
    w: Weights,
    batch_sizes: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The parameters' gradients in their order, each one product or sum over all steps; empty: not needed."""
    need_ih, need_hh, *rest = needs
    out = [y.new_empty(0) for _ in needs]
    if need_ih:
        out[0] = _wgrad(gates.input, input)
    if need_hh:
        out[1] = _recurrent_gradient(gates, y, h0, batch_sizes, reverse)
    if w.bias_ih is not None and any(rest[:2]):
        db = _sum_rows(gates.input)
        if rest[1]:
            out[3] = db.clone()
            if gates.recurrent is not None:
                H = gates.recurrent.shape[-1]
                out[3][-H:] = _sum_rows(gates.recurrent)
        if rest[0]:
            out[2] = db
    if w.hr is not None and rest[-1]:
        out[-1] = _wgrad(gates.hidden, gates.unprojected)
    return out


def _recurrent_gradient(
    gates: Gates, y: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, reverse: bool
) -> Tensor:
    """dW_hh: the gates' gradients times the h that each step started from."""
    GH = gates.input.shape[-1]
    sum = y.new_empty(GH, y.shape[-1])
    sides = [(sum, gates.input)]
    if gates.recurrent is not None:
        split = GH - gates.recurrent.shape[-1]
        sides = [(sum[:split], gates.input[..., :split]), (sum[split:], gates.recurrent)]
    if batch_sizes is not None:
        before = y.new_empty(y.shape)
        cuda.require("rnn", y).rnn_states_before(before, y, h0, batch_sizes, reverse)
        for part, g in sides:
            _wgrad(g, before, part)
        return sum
    before = y[1:] if reverse else y[:-1]  # y one step on; h0 apart, which is mostly absent
    for part, g in sides:
        later, first = (g[:-1], g[-1:]) if reverse else (g[1:], g[:1])
        _wgrad(later, before, part)
        if h0 is not None and first.shape[0]:
            _wgrad(first, h0[None], part, accumulate=True)
    return sum
