"""torch.ops.fastdl.rnn_layer, rnn_layer_backward: schemas, CPU implementations, fakes, vmap rules and FLOP counts.

No autograd here: the autograd.Function stands outside the operation (`ops/rnn.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import cuda_rnn, rnn_native, rnn_shapes
from fastdl.ops.library import register

_ops = torch.ops.fastdl


# --- fakes: shapes without arithmetic -----------------------------------------------------------------------------
def _fake_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    mode: str,
    directions: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *shapes, saved = rnn_shapes.layer(input, h0, weights, batch_sizes is not None, mode, directions)
    y, h_n, c_n = (input.new_empty(shape) for shape in shapes)
    return y, h_n, c_n, input.new_empty(saved if save else (0,))


def _fake_layer_backward(
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
    grads = [
        input.new_empty(x.shape if need and x is not None else (0,))
        for x, need in zip((input, h0, c0, *weights), needs, strict=True)
    ]
    return grads[0], grads[1], grads[2], grads[3:]


# --- vmap ---------------------------------------------------------------------------------------------------------
def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _pick(x: Any, dim: Any, index: int) -> Any:
    """The index-th of the mapped tensors in x."""
    if isinstance(x, (list, tuple)) and not isinstance(x, str):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
        return [_pick(y, d, index) for y, d in zip(x, dims, strict=True)]
    return x.select(dim, index) if isinstance(x, Tensor) and dim is not None else x


def _loop(op: Any, info: Any, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """One call for each mapped element."""
    results = [op(*_pick(list(args), list(dims), i)) for i in range(info.batch_size)]
    stacked = [
        [torch.stack(x) for x in zip(*each, strict=True)] if isinstance(each[0], list) else torch.stack(each)
        for each in zip(*results, strict=True)
    ]
    return tuple(stacked), tuple([0] * len(x) if isinstance(x, list) else 0 for x in stacked)


def _mapped(dim: Any) -> bool:
    return any(map(_mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _vmap_layer(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    input, h0, c0, weights, batch_sizes, mode, directions, _ = args
    if batch_sizes is not None or _mapped(dims[3]):
        return _loop(_ops.rnn_layer, info, dims, args)
    # The mapped dimension V joins the batch: [T, V*B, ...]. What is saved stays empty: the backward pass of a mapped
    # call is the reference, which needs none of it.
    V = info.batch_size
    fronts = [None if x is None else _front(x, dim, V) for x, dim in zip((input, h0, c0), dims[:3], strict=True)]
    folded = [None if x is None else x.transpose(0, 1).flatten(1, 2) for x in fronts]
    y, h_n, c_n, saved = _ops.rnn_layer(*folded, weights, None, mode, directions, False)
    batch = fronts[0].shape[2]
    y, h_n = (x.unflatten(1, (V, batch)) for x in (y, h_n))
    c_n = c_n.unflatten(1, (V, batch)) if mode == "lstm" else c_n.new_empty(0, V)
    return (y, h_n, c_n, saved.new_empty(V, 0)), (1, 1, 1, 0)


def _vmap_layer_backward(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    return _loop(_ops.rnn_layer_backward, info, dims, args)


# --- FLOPs, for torch.utils.flop_counter: a multiply and an add for each product -----------------------------------
def _products(input: Tensor, weights: Sequence[Tensor]) -> list[int]:
    """Multiplies of all steps with each matrix, in the parameters' order; 0 for biases."""
    rows = math.prod(input.shape[:-1])
    return [rows * w.numel() if w.ndim == 2 else 0 for w in weights]


def _flops_layer(
    input: Tensor,
    h0: Any,
    c0: Any,
    weights: Sequence[Tensor],
    batch_sizes: Any,
    mode: str,
    directions: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * sum(_products(input, weights))


def _flops_layer_backward(
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    input: Tensor,
    h0: Any,
    c0: Any,
    weights: Sequence[Tensor],
    batch_sizes: Any,
    y: Any,
    saved: Any,
    mode: str,
    directions: int,
    needs: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    products = _products(input, weights)
    each = len(weights) // directions
    data = [n if i % each or needs[0] else 0 for i, n in enumerate(products)]  # w_ih: only where dx is needed
    gradients = [n if need else 0 for n, need in zip(products, needs[3:], strict=True)]
    return 2 * (sum(data) + sum(gradients))


# --- the table ----------------------------------------------------------------------------------------------------
register(
    "rnn_layer(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, str mode, int directions, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    rnn_native.rnn_layer,
    _fake_layer,
    _vmap_layer,
    _flops_layer,
    raw_flops=True,
    cuda=cuda_rnn.rnn_layer,
)
register(
    "rnn_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor input, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor? batch_sizes, Tensor y, Tensor saved, str mode, int directions, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    rnn_native.rnn_layer_backward,
    _fake_layer_backward,
    _vmap_layer_backward,
    _flops_layer_backward,
    raw_flops=True,
    cuda=cuda_rnn.rnn_layer_backward,
)
