"""linear with a frozen weight: the weight already in panel order, so that a call packs nothing."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.nn import functional as F

from fastdl import _C
from fastdl.ops import gemm_native
from fastdl.ops.calls import run_while_tracing
from fastdl.ops.gemm import LinearFunction, backend, linear, linear_gradients, linear_unsupported
from fastdl.ops.plain import KERNEL_DTYPES, plain_linear_shape
from fastdl.ops.route import Operation, call

# How exact float32 products must be is torch's to say, at any time: then a pack is read only as long as the row that it
# is laid out for is the one a new pack would get. Elsewhere the row is fixed for the life of the process.
_ROWS = {dtype: _C.pack_kernel(str(dtype).removeprefix("torch.")) for dtype in KERNEL_DTYPES}
_SPLITS = any(row["available"] and row["precision"] != "fma" for row in _C.kernels("gemm"))


def pack_kernel(dtype: torch.dtype) -> str:
    """The table row that packs of this dtype are laid out for now."""
    return _C.pack_kernel("float32") if _SPLITS and dtype is torch.float32 else _ROWS[dtype]


@run_while_tracing
def _is_current(kernel: str, dtype: torch.dtype) -> bool:
    return kernel == pack_kernel(dtype)


def _is_beaten(pack: PackedWeight, input: Tensor) -> bool:
    """Whether the weight itself gives the faster product: few rows of float32, whose pack is larger than the weight."""
    return pack.weight.dtype is torch.float32 and not _C.pack_pays(pack.kernel, math.prod(input.shape[:-1]))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [N, K] in panel order, [ceil(N/nr)][K][nr], with the contents it had when it was packed."""

    weight: Tensor  # the object that was packed: the pack speaks for no other
    packed: Tensor  # 1-D float32, whatever the dtype of the weight
    kernel: str  # the table row it is laid out for
    name: str  # of the layer, for messages
    check: bool  # compare contents on every call (FASTDL_CHECK_FROZEN=1 when it was made)

    @classmethod
    def of(cls, weight: Tensor, name: str) -> PackedWeight:
        """Pack weight [N, K], plain and of one of KERNEL_DTYPES."""
        check = os.environ.get("FASTDL_CHECK_FROZEN", "0") not in ("", "0")
        kernel = pack_kernel(weight.dtype)
        return cls(weight, _pack(weight, kernel), kernel, name, check)

    def require_fresh(self) -> None:
        """RuntimeError unless the weight still holds, bit for bit, what was packed."""
        if not torch.equal(_pack(self.weight, self.kernel).view(torch.int32), self.packed.view(torch.int32)):
            raise RuntimeError(
                f"fastdl.linear: layer '{self.name}' is frozen: expected the weight that freeze() packed, got one "
                "written since. Call unfreeze() before writing weights, freeze() after"
            )


def pack_bytes(weight: Tensor) -> int:
    """Bytes that the pack of weight [N, K] takes."""
    N, K = weight.shape
    return 4 * _C.pack_numel(K, N, pack_kernel(weight.dtype))


def _pack(weight: Tensor, kernel: str) -> Tensor:
    N, K = weight.shape
    b = weight.detach().resolve_neg().t()
    packed = torch.empty(_C.pack_numel(K, N, kernel), dtype=torch.float32, device="cpu")
    _C.pack(packed, b, kernel)
    return packed


def linear_packed(input: Tensor, weight: Tensor, bias: Tensor | None, pack: PackedWeight) -> Tensor:
    """`linear`, reading the pack in place of the weight wherever fastdl runs the call.

    input [..., K], weight [N, K], bias [N] or None -> [..., N]. Gradients are those of `linear`, from the weight
    itself. A weight that is not the object packed (put in by torch.func.functional_call, say) is used as it is.
    RuntimeError when FASTDL_CHECK_FROZEN=1 finds the pack stale; compiled code cannot compare and, under that
    setting, reads the weight instead.
    """
    if (
        pack.weight is not weight
        or (pack.check and is_compiling())
        or (_SPLITS and not _is_current(pack.kernel, weight.dtype))
    ):
        return linear(input, weight, bias)
    if pack.check:
        pack.require_fresh()
    if _SPLITS and not is_compiling() and _is_beaten(pack, input):
        return linear(input, weight, bias)
    if not is_compiling() and (shape := plain_linear_shape(input, weight, bias)):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)):
            return _apply_plain(input, weight, bias, pack.packed, pack.kernel)
        out = input.new_empty(*shape)
        _C.linear_packed(out, input, pack.packed, bias, shape[-1], pack.kernel)
        return out
    if torch.is_autocast_enabled("cpu"):  # the weight may be cast, and the pack is not of that
        return linear(input, weight, bias)
    return call(_LINEAR_PACKED, input, weight, bias, constants=(pack.packed, pack.kernel))


class PackedLinearFunction(LinearFunction):
    """LinearFunction whose forward reads the pack."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, kernel: str) -> Tensor:
        return torch.ops.fastdl.linear_packed(input, packed, bias, weight.shape[0], kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*linear_gradients(ctx, grad, backend(grad, *ctx.saved_tensors)), None, None)


class _PlainPackedLinear(PackedLinearFunction):
    """PackedLinearFunction for arguments already known to be plain: its forward calls the kernel."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, kernel: str) -> Tensor:
        return gemm_native.linear_packed(input, packed, bias, weight.shape[0], kernel)


_apply_plain = super(Function, _PlainPackedLinear).apply  # see ops/gemm.py

_LINEAR_PACKED = Operation(
    name="linear",
    arguments=("input", "weight", "bias"),
    optional=("bias",),
    torch_function=lambda input, weight, bias, packed, kernel: F.linear(input, weight, bias),
    overload=lambda input, weight, bias, packed, kernel: torch.ops.fastdl.linear_packed(
        input, packed, bias, weight.shape[0], kernel
    ),
    function=PackedLinearFunction,
    unsupported=lambda input, weight, bias, packed, kernel: linear_unsupported(input, weight, bias),
    plan=lambda out, input, weight, bias, packed, kernel: _C.linear_plan(
        out, input, weight, packed=True, kernel=kernel
    )["kernel"],
)
