"""Shapes and layouts of attention: what fits together, and the one form that the operation takes.

    query [B, H, Lq, D]  key [B, Hkv, Lk, D]  value [B, Hkv, Lk, Dv]  mask [B|1, H|1, Lq|1, Lk|1]  out [B, H, Lq, Dv]

H is a multiple of Hkv: query head h reads head h / (H / Hkv) of key and value. RuntimeError where arguments do not
fit. Sizes may be symbolic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdl.ops.shapes import refuse

SDPA, VARLEN = "scaled_dot_product_attention", "attention_varlen"


# --- the public functions' arguments ------------------------------------------------------------------------------
def _heads(x: Tensor) -> int:
    return x.shape[-3] if x.ndim > 2 else 1


def _broadcast(argument: str, batch: Sequence[int], x: Tensor, query: Tensor) -> tuple[int, ...]:
    """batch and the leading dimensions of x together."""
    try:
        return tuple(torch.broadcast_shapes(batch, x.shape[:-3]))
    except RuntimeError:
        refuse(SDPA, argument, f"leading dimensions that broadcast with query {list(query.shape)}", x)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gqa: bool) -> tuple[int, ...]:
    """query [..., H, Lq, D], key [..., Hk, Lk, D], value [..., Hv, Lk, Dv], 2-D upwards -> (*batch, H)."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            refuse(SDPA, name, "at least 2 dimensions, [..., L, E]", x)
    D, Lk = query.shape[-1], key.shape[-2]
    if key.shape[-1] != D:
        refuse(SDPA, "key", f"[..., {D}] to match query {list(query.shape)}", key)
    if value.shape[-2] != Lk:
        refuse(SDPA, "value", f"[..., {Lk}, Ev] to match key {list(key.shape)}", value)
    heads = _heads(query)
    for name, x in (("key", key), ("value", value)):
        own = _heads(x)
        if gqa:
            fits = own > 0 and heads % own == 0 if heads else own == heads
            if not fits:
                refuse(SDPA, name, f"a number of heads that divides query's {heads}", x)
        else:
            fits = own == heads or own == 1 or heads == 1
            if not fits:
                refuse(SDPA, name, f"{heads} heads as query (fewer with enable_gqa=True)", x)
            heads = own if heads == 1 else heads
    batch = _broadcast("key", query.shape[:-3], key, query)
    batch = _broadcast("value", batch, value, query)
    if mask is not None:
        plain = max(query.ndim, key.ndim, value.ndim) == 2
        scores = (*batch, *(() if plain else (heads,)), query.shape[-2], Lk)
        fits = mask.ndim <= len(scores) and all(
            x == 1 or x == y for x, y in zip(reversed(mask.shape), reversed(scores), strict=False)
        )
        if not fits:
            refuse(SDPA, "attn_mask", f"a shape that broadcasts to {list(scores)}", mask)
    return (*batch, heads)


def canonical(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The four in the operation's form, as views wherever strides can say it."""
    *batch, heads = attention(query, key, value, mask, gqa)
    shared = _heads(key) == _heads(value) and (gqa or _heads(key) == 1)
    kv_heads = _heads(key) if shared else heads
    return (
        _four(query, batch, heads),
        _four(key, batch, kv_heads),
        _four(value, batch, kv_heads),
        None if mask is None else _mask(mask, batch),
    )


def _four(x: Tensor, batch: list[int], heads: int) -> Tensor:
    x = x.unsqueeze(0) if x.ndim == 2 else x
    if x.shape[-3] != heads:
        x = x.expand(*x.shape[:-3], heads, *x.shape[-2:]) if x.shape[-3] == 1 else _repeat(x, heads)
    if len(batch) == 1 and x.ndim == 4 and x.shape[0] == batch[0]:
        return x
    x = x.expand(*batch, *x.shape[-3:])
    return x.reshape(math.prod(batch), *x.shape[-3:])


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[-3], -3)


def _mask(mask: Tensor, batch: list[int]) -> Tensor:
    while mask.ndim < len(batch) + 3:
        mask = mask.unsqueeze(0)
    lead = mask.shape[: len(batch)]
    if len(batch) == 1:
        return mask
    if any(n != 1 for n in lead):
        mask = mask.expand(*batch, *mask.shape[-3:])
    return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])


def varlen(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    """query [Tq, H, D], key [Tk, Hkv, D], value [Tk, Hkv, Dv], cu_q and cu_k [sequences + 1] of int32 or int64."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 3:
            refuse(VARLEN, name, "3 dimensions, [total length, heads, E]", x)
    H, D = query.shape[-2:]
    total, kv_heads = key.shape[:2]
    if key.shape[-1] != D:
        refuse(VARLEN, "key", f"[..., {D}] to match query {list(query.shape)}", key)
    fits = value.shape[0] == total and value.shape[1] == kv_heads
    if not fits:
        refuse(VARLEN, "value", f"[{total}, {kv_heads}, Ev] to match key {list(key.shape)}", value)
    fits = kv_heads > 0 and H % kv_heads == 0 if H else kv_heads == H
    if not fits:
        refuse(VARLEN, "key", f"a number of heads that divides query's {H}", key)
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(cu, Tensor):
            raise TypeError(f"fastdl.{VARLEN}: argument '{name}': expected a torch.Tensor, got {type(cu).__name__}")
        if cu.dtype not in (torch.int32, torch.int64):
            got = str(cu.dtype).removeprefix("torch.")
            raise RuntimeError(f"fastdl.{VARLEN}: argument '{name}': expected int32 or int64, got {got}")
        if cu.ndim != 1 or cu.shape[0] < 1:
            refuse(VARLEN, name, "1 dimension, [sequences + 1]", cu)
    if cu_k.shape[0] != cu_q.shape[0]:
        refuse(VARLEN, "cu_seqlens_k", f"{cu_q.shape[0]} entries as cu_seqlens_q", cu_k)


def offsets(cu: Tensor, total: int, argument: str) -> None:
    """RuntimeError unless cu starts at 0, never decreases and ends at total: what the kernels check themselves."""
    values = cu.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in itertools.pairwise(values)):
        raise RuntimeError(
            f"fastdl.{VARLEN}: argument '{argument}': expected offsets from 0 to {total} that never decrease, "
            f"got {values[:8]}{'...' if len(values) > 8 else ''}"
        )


# --- the operation's arguments ------------------------------------------------------------------------------------
def operation(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """RuntimeError unless the four are in the operation's form."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            refuse(SDPA, name, "4 dimensions, [B, H, L, E]", x)
    B, H, Lq, D = query.shape
    Hkv, Lk = key.shape[1:3]
    fits = key.shape[0] == B and key.shape[3] == D and (Hkv > 0 and H % Hkv == 0 if H else Hkv == 0)
    if not fits:
        refuse(SDPA, "key", f"[{B}, a divisor of {H}, Lk, {D}] to match query {list(query.shape)}", key)
    fits = value.shape[0] == B and value.shape[1] == Hkv and value.shape[2] == Lk
    if not fits:
        refuse(SDPA, "value", f"[{B}, {Hkv}, {Lk}, Ev] to match key {list(key.shape)}", value)
    if mask is not None:
        fits = mask.ndim == 4 and all(x == 1 or x == y for x, y in zip(mask.shape, (B, H, Lq, Lk), strict=True))
        if not fits:
            refuse(SDPA, "attn_mask", f"[{B} or 1, {H} or 1, {Lq} or 1, {Lk} or 1]", mask)


def layout_as(x: Tensor, last: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides) of x [B, H, L, .] with `last` columns: dense, its dimensions in memory in the order of x's.

    So [B, L, H, E] buffers seen as [B, H, L, E] give results that turn back without a copy, as in torch.
    """
    B, H, L, _ = x.shape
    order = [0, 1, 2]
    strides = x.stride()
    if not any(strides[i] == 0 and x.shape[i] > 1 for i in order):
        # By insertion: symbolic strides can be compared, yet Python's sort of them cannot be traced.
        for i in (1, 2):
            while i and _swapped(x.shape, strides, order[i - 1], order[i]):
                order[i - 1], order[i] = order[i], order[i - 1]
                i -= 1
    sizes = (B, H, L, last)
    dense = [0, 0, 0, 1]
    step = last if last > 1 else 1
    for i in reversed(order):
        dense[i] = step
        step = step * (sizes[i] if sizes[i] > 1 else 1)
    return sizes, tuple(dense)


def _swapped(shape: Sequence[int], strides: Sequence[int], outer: int, inner: int) -> bool:
    """Whether two dimensions lie in memory the other way round; one of size 1 lies anywhere."""
    return shape[outer] > 1 and shape[inner] > 1 and strides[outer] < strides[inner]
