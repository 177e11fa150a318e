"""torch.ops.fastdl.attention*: schemas, CPU implementations, fakes, vmap rules and FLOP counts.

No autograd here: the autograd.Function stands outside the operation (`ops/attention.py`), at about half the cost of a
call. Dropout's seed is a tensor, drawn by torch.randint outside: compiled code draws it anew on every call,
checkpointing restores the generator it comes from, and the operation itself has no hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import attention_native as native
from fastdl.ops import attention_shapes as shapes
from fastdl.ops import cuda_attention
from fastdl.ops.library import register
from fastdl.ops.plain import KERNEL_DTYPES

_ops = torch.ops.fastdl
_OPTIONS = "float scale, int lo, int hi, float softcap, float dropout_p, bool align_end"
_CU = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed"


# --- fakes: shapes without arithmetic -----------------------------------------------------------------------------
def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float32 if query.dtype in KERNEL_DTYPES else query.dtype


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    shapes.operation(query, key, value, mask)
    lse = query.new_empty((*query.shape[:3], 2) if options[-1] else (0,), dtype=_lse_dtype(query))
    return native.empty_like(query, value.shape[3]), lse


def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    shapes.operation(query, key, value, mask)
    needs = options[-1]
    grads = [
        native.empty_like(x, x.shape[3]) if need else x.new_empty(0)
        for x, need in zip((query, key, value), needs, strict=False)
    ]
    dmask = mask.new_empty(mask.shape, dtype=_lse_dtype(query)) if needs[3] else query.new_empty(0)
    return (*grads, dmask)


def _fake_attention_keep(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    return seed.new_empty(shape, dtype=torch.bool)


# --- vmap: the mapped dimension V is folded into the batch, [V, B, ...] -> [V*B, ...] ------------------------------
def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """[B, ...], mapped or not -> [V*B, ...]; one that is not mapped is repeated, by strides where B is 1."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int, per_sample: bool) -> Tensor | None:
    if mask is None or (dim is None and mask.shape[0] == 1 and not per_sample):
        return mask
    mask = mask.expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
    return mask.expand(-1, batch, -1, -1, -1).flatten(0, 1)


def _batch(query: Tensor, dim: int | None) -> int:
    return query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]


def _loop(op: Callable[..., Any], info: Any, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """One call for each index of the mapped dimension: where folding would change what dropout draws, or sequences."""
    results = []
    for i in range(info.batch_size):
        results.append(
            op(
                *(
                    x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                    for x, dim in zip(args, dims, strict=True)
                )
            )
        )
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _must_loop(cu: Tensor | None, seed: Tensor | None, seed_dim: int | None) -> bool:
    """Packed sequences; and vmap's randomness="same", which asks for one dropout mask for all."""
    return cu is not None or (seed is not None and seed_dim is None)


def _one_seed(seed: Tensor | None, dim: int | None) -> Tensor | None:
    """Of the mapped seeds the first: the folded batch makes its dropout differ by itself."""
    return seed if seed is None or dim is None else seed.select(dim, 0)


def _vmap_attention(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    query, key, value, mask, cu_q, _, seed, *options, save_lse = args
    if _must_loop(cu_q, seed, dims[6]):
        return _loop(_ops.attention, info, dims, args)
    size, batch = info.batch_size, _batch(query, dims[0])
    q, k, v = (_fold(x, dim, size) for x, dim in zip((query, key, value), dims, strict=False))
    m = _fold_mask(mask, dims[3], size, batch, per_sample=False)
    out, lse = _ops.attention(q, k, v, m, None, None, _one_seed(seed, dims[6]), *options, save_lse)
    out = out.unflatten(0, (size, batch))
    return (out, lse.unflatten(0, (size, batch)) if save_lse else lse), (0, 0 if save_lse else None)


def _vmap_attention_backward(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    grad, query, key, value, mask, out, lse, cu_q, _, seed, *options, needs = args
    if _must_loop(cu_q, seed, dims[9]):
        return _loop(_ops.attention_backward, info, dims, args)
    size, batch = info.batch_size, _batch(query, dims[1])
    folded = [
        _fold(x, dim, size) for x, dim in zip((grad, query, key, value, out, lse), (*dims[:4], *dims[5:7]), strict=True)
    ]
    m = _fold_mask(mask, dims[4], size, batch, per_sample=needs[3])
    seed = _one_seed(seed, dims[9])
    grads = _ops.attention_backward(*folded[:4], m, *folded[4:], None, None, seed, *options, needs)
    grads = [g.unflatten(0, (size, batch)) if need else g for g, need in zip(grads, needs, strict=True)]
    if needs[3]:
        own = _batch(mask, dims[4])  # 1 where the mask is broadcast along the batch
        grads[3] = grads[3].sum(1, keepdim=True) if own != batch else grads[3]
    return tuple(grads), tuple(0 if need else None for need in needs)


def _vmap_attention_keep(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
    seed, shape, dropout_p = args
    if dims[0] is None:
        return _loop(_ops.attention_keep, info, dims, args)
    B, *rest = shape  # as the folded batch draws it
    keep = _ops.attention_keep(_one_seed(seed, dims[0]), (info.batch_size * B, *rest), dropout_p)
    return keep.unflatten(0, (info.batch_size, B)), 0


# --- FLOPs, for torch.utils.flop_counter: all pairs, as torch counts its own attention -----------------------------
def _pairs(query: Any, key: Any, cu_q: Any, cu_k: Any) -> int:
    """Scores: B * H * Lq * Lk, or those within the packed sequences where their lengths can be read."""
    B, H, Lq, _ = query.shape
    if cu_q is not None and type(cu_q) is Tensor:
        return H * int(((cu_q[1:] - cu_q[:-1]).long() * (cu_k[1:] - cu_k[:-1]).long()).sum())
    return B * H * Lq * key.shape[2]


def _flops_attention(
    query: Any, key: Any, value: Any, mask: Any, cu_q: Any, cu_k: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _pairs(query, key, cu_q, cu_k) * (query.shape[3] + value.shape[3])


def _flops_attention_backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    out: Any,
    lse: Any,
    cu_q: Any,
    cu_k: Any,
    *args: Any,
    **_: Any,
) -> int:
    """The scores again, then the gradients of P, Q, K and V."""
    return 2 * _pairs(query, key, cu_q, cu_k) * (3 * query.shape[3] + 2 * value.shape[3])


# --- the table ----------------------------------------------------------------------------------------------------
register(
    f"attention(Tensor query, Tensor key, Tensor value, Tensor? mask, {_CU}, {_OPTIONS}, bool save_lse)"
    " -> (Tensor, Tensor)",
    native.attention,
    _fake_attention,
    _vmap_attention,
    _flops_attention,
    raw_flops=True,
    cuda=cuda_attention.attention,
)
register(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out, Tensor lse,"
    f" {_CU}, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    native.attention_backward,
    _fake_attention_backward,
    _vmap_attention_backward,
    _flops_attention_backward,
    raw_flops=True,
    cuda=cuda_attention.attention_backward,
)
register(
    "attention_keep(Tensor seed, SymInt[] shape, float dropout_p) -> Tensor",
    native.attention_keep,
    _fake_attention_keep,
    _vmap_attention_keep,
    None,
    cuda=cuda_attention.attention_keep,
)
