"""Attention in float64, and bounds of what float32 sums, 16-bit P and one rounding of the result may lose."""

import math

import torch

from fastdl import _C
from fastdl.testing import UNIT_ROUNDOFF

MIN, MAX = -(2**63), 2**63 - 1
U = UNIT_ROUNDOFF[torch.float32]


def keep_of(shape, p, seed):
    """What the CPU's dropout keeps."""
    keep = torch.empty(shape, dtype=torch.bool)
    _C.attention_keep(keep, dropout_p=p, seed=seed)
    return keep


def forward_reference(
    q, k, v, mask=None, *, scale=None, lo=MIN, hi=MAX, softcap=0.0, align_end=False, keep=None, p=0.0
):
    """out, lse, sum_j P|V|, and the error of the scores of each row."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // max(1, x.shape[1]), 1) for x in (k, v))
    s = q @ k.mT * scale
    error = (q.shape[-1] + 8) * U * (q.abs() @ k.abs().mT * abs(scale))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        error = error + 8 * U * softcap
    offset = k.shape[2] - q.shape[2] if align_end else 0
    distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None] - offset
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.double()
        if mask.dtype != torch.bool:
            error = error + 2 * U * mask.double().abs().nan_to_num(0, 0, 0)
    s = s.masked_fill((distance < lo) | (distance > hi), -math.inf)
    lse = torch.logsumexp(s, -1)
    P = torch.exp(s - lse[..., None]).nan_to_num(0.0)
    # Rounding what exp is taken of, and exp itself: at most |s - max| <= 104 where P is not 0.
    error = torch.where(P > 0, error + U * (s.abs() + 120), 0).amax(-1) if k.shape[2] else torch.zeros_like(lse)
    P = P if keep is None else P * keep / (1 - p) if p < 1 else P * 0
    return P @ v, lse, P @ v.abs(), error


def assert_forward_close(actual, lse, q, k, v, mask=None, **options):
    """out and both floats of lse within the bound that follows from the roundings, NaN nowhere."""
    expected, lse64, S, error = forward_reference(q, k, v, mask, **options)
    u_out, depth = UNIT_ROUNDOFF[q.dtype], 2 * k.shape[2] + 16
    low = u_out if q.dtype != torch.float32 else 0.0  # P is rounded to the operands' dtype
    g = 2 * error[..., None] + depth * U + low
    bound = g * S + u_out * (expected.abs() + g * S) + torch.finfo(q.dtype).smallest_normal
    bad = ~((actual.double() - expected).abs() <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()}, first at {tuple(bad.nonzero()[0].tolist())}: "
        f"{actual[bad][0].item()} instead of {expected[bad][0].item()}, bound {bound[bad][0].item():.2e}"
    )
    assert torch.equal(lse[..., 0].isinf(), lse64.isinf())
    assert (lse[..., 1][lse64.isinf()] == 0).all()
    seen = ~lse64.isinf()
    limit = error + U * (2 * k.shape[2] + 8)
    assert ((lse.double().sum(-1) - lse64).abs()[seen] <= limit[seen]).all()
