"""The attention operations on CUDA tensors, and on CPU tensors under the host twin: outputs, workspace, the kernels.

The CUDA implementations of torch.ops.fastdl.attention*, with the signatures of `attention_native`. float64 runs the
reference. Offsets of packed sequences that lie on a GPU are not checked, for reading them would wait for it: wrong ones
give wrong rows, and touch nothing outside the tensors. float32 follows torch.backends.cuda.matmul.fp32_precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.ops import attention_native, calls, cuda
from fastdl.ops import attention_shapes as shapes
from fastdl.ops.attention_native import empty_like, expanded
from fastdl.ops.attention_reference import Options

_OP = shapes.SDPA


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """(O, lse [B, H, Lq, 2]); an empty tensor for lse unless the last argument asks for it."""
    if query.dtype is torch.float64:
        return attention_native.attention(query, key, value, mask, cu_q, cu_k, seed, *rest)
    *values, save_lse = rest
    if not query.ndim == key.ndim == value.ndim == 4:  # all else the native function checks
        shapes.operation(query, key, value, mask)
    native = cuda.require(_OP, query)
    out = empty_like(query, value.shape[3])
    lse = torch.empty((*query.shape[:3], 2) if save_lse else (0,), dtype=torch.float32, device=query.device)
    options = _options(query, key, cu_q, cu_k, seed, *values)
    tensors = (query, key, value, expanded(mask, query, key))
    scratch = cuda.workspace(query, native.attention_plan(*tensors, **options)["workspace_bytes"])
    native.attention(out, lse if save_lse else None, *tensors, workspace=scratch, **options)
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, dmask); an empty tensor for each that is not needed. dmask is of the mask's shape, float32."""
    if query.dtype is torch.float64:
        return attention_native.attention_backward(grad, query, key, value, mask, out, lse, cu_q, cu_k, seed, *rest)
    *values, needs = rest
    native = cuda.require(_OP, query)
    leaves = (query, key, value)
    grads = [empty_like(x, x.shape[3]) if need else None for x, need in zip(leaves, needs, strict=False)]
    dmask = torch.empty(mask.shape, dtype=torch.float32, device=query.device) if needs[3] and mask is not None else None
    if dmask is not None and query.numel() == 0:
        dmask.zero_()  # of no heads: the kernels have nothing to add up
    options = _options(query, key, cu_q, cu_k, seed, *values)
    full = expanded(mask, query, key)
    plan = native.attention_plan(query, key, value, full, backward=True, **options)
    scratch = cuda.workspace(query, plan["workspace_bytes"])
    native.attention_backward(*grads, dmask, grad, query, key, value, out, lse, full, workspace=scratch, **options)
    dq, dk, dv, dm = (query.new_empty(0) if x is None else x for x in (*grads, dmask))
    return dq, dk, dv, dm


def attention_keep(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """bool [B, H, Lq, Lk]: what dropout with this seed keeps, on the seed's device."""
    return attention_native.attention_keep(seed.cpu(), shape, dropout_p).to(seed.device)


def plan(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any) -> str:
    """The kernel that attention runs for these."""
    values = _options(query, key, *options)
    return cuda.require(_OP, query).attention_plan(query, key, value, mask, **values)["kernel"]


def unsupported(query: Tensor, value: Tensor) -> str | None:
    """Why this GPU's kernels do not take these head dimensions, or None."""
    if query.dtype is not torch.float32:
        return None
    return _refusal(int(query.shape[-1]), int(value.shape[-1]), query.device) or None


@calls.run_while_tracing
def _refusal(D: int, Dv: int, device: torch.device) -> str:
    module = cuda.load("_twin" if device.type == "cpu" else "_cuda")[0]
    return module.attention_refusal(D=D, Dv=Dv, device=device.index or 0)


def _options(
    query: Tensor,
    key: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lo: int,
    hi: int,
    softcap: float,
    dropout_p: float,
    align_end: bool,
) -> dict[str, Any]:
    """Keyword arguments of the native functions."""
    for cu, x, name in ((cu_q, query, "cu_seqlens_q"), (cu_k, key, "cu_seqlens_k")):
        if cu is not None and cu.device.type == "cpu":
            shapes.offsets(cu, x.shape[2], name)
    return {
        **Options(scale, lo, hi, softcap, dropout_p, align_end)._asdict(),
        "seed": 0 if seed is None else int(seed),
        "cu_seqlens_q": _on_device(cu_q, query),
        "cu_seqlens_k": _on_device(cu_k, query),
        "precision": cuda.precision("matmul"),
    }


def _on_device(cu: Tensor | None, query: Tensor) -> Tensor | None:
    return None if cu is None else cu.to(query.device, torch.int32).contiguous()
