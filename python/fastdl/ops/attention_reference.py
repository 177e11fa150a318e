"""attention as plain torch math that writes all scores out: what float64 runs, what a second derivative runs.

    S(i,j) = scale * sum_d Q(i,d) K(j,d)      softcap > 0: S = softcap * tanh(S / softcap)
    S += mask(i,j), -Inf where a bool mask is False, and where j - i lies outside [lo, hi]
    P = softmax_j(S)    P' = P * keep / (1 - p)    O = P' V    lse(i) = log sum_j exp(S(i,j))

A row without a visible key gives O = 0, lse = -Inf and zero gradients. Any floating-point dtype; float16 and bfloat16
are computed in float32. Differentiable. Arguments as in `attention_shapes.operation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

UNBOUNDED = -(2**63), 2**63 - 1  # lo, hi


class Options(NamedTuple):
    """The scalar arguments of the operation, in the order of its schema."""

    scale: float
    lo: int = UNBOUNDED[0]  # visible: lo <= j - i <= hi
    hi: int = UNBOUNDED[1]
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    align_end: bool = False  # measure j - i from the bottom right corner (of each sequence)


Drop = Callable[[Tensor], Tensor]
"""Applies dropout to P [B, H, Lq, Lk]; linear, so that it also takes the gradient of P' to that of P."""


class _Parts(NamedTuple):
    """What the forward and backward formulas share; all in the dtype they compute in, heads repeated."""

    query: Tensor
    key: Tensor
    value: Tensor
    tanh: Tensor | None  # of S / softcap
    scores: Tensor
    probabilities: Tensor


def _segments(cu: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """(sequence, position in it, length of it) of each of `total` tokens."""
    cu = cu.to(torch.int64)
    token = torch.arange(total, device=cu.device)
    sequence = torch.searchsorted(cu[1:].contiguous(), token, right=True)
    return sequence, token - cu[sequence], (cu[1:] - cu[:-1])[sequence]


def visible(
    Lq: int, Lk: int, options: Options, cu_q: Tensor | None, cu_k: Tensor | None, device: torch.device
) -> Tensor | None:
    """bool [Lq, Lk]: the pairs within the band and, of packed sequences, within one; None for all."""
    band = (options.lo, options.hi) != UNBOUNDED
    if cu_q is None or cu_k is None:
        if not band:
            return None
        offset = Lk - Lq if options.align_end else 0
        distance = torch.arange(Lk, device=device) - torch.arange(Lq, device=device)[:, None] - offset
        return (distance >= options.lo) & (distance <= options.hi)
    sequence_q, i, length_q = (x[:, None] for x in _segments(cu_q, Lq))
    sequence_k, j, length_k = _segments(cu_k, Lk)
    distance = j - i - ((length_k - length_q) if options.align_end else 0)
    return (sequence_q == sequence_k) & (distance >= options.lo) & (distance <= options.hi)


def _parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    options: Options,
) -> _Parts:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // max(key.shape[1], 1)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if group != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * options.scale
    tanh = None
    if options.softcap > 0:
        tanh = torch.tanh(scores / options.softcap)
        scores = options.softcap * tanh
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    seen = visible(query.shape[2], key.shape[2], options, cu_q, cu_k, query.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return _Parts(q, k, v, tanh, scores, probabilities)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    drop: Drop | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(O, lse): the log-sum-exp of each row of scores, and what rounding took from it (0 where it is not finite)."""
    p = _parts(query, key, value, mask, cu_q, cu_k, options)
    probabilities = p.probabilities if drop is None else drop(p.probabilities)
    out = (probabilities @ p.value).to(query.dtype)
    if not key.shape[2]:
        return out, p.scores.new_tensor((-math.inf, 0.0)).expand(*query.shape[:3], 2)
    highest = p.scores.amax(-1)
    lse = torch.logsumexp(p.scores, -1)
    rest = (highest - lse) + torch.log(torch.exp(p.scores - highest[..., None]).sum(-1))
    return out, torch.stack((lse, torch.where(rest.isfinite(), rest, 0.0)), -1)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    drop: Drop | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dQ, dK, dV, dmask): the first derivative written out, so that torch can differentiate it again.

    dV = P'^T dO    dP = drop(dO V^T)    dS = P * (dP - sum_j P dP)    dQ = scale dS K    dK = scale dS^T Q
    """
    p = _parts(query, key, value, mask, cu_q, cu_k, options)
    grad = grad.to(p.query.dtype)
    dv = (p.probabilities if drop is None else drop(p.probabilities)).mT @ grad
    dp = grad @ p.value.mT
    dp = dp if drop is None else drop(dp)
    ds = p.probabilities * (dp - (p.probabilities * dp).sum(-1, keepdim=True))
    dmask = ds.sum_to_size(mask.shape) if mask is not None and mask.dtype != torch.bool else None
    if p.tanh is not None:
        ds = ds * (1 - p.tanh.square())
    dq, dk = (ds @ p.key) * options.scale, (ds.mT @ p.query) * options.scale
    return dq.to(query.dtype), _group_sum(dk, key), _group_sum(dv, value), dmask


def _group_sum(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the query heads that share one of key and value."""
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], x.shape[1] // like.shape[1])).sum(2)
    return x.to(like.dtype)


def dropout_by(keep: Tensor, p: float) -> Drop:
    """Dropout by a mask of what to keep."""
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return lambda x: x * (keep * scale).to(x.dtype)


def dropout_by_torch(p: float) -> Drop | None:
    """Dropout drawn by torch: for calls that no kernel runs, on any device."""
    return (lambda x: F.dropout(x, p)) if p > 0 else None


def packed_keep(keep: Tensor, cu_q: Tensor, cu_k: Tensor, Lq: int, Lk: int) -> Tensor:
    """keep [sequences, H, longest q, longest k] as [1, H, Lq, Lk] of packed sequences."""
    sequence, i, _ = _segments(cu_q, Lq)
    _, j, _ = _segments(cu_k, Lk)
    return keep[sequence[:, None], :, i[:, None], j.clamp(max=keep.shape[3] - 1)].permute(2, 0, 1).unsqueeze(0)
