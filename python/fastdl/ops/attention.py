"""scaled_dot_product_attention and attention_varlen, forward and backward.

    O = softmax(scale * Q K^T + mask) V        the whole of the math: `attention_reference`

The forward pass keeps O and the log-sum-exp of each row of scores; the backward pass computes the scores again, in
blocks, so that memory is O(L) throughout. A gradient that is differentiated again runs the reference, in O(Lq Lk).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.nn import functional as F

from fastdl import _C
from fastdl.ops import attention_library as _registered  # noqa: F401  (defines torch.ops.fastdl.attention)
from fastdl.ops import attention_native as native
from fastdl.ops import attention_reference as reference
from fastdl.ops import attention_shapes as shapes
from fastdl.ops import cuda, cuda_attention
from fastdl.ops.attention_reference import UNBOUNDED, Options
from fastdl.ops.plain import KERNEL_DTYPES, PLAIN_TYPES, eager_is_plain, is_plain
from fastdl.ops.route import Operation, call

MAX_HEAD_DIM = 256
Window = tuple[int | None, int | None]


# --- public ------------------------------------------------------------------------------------------------------
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, forward and backward, in memory linear in the lengths.

    query [..., H, Lq, E], key [..., H, Lk, E], value [..., H, Lk, Ev] -> [..., H, Lq, Ev]; 2-D upwards, leading
    dimensions broadcast, any strides, nothing is copied. The result lies in memory as query does, so that what was
    transposed to get here turns back without a copy. float32, bfloat16 and float16 on the CPU run fastdl's kernels,
    with head dimensions 1 to 256; float64 runs a reference; every other call is handed to torch and recorded with the
    reason. `torch.backends.mkldnn.matmul.fp32_precision` (CUDA: `torch.backends.cuda.matmul.fp32_precision`) says how
    exact products of float32 must be, forward and backward. torch.autocast casts as in torch.

    Args:
        attn_mask: broadcasts to [..., H, Lq, Lk] without being materialised. bool: True takes part; float32 or
            query's dtype: added to the scores, and differentiable.
        dropout_p: applied whenever it is above 0, as in torch. Drawn from torch's default CPU generator, so
            torch.manual_seed reproduces it; the backward pass drops the same elements. On CUDA too: the seed is drawn
            when the call is made, so a captured CUDA graph drops the same elements on every replay.
        is_causal: query i sees keys 0 to i, counted from the top left corner also where Lq != Lk.
        scale: of the scores; None: 1 / sqrt(E).
        enable_gqa: key and value may have fewer heads than query, a divisor of them each.
        window: (left, right): query i sees keys i - left to i + right; None or -1: no limit on that side.
        softcap: scores s become softcap * tanh(s / softcap), before masks; None or 0: none.

    A query that sees no key gives zeros and takes no part in gradients. NaN and Inf of a value may reach queries that
    do not see its key, as in torch. Raises TypeError for an argument that is not a tensor, RuntimeError for what does
    not fit together. Unlike torch, these are errors, too: key and value of different lengths (torch reads beyond key),
    attn_mask together with is_causal, a mix of meta and cpu tensors.
    """
    lo, hi = _band(shapes.SDPA, is_causal, window)
    cap = _softcap(shapes.SDPA, softcap)
    _require_probability(shapes.SDPA, dropout_p)
    if attn_mask is not None and is_causal:
        raise RuntimeError(f"fastdl.{shapes.SDPA}: argument 'attn_mask': expected None with is_causal=True, got a mask")
    if not is_compiling() and _is_plain_call(query, key, value, attn_mask, enable_gqa):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        options = Options(scale, lo, hi, cap, dropout_p)
        seed = draw_seed() if dropout_p > 0 else None
        if torch.is_grad_enabled() and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (attn_mask is not None and attn_mask.requires_grad)
        ):
            return _apply_plain(query, key, value, attn_mask, None, None, seed, *options)[0]
        return native.attention(query, key, value, attn_mask, None, None, seed, *options, False)[0]
    return call(
        _ATTENTION,
        query,
        key,
        value,
        attn_mask,
        constants=(dropout_p, bool(is_causal), scale, bool(enable_gqa), (lo, hi), cap),
    )


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of packed sequences of different lengths, each to itself, without padding.

    query [Tq, H, E], key [Tk, Hkv, E], value [Tk, Hkv, Ev] -> [Tq, H, Ev]; H a multiple of Hkv. Sequence s is rows
    cu_seqlens_q[s] to cu_seqlens_q[s + 1] of query, and of key and value likewise; both are int32 or int64, start at 0
    and end at Tq and Tk.

    is_causal and window count from the bottom right corner of each sequence: the last query sees all of its keys.
    Everything else as in `scaled_dot_product_attention`.
    """
    lo, hi = _band(shapes.VARLEN, is_causal, window)
    cap = _softcap(shapes.VARLEN, softcap)
    _require_probability(shapes.VARLEN, dropout_p)
    return call(_VARLEN, query, key, value, constants=(cu_seqlens_q, cu_seqlens_k, dropout_p, scale, (lo, hi), cap))


# --- arguments ----------------------------------------------------------------------------------------------------
def _band(op: str, is_causal: bool, window: Window | None) -> tuple[int, int]:
    """The range of j - i that is visible."""
    lo, hi = UNBOUNDED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"fastdl.{op}: argument 'window': expected None or (left, right), got {window!r}")
        for n in window:
            if n is not None and (not isinstance(n, int) or isinstance(n, bool)):
                raise TypeError(f"fastdl.{op}: argument 'window': expected two of int or None, got {window!r}")
            if n is not None and n < -1:
                raise RuntimeError(f"fastdl.{op}: argument 'window': expected sizes of at least 0, got {window!r}")
        left, right = window
        lo = lo if left is None or left == -1 else max(lo, -left)
        hi = hi if right is None or right == -1 else min(hi, right)
    return lo, min(hi, 0) if is_causal else hi


def _softcap(op: str, softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not 0 <= softcap < math.inf:
        raise RuntimeError(f"fastdl.{op}: argument 'softcap': expected None or a finite number >= 0, got {softcap}")
    return float(softcap)


def _require_probability(op: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise RuntimeError(f"fastdl.{op}: argument 'dropout_p': expected a probability from 0 to 1, got {p}")


def draw_seed() -> Tensor:
    """What a call's dropout is a function of, from torch's default generator: int64, no dimensions."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def _is_plain_call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gqa: bool) -> bool:
    """Whether the call and its tensors are plain and already of the operation's form."""
    if not (
        type(query) in PLAIN_TYPES
        and type(key) in PLAIN_TYPES
        and type(value) in PLAIN_TYPES
        and (mask is None or type(mask) in PLAIN_TYPES)
        and eager_is_plain()
        and is_plain(query)
        and is_plain(key)
        and is_plain(value)
    ):
        return False
    dtype = query.dtype
    if (
        dtype not in KERNEL_DTYPES
        or key.dtype is not dtype
        or value.dtype is not dtype
        or query.is_nested
        or key.is_nested
        or value.is_nested
        or not query.ndim == key.ndim == value.ndim == 4
    ):
        return False
    B, H, Lq, D = query.shape
    Bk, Hk, Lk, Dk = key.shape
    Bv, Hv, Lv, Dv = value.shape
    if not (
        B == Bk == Bv
        and Hk == Hv
        and (Hk == H or (gqa and Hk > 0 and H % Hk == 0))
        and Lk == Lv
        and Dk == D
        and 0 < D <= MAX_HEAD_DIM
        and 0 < Dv <= MAX_HEAD_DIM
    ):
        return False
    if mask is None:
        return True
    if not (_plain_mask(mask, dtype) and mask.ndim == 4):
        return False
    b, h, q, k = mask.shape
    return (b == B or b == 1) and (h == H or h == 1) and (q == Lq or q == 1) and (k == Lk or k == 1)


def _plain_mask(mask: Tensor, dtype: torch.dtype) -> bool:
    return (
        mask.dtype in (torch.bool, torch.float32, dtype)
        and mask.is_cpu
        and torch._C._has_storage(mask)
        and not mask.is_nested
        and not mask.is_neg()
        and not mask._is_zerotensor()
    )


# --- autograd ----------------------------------------------------------------------------------------------------
def _none(x: Tensor, needed: bool) -> Tensor | None:
    return x if needed else None


class AttentionFunction(Function):
    """The operation as a node of the graph, its forward through the dispatcher; its second result is lse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastdl.attention(query, key, value, mask, *options, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, mask, cu_q, cu_k, seed, *ctx.options = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, mask, out, lse, cu_q, cu_k, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, *ctx.saved_tensors)


def _gradients(ctx: Any, grad: Tensor | None, *saved: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * (3 + len(ctx.options))
    if grad is None:
        return (None, None, None, None, *rest)
    needs = list(ctx.needs_input_grad[:4])
    mask = saved[3]
    if is_compiling():
        grads = torch.ops.fastdl.attention_backward(grad, *saved, *ctx.options, needs)
    elif not torch.is_grad_enabled() and eager_is_plain() and is_plain(grad) and _all_plain(saved[:3]):
        grads = native.attention_backward(grad, *saved, *ctx.options, needs)
    else:  # create_graph=True, transforms, modes
        grads = AttentionBackwardFunction.apply(grad, *saved, *ctx.options, needs)
    dq, dk, dv, dmask = map(_none, grads, needs)
    return (dq, dk, dv, dmask if dmask is None else dmask.to(mask.dtype), *rest)


def _all_plain(tensors: tuple[Tensor, ...]) -> bool:
    return all(map(is_plain, tensors))


class AttentionBackwardFunction(Function):
    """The gradients as a node of the graph; their own come from the reference, differentiated by torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.fastdl.attention_backward(grad, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, query, key, value, mask, _out, _lse, cu_q, cu_k, seed, *options, needs = inputs
        ctx.options, ctx.needs = Options(*options), needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, query, key, value, mask, cu_q, cu_k, seed)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, query, key, value, mask, cu_q, cu_k, seed = ctx.saved_tensors
        leaves = [grad, query, key, value]
        if mask is not None and mask.dtype != torch.bool:
            leaves.append(mask)
        wanted = [i for i, (x, need) in enumerate(zip(outer, ctx.needs, strict=True)) if need and x is not None]
        drop = native.seeded_dropout(query, key, cu_q, cu_k, seed, ctx.options.dropout_p)

        def first(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, additive: Tensor | None = None) -> Any:
            m = mask if additive is None else additive
            grads = reference.attention_backward(grad, query, key, value, m, cu_q, cu_k, drop, ctx.options)
            return tuple(grads[i] for i in wanted)

        if not wanted:
            return (None,) * (len(ctx.options) + 11)
        values, vjp = torch.func.vjp(first, *leaves)
        cotangents = tuple(outer[i].to(x.dtype) for i, x in zip(wanted, values, strict=True))
        dgrad, dq, dk, dv, *dmask = vjp(cotangents)
        # grad, query, key, value, mask | out, lse, cu_q, cu_k, seed, options, needs
        return (dgrad, dq, dk, dv, dmask[0] if dmask else None, *(None,) * (6 + len(ctx.options)))


class _PlainAttention(AttentionFunction):
    """AttentionFunction for arguments known to be plain: its forward calls the kernel."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return native.attention(query, key, value, mask, *options, True)


_apply_plain = super(Function, _PlainAttention).apply  # see ops/gemm.py


# --- the table ---------------------------------------------------------------------------------------------------
Extras = tuple[float, bool, float | None, bool, tuple[int, int], float]
"""dropout_p, is_causal, scale, enable_gqa, (lo, hi), softcap."""


def _arguments(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *extras: Any) -> tuple[Any, ...]:
    """The operation's arguments for those of scaled_dot_product_attention, without save_lse."""
    dropout_p, _, scale, gqa, (lo, hi), softcap = extras
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seed = draw_seed() if dropout_p > 0 else None
    four = shapes.canonical(query, key, value, mask, gqa)
    return (*four, None, None, seed, *Options(scale, lo, hi, softcap, dropout_p))


def _shaped(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gqa: bool) -> Tensor:
    """The operation's result [B, H, Lq, Ev] in the shape of the call."""
    ndim = max(query.ndim, key.ndim, value.ndim)
    if ndim == 4:
        return out
    if ndim < 4:
        return out[0] if ndim == 3 else out[0, 0]
    return out.reshape(*shapes.attention(query, key, value, mask, gqa), *out.shape[2:])


def _run(run: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *extras: Any) -> Tensor:
    out = run(*_arguments(query, key, value, mask, *extras))[0]
    return _shaped(out, query, key, value, mask, extras[3])


def _operation(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.fastdl.attention(*args, False)


def _forward(*args: Any) -> Tensor:
    return _run(_operation, *args)


def _differentiable(*args: Any) -> Tensor:
    return _run(AttentionFunction.apply, *args)


def _torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *extras: Any) -> Tensor:
    """torch's own, or where it lacks an option, a composition of torch's operations."""
    dropout_p, is_causal, scale, gqa, (lo, hi), softcap = extras
    causal_only = (lo, hi) == (UNBOUNDED[0], 0 if is_causal else UNBOUNDED[1])
    if causal_only and not softcap:
        options = {"enable_gqa": True} if gqa else {}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale=scale, **options)
    four = shapes.canonical(query, key, value, mask, gqa)
    options = Options(query.shape[-1] ** -0.5 if scale is None else scale, lo, hi, softcap)
    out = reference.attention(*four, None, None, reference.dropout_by_torch(dropout_p), options)[0]
    return _shaped(out, query, key, value, mask, gqa)


def _head_dims(query: Tensor, value: Tensor) -> str | None:
    for n in (query.shape[-1], value.shape[-1]):
        if not 0 < n <= MAX_HEAD_DIM:
            return f"head dimension {n}: the kernels take 1 to {MAX_HEAD_DIM}"
    return None


def _unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *extras: Any) -> str | None:
    shapes.attention(query, key, value, mask, extras[3])
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        got = str(mask.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"fastdl.{shapes.SDPA}: argument 'attn_mask': expected bool, float32 or query's dtype, got {got}"
        )
    return _head_dims(query, value)


def _plan(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *extras: Any) -> str:
    if out.dtype is torch.float64:
        return "reference"
    dropout_p, _, scale, gqa, (lo, hi), softcap = extras
    q, k, v, m = shapes.canonical(query, key, value, mask, gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if cuda.runs(out):
        m = native.expanded(m, q, k)
        return cuda_attention.plan(q, k, v, m, None, None, None, *Options(scale, lo, hi, softcap, dropout_p))
    options = Options(scale, lo, hi, softcap, dropout_p)._asdict()
    return _C.attention_plan(q, k, v, native.expanded(m, q, k), **options)["kernel"]


def _varlen_arguments(query: Tensor, key: Tensor, value: Tensor, *extras: Any) -> tuple[Any, ...]:
    cu_q, cu_k, dropout_p, scale, (lo, hi), softcap = extras
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seed = draw_seed() if dropout_p > 0 else None
    three = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return (*three, None, cu_q, cu_k, seed, *Options(scale, lo, hi, softcap, dropout_p, True))


def _varlen_forward(*args: Any) -> Tensor:
    return _operation(*_varlen_arguments(*args))[0][0].transpose(0, 1)


def _varlen_differentiable(*args: Any) -> Tensor:
    return AttentionFunction.apply(*_varlen_arguments(*args))[0][0].transpose(0, 1)


def _varlen_torchs(query: Tensor, key: Tensor, value: Tensor, *extras: Any) -> Tensor:
    cu_q, cu_k, dropout_p, scale, (lo, hi), softcap = extras
    shapes.varlen(query, key, value, cu_q, cu_k)
    if query.device.type != "meta":
        shapes.offsets(cu_q, query.shape[0], "cu_seqlens_q")
        shapes.offsets(cu_k, key.shape[0], "cu_seqlens_k")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    options = Options(query.shape[-1] ** -0.5 if scale is None else scale, lo, hi, softcap, 0.0, True)
    drop = reference.dropout_by_torch(dropout_p)
    return reference.attention(q, k, v, None, cu_q, cu_k, drop, options)[0][0].transpose(0, 1)


def _varlen_unsupported(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any) -> str | None:
    shapes.varlen(query, key, value, cu_q, cu_k)
    return _head_dims(query, value)


def _varlen_plan(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *extras: Any) -> str:
    if out.dtype is torch.float64:
        return "reference"
    cu_q, cu_k, dropout_p, scale, (lo, hi), softcap = extras
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    three = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    if cuda.runs(out):
        values = Options(scale, lo, hi, softcap, dropout_p, True)
        return cuda_attention.plan(*three, None, cu_q, cu_k, None, *values)
    options = Options(scale, lo, hi, softcap, dropout_p, True)._asdict()
    return _C.attention_plan(*three, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)["kernel"]


_ATTENTION = Operation(
    name=shapes.SDPA,
    arguments=("query", "key", "value", "attn_mask"),
    optional=("attn_mask",),
    own_dtype=("attn_mask",),
    torch_function=_torchs,
    overload=_forward,
    function=SimpleNamespace(apply=_differentiable),
    unsupported=_unsupported,
    plan=_plan,
    autocast=True,
    unsupported_on_cuda=lambda query, key, value, *_: cuda_attention.unsupported(query, value),
)
_VARLEN = Operation(
    name=shapes.VARLEN,
    arguments=("query", "key", "value"),
    torch_function=_varlen_torchs,
    overload=_varlen_forward,
    function=SimpleNamespace(apply=_varlen_differentiable),
    unsupported=_varlen_unsupported,
    plan=_varlen_plan,
    autocast=True,
    unsupported_on_cuda=lambda query, key, value, *_: cuda_attention.unsupported(query, value),
)
