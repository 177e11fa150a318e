"""linear with a frozen weight: the weight already in panel order, so that a call packs nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastdl import _C
from fastdl.ops import gemm
from fastdl.ops.fused import linear_fused
from fastdl.ops.gemm import linear
from fastdl.ops.route import call


def pack_kernel(dtype: torch.dtype) -> str:
    """The table row that packs of this dtype are laid out for now: how exact float32 products are is torch's to say."""
    return _C.pack_kernel(str(dtype).removeprefix("torch."))


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


def linear_packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pack: PackedWeight,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear`, reading the pack in place of the weight wherever fastdl runs the call.

    input [..., K], weight [N, K], bias [N] or None -> [..., N]. Gradients are those of `linear`, from the weight
    itself. A weight that is not the object packed (put in by torch.func.functional_call, say), or that has gone to a
    GPU since, whose kernels read no packs, is used as it is.
    RuntimeError when FASTDL_CHECK_FROZEN=1 finds the pack stale; compiled code cannot compare and, under that
    setting, reads the weight instead.
    """
    if pack.weight is not weight or not weight.is_cpu or (pack.check and is_compiling()):
        return linear(input, weight, bias, activation=activation, residual=residual)
    if pack.check:
        pack.require_fresh()
    if activation is not None or residual is not None:
        return linear_fused(input, weight, bias, residual, activation, pack.packed)
    if not is_dynamo_compiling():
        out = _C.plain_linear(input, weight, bias, pack.packed)
        if out is True:
            return gemm.apply_plain_linear(input, weight, bias, pack.packed)
        if out is not None:
            return out
    if torch.is_autocast_enabled("cpu"):  # the weight may be cast, and the pack is not of that
        return linear(input, weight, bias)
    return call(gemm.LINEAR, input, weight, bias, constants=(pack.packed,))
