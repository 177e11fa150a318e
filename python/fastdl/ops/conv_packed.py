"""Convolutions with a frozen weight: already in the order that the kernel reads, so that a call packs nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdl import _C


@dataclass(frozen=True)
class Packing:
    """What, beside the weight, the order of a pack depends on."""

    transposed: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _arguments(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def _pass(self) -> str:
        return "dgrad" if self.transposed else "forward"

    def numel(self, weight: Tensor) -> int:
        """Elements of the pack, float32 whatever the dtype of the weight."""
        dtype = str(weight.dtype).removeprefix("torch.")
        return _C.conv_pack_numel(self._pass, tuple(weight.shape), **self._arguments(), dtype=dtype)

    def pack(self, weight: Tensor) -> Tensor:
        """weight, plain and of one of KERNEL_DTYPES, in that order."""
        packed = torch.empty(self.numel(weight), dtype=torch.float32, device="cpu")
        _C.conv_pack(packed, self._pass, weight.detach().resolve_neg(), **self._arguments())
        return packed


@dataclass(frozen=True, eq=False)
class PackedConv:
    """A weight as its kernel reads it, with the contents that it, or it and a folded batch norm, had at that moment."""

    weight: Tensor  # the object that was packed: the pack speaks for no other
    values: tuple[Tensor, Tensor | None] | None  # with a batch norm folded: the weight and bias that come of it
    packed: Tensor
    packing: Packing
    name: str  # of the layer, for messages
    check: bool  # compare contents on every call (FASTDL_CHECK_FROZEN=1 when it was made)

    @classmethod
    def of(cls, weight: Tensor, values: tuple[Tensor, Tensor | None] | None, packing: Packing, name: str) -> PackedConv:
        """The pack of weight, or of what it became by folding."""
        check = os.environ.get("FASTDL_CHECK_FROZEN", "0") not in ("", "0")
        packed = packing.pack(weight if values is None else values[0])
        return cls(weight, values, packed, packing, name, check)

    def require_fresh(self, weight: Tensor) -> None:
        """RuntimeError unless `weight`, folded where that was packed, holds bit for bit what was packed."""
        again = self.packing.pack(weight)
        if again.numel() != self.packed.numel():
            return  # made under another precision: the weight is read
        if not torch.equal(again.view(torch.int32), self.packed.view(torch.int32)):
            raise RuntimeError(
                f"fastdl.conv: layer '{self.name}' is frozen: expected the weight that freeze() packed, got one "
                "written since. Call unfreeze() before writing weights, freeze() after"
            )


def pack_bytes(weight: Tensor, packing: Packing) -> int:
    """Bytes that the pack of a weight takes."""
    return 4 * packing.numel(weight)
