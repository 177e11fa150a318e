"""Convolutions and transposed convolutions in 1, 2 and 3 dimensions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules import conv as stock

from fastdl.nn.swapped import Swapped
from fastdl.ops.conv import convolve
from fastdl.ops.conv_packed import PackedConv, Packing, pack_bytes
from fastdl.ops.conv_shapes import geometry


class _Scripted(Swapped):
    """torch.jit.script compiles a layer of the stock class with the same parameters; it also leaves it in the model."""

    _op: ClassVar[str]
    _fold = None  # a folded.Pair; not annotated, since the script compiler reads annotations

    def __prepare_scriptable__(self) -> torch.nn.Module:
        twin = self.__copy__()
        twin.__class__ = self.stock_class
        return twin

    def _packing(self) -> Packing:
        where = (self.stride, self.padding, self.output_padding, self.dilation, self.groups, self.transposed)
        if self.padding_mode != "zeros":
            where = (where[0], 0, *where[2:])
        g = geometry(self._op, self.kernel_size, *where)
        return Packing(g.transposed, g.stride, g.padding, g.dilation, g.groups)

    def pack_size(self) -> int:
        """Bytes of the pack of this layer."""
        return pack_bytes(self.weight, self._packing())

    def pack_key(self) -> Any:
        """Layers of equal keys share a pack."""
        fold = self._fold if self._fold is not None and self._fold.holds() else None
        return id(self.weight), self._packing(), fold

    def make_pack(self, name: str) -> PackedConv:
        """The pack of this layer, a batch norm folded in where one is now."""
        values = None
        if self._fold is not None and self._fold.holds():
            with torch.no_grad():
                values = self._fold.parameters()
        return PackedConv.of(self.weight, values, self._packing(), name)

    def _operands(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, bias, pack) of the call: with a batch norm folded in, and frozen, where they are."""
        fold, pack = self._fold, self._pack
        folded = fold is not None and weight is self.weight and fold.holds()
        if pack is not None and (
            pack.weight is not weight or (pack.values is not None) != folded or (pack.check and is_compiling())
        ):
            pack = None
        if folded and (pack is None or pack.check or torch.is_grad_enabled()):
            weight, bias = fold.parameters()
        elif folded:
            weight, bias = pack.values
        if pack is None:
            return weight, bias, None
        if pack.check:
            pack.require_fresh(weight)
        return weight, bias, pack.packed


class _Conv(_Scripted):
    """input [N, C, ...] -> [N, K, ...] in the layout that torch gives; see `fastdl.functional.conv2d`."""

    def forward(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """input [N, C, ...] or [C, ...]; a stock layer has neither keyword."""
        return self._conv_forward(input, self.weight, self.bias, activation, residual)

    def _conv_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        packed = None
        if self._fold is not None or self._pack is not None:
            weight, bias, packed = self._operands(weight, bias)
        where = (self.stride, padding, 0, self.dilation, self.groups)
        return convolve(self._op, input, weight, bias, residual, *where, activation, packed)


class _ConvTranspose(_Scripted):
    """input [N, C, ...] -> [N, K, ...] in the layout that torch gives; see `fastdl.functional.conv_transpose2d`."""

    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """input [N, C, ...] or [C, ...]; a stock layer has neither of the last two. ValueError as in torch."""
        if self.padding_mode != "zeros":
            raise ValueError(f"fastdl.{self._op}: expected padding_mode 'zeros', got {self.padding_mode!r}")
        n = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation
        )
        weight, bias, packed = self.weight, self.bias, None
        if self._pack is not None:
            weight, bias, packed = self._operands(weight, bias)
        where = (self.stride, self.padding, tuple(output_padding), self.dilation, self.groups)
        return convolve(self._op, input, weight, bias, residual, *where, activation, packed)


class Conv1d(_Conv, stock.Conv1d):
    """`torch.nn.Conv1d` on fastdl: input [N, C, L] or [C, L]; see `fastdl.functional.conv2d`."""

    stock_class, _op = stock.Conv1d, "conv1d"


class Conv2d(_Conv, stock.Conv2d):
    """`torch.nn.Conv2d` on fastdl: input [N, C, H, W] or [C, H, W]; see `fastdl.functional.conv2d`."""

    stock_class, _op = stock.Conv2d, "conv2d"


class Conv3d(_Conv, stock.Conv3d):
    """`torch.nn.Conv3d` on fastdl: input [N, C, D, H, W] or [C, D, H, W]; see `fastdl.functional.conv2d`."""

    stock_class, _op = stock.Conv3d, "conv3d"


class ConvTranspose1d(_ConvTranspose, stock.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on fastdl: input [N, C, L] or [C, L]; see `fastdl.functional.conv2d`."""

    stock_class, _op = stock.ConvTranspose1d, "conv_transpose1d"


class ConvTranspose2d(_ConvTranspose, stock.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on fastdl: input [N, C, H, W] or [C, H, W]; see `fastdl.functional.conv2d`."""

    stock_class, _op = stock.ConvTranspose2d, "conv_transpose2d"


class ConvTranspose3d(_ConvTranspose, stock.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on fastdl: input [N, C, D, H, W] or [C, D, H, W]; see `fastdl.functional.conv2d`."""

    stock_class, _op = stock.ConvTranspose3d, "conv_transpose3d"
