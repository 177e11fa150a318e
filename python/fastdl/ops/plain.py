"""What "plain" means: calls and tensors that may go straight to a kernel, past torch.library and autograd.

The rules are asked on every eager call: `_C` holds them and asks in 0.3 us what Python takes 1 us to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from fastdl import _C
from fastdl.ops import calls, cuda

MAX_BATCH_DIMS = 8  # what the native loops hold, besides rows and columns

# Without a vector level (aarch64, macOS) the scalar kernels would lose every race: all calls go to torch.
HAS_VECTOR_LEVEL = any(level != "scalar" for level in _C.build_info()["isa_compiled"])
# Exactly these types: a subclass may redefine any operation. Empty without a vector level, so that nothing is plain.
PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter} if HAS_VECTOR_LEVEL else ())

# What the kernels take, and what the reference takes as well.
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
DTYPES = KERNEL_DTYPES | {torch.float64}

_has_storage = torch._C._has_storage
# Whether nothing watches or rewrites calls: no mode, transform, autocast, trace, compiler, profiler, `explain` or twin.
RULES = {
    "probes": (
        torch._C._len_torch_function_stack,
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._is_any_autocast_enabled,
        torch._C._is_tracing,
    ),
    "settings": (
        (vars(forward_ad), "_current_level", -1),
        (vars(profiler), "_is_profiler_enabled", False),
        (vars(torch.compiler), "_is_compiling_flag", False),
        (vars(calls), "observer", None),
        (vars(cuda), "twin_active", False),
    ),
    "grad_enabled": torch.is_grad_enabled,
}
_C.plain_rules(types=tuple(PLAIN_TYPES), **RULES)
eager_is_plain = _C.eager_is_plain


def is_plain(x: Tensor | None) -> bool:
    """Whether x is a dense CPU tensor of one of DTYPES whose values are what lies in memory; or absent (None)."""
    return x is None or (
        type(x) in PLAIN_TYPES
        and x.dtype in DTYPES
        and x.is_cpu
        and _has_storage(x)  # else sparse, or mapped by a vmap that is_grads_batched=True sets up
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def plain_linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...] | None:
    """The output shape of linear if the call and its tensors are plain, of one of KERNEL_DTYPES, and fit."""
    if (
        type(input) in PLAIN_TYPES
        and type(weight) in PLAIN_TYPES
        and (bias is None or type(bias) in PLAIN_TYPES)
        and eager_is_plain()
        and not (input.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg()))
    ):
        return _C.linear_shape(input, weight, bias)
    return None
