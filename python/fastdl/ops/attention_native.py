"""The attention operations on plain CPU tensors: allocate the output, call the kernel. float64 runs the reference.

"Plain" is `plain.is_plain`. These are the CPU implementations of torch.ops.fastdl.*, and what eager code calls; the
native functions check their arguments and refuse every other dtype. Arguments as in `attention_shapes.operation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdl import _C
from fastdl.ops import attention_reference as reference
from fastdl.ops import attention_shapes as shapes
from fastdl.ops.attention_reference import Options


def empty_like(x: Tensor, last: int) -> Tensor:
    """Uninitialised, x's shape but for the last dimension, its dimensions in memory in the order of x's."""
    if x.is_contiguous():
        return x.new_empty(*x.shape[:3], last)
    return x.new_empty_strided(*shapes.layout_as(x, last))


def expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as the kernels take it: Lq x Lk by strides."""
    return mask if mask is None else mask.expand(-1, -1, query.shape[2], key.shape[2])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lo: int,
    hi: int,
    softcap: float,
    dropout_p: float,
    align_end: bool,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(O, lse [B, H, Lq, 2]); an empty tensor for lse unless `save_lse`."""
    if query.dtype is torch.float64:
        shapes.operation(query, key, value, mask)
        if cu_q is not None and cu_k is not None:
            shapes.offsets(cu_q, query.shape[2], "cu_seqlens_q")
            shapes.offsets(cu_k, key.shape[2], "cu_seqlens_k")
        options = Options(scale, lo, hi, softcap, dropout_p, align_end)
        drop = seeded_dropout(query, key, cu_q, cu_k, seed, dropout_p)
        out, lse = reference.attention(query, key, value, mask, cu_q, cu_k, drop, options)
        return empty_like(query, value.shape[3]).copy_(out), lse if save_lse else lse.new_empty(0)
    if not query.ndim == key.ndim == value.ndim == 4:  # all else the native function checks
        shapes.operation(query, key, value, mask)
    out = empty_like(query, value.shape[3])
    lse = torch.empty((*query.shape[:3], 2) if save_lse else (0,), dtype=torch.float32, device="cpu")
    _C.attention(
        out,
        lse if save_lse else None,
        query,
        key,
        value,
        expanded(mask, query, key),
        scale=scale,
        lo=lo,
        hi=hi,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=0 if seed is None else int(seed),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        align_end=align_end,
    )
    return out, lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lo: int,
    hi: int,
    softcap: float,
    dropout_p: float,
    align_end: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, dmask); an empty tensor for each that `needs` leaves out. dmask is of the mask's shape, float32."""
    leaves = (query, key, value)
    if query.dtype is torch.float64:
        options = Options(scale, lo, hi, softcap, dropout_p, align_end)
        drop = seeded_dropout(query, key, cu_q, cu_k, seed, dropout_p)
        *grads, dmask = reference.attention_backward(grad, query, key, value, mask, cu_q, cu_k, drop, options)
        grads = [
            empty_like(x, x.shape[3]).copy_(dx) if need else x.new_empty(0)
            for x, dx, need in zip(leaves, grads, needs, strict=False)
        ]
        return (*grads, dmask if needs[3] else query.new_empty(0))
    grads = [empty_like(x, x.shape[3]) if need else None for x, need in zip(leaves, needs, strict=False)]
    dmask = torch.empty(mask.shape, dtype=torch.float32, device="cpu") if needs[3] else None
    if dmask is not None and query.numel() == 0:
        dmask.zero_()  # of no heads: the kernels have nothing to add up
    _C.attention_backward(
        *grads,
        dmask,
        grad,
        query,
        key,
        value,
        out,
        lse,
        expanded(mask, query, key),
        scale=scale,
        lo=lo,
        hi=hi,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=0 if seed is None else int(seed),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        align_end=align_end,
    )
    return tuple(query.new_empty(0) if x is None else x for x in (*grads, dmask))


def attention_keep(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """bool [B, H, Lq, Lk]: what dropout with this seed keeps."""
    keep = torch.empty(tuple(shape), dtype=torch.bool, device="cpu")
    _C.attention_keep(keep, dropout_p=dropout_p, seed=int(seed))
    return keep


def seeded_dropout(
    query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, seed: Tensor | None, dropout_p: float
) -> reference.Drop | None:
    """The kernels' dropout, for the reference."""
    if seed is None:
        return None
    B, H, Lq, _ = query.shape
    Lk = key.shape[2]
    if cu_q is None or cu_k is None:
        keep = torch.ops.fastdl.attention_keep(seed, (B, H, Lq, Lk), dropout_p)
        return reference.dropout_by(keep.to(query.device), dropout_p)
    longest = [int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0 for cu in (cu_q, cu_k)]
    keep = torch.ops.fastdl.attention_keep(seed, (cu_q.shape[0] - 1, H, *longest), dropout_p).to(query.device)
    return reference.dropout_by(reference.packed_keep(keep, cu_q, cu_k, Lq, Lk), dropout_p)
