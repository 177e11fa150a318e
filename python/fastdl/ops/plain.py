"""What "plain" means: calls and tensors that may go straight to a kernel, past torch.library and autograd.

These run on every eager call, so they are spelled out with the cheapest reads torch has (0.03 to 0.1 us each).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from fastdl import _C
from fastdl.ops import calls

MAX_BATCH_DIMS = 8  # what the native loops hold, besides rows and columns

# Without a vector level (aarch64, macOS) the scalar kernels would lose every race: all calls go to torch.
HAS_VECTOR_LEVEL = any(level != "scalar" for level in _C.build_info()["isa_compiled"])
# Exactly these types: a subclass may redefine any operation. Empty without a vector level, so that nothing is plain.
PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter} if HAS_VECTOR_LEVEL else ())

_float32, _float64, _strided = torch.float32, torch.float64, torch.strided
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_any_autocast = torch._C._is_any_autocast_enabled
_jit_tracing = torch._C._is_tracing


def eager_is_plain() -> bool:
    """Whether nothing watches or rewrites calls: no mode, transform, autocast, trace, profiler or `explain`."""
    return not (
        _function_modes()
        or _dispatch_modes()
        or _transforms_active()
        or _any_autocast()
        or _jit_tracing()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or calls.observer is not None
    )


def is_plain(x: Tensor | None) -> bool:
    """Whether x is a dense CPU tensor, float32 or float64, whose values are what lies in memory; or absent (None)."""
    return x is None or (
        type(x) in PLAIN_TYPES
        and (x.dtype is _float32 or x.dtype is _float64)
        and x.is_cpu
        and x.layout is _strided
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...] | None:
    """The output shape of linear where all its arguments are plain float32 and fit together, else None."""
    if not (
        type(input) in PLAIN_TYPES
        and type(weight) in PLAIN_TYPES
        and input.dtype is _float32
        and weight.dtype is _float32
        and input.is_cpu
        and weight.is_cpu
        and input.layout is _strided
        and weight.layout is _strided
        and weight.ndim == 2
        and not (input.is_neg() or weight.is_neg() or input._is_zerotensor() or weight._is_zerotensor())
    ):
        return None
    N, K = weight.shape
    shape = input.shape
    if not (shape and shape[-1] == K and len(shape) <= MAX_BATCH_DIMS + 2):
        return None
    if bias is not None and not (
        type(bias) in PLAIN_TYPES
        and bias.dtype is _float32
        and bias.is_cpu
        and bias.layout is _strided
        and bias.shape == (N,)
        and not (bias.is_neg() or bias._is_zerotensor())
    ):
        return None
    return (*shape[:-1], N)


def matmul_shape(input: Tensor, other: Tensor) -> tuple[int, ...] | None:
    """The output shape of matmul where both arguments are plain float32, at least 2-D, and fit, else None."""
    if not (
        type(input) in PLAIN_TYPES
        and type(other) in PLAIN_TYPES
        and input.dtype is _float32
        and other.dtype is _float32
        and input.is_cpu
        and other.is_cpu
        and input.layout is _strided
        and other.layout is _strided
        and not (input.is_neg() or other.is_neg() or input._is_zerotensor() or other._is_zerotensor())
    ):
        return None
    a, b = input.shape, other.shape
    if not (2 <= len(a) <= MAX_BATCH_DIMS + 2 and 2 <= len(b) <= MAX_BATCH_DIMS + 2 and a[-1] == b[-2]):
        return None
    batch = a[:-2]
    if batch != b[:-2]:
        if batch and len(b) > 2:
            return None  # broadcast on both sides: the general rules apply
        batch = batch or b[:-2]
    return (*batch, a[-2], b[-1])
