"""Batch norms whose arithmetic is done by the convolution before them.

    bn(conv(x, w, b)) = conv(x, w * s, (b - mean) * s + beta)      s = gamma / sqrt(var + eps), one a channel

Parameters and buffers stay as they are, and both sides ask before every call whether the pair still holds: it does not
in training mode, with hooks between the two, or after either was replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdl.nn.swapped import Swapped


class Pair:
    """A convolution and the batch norm that takes its result, and nothing else does."""

    def __init__(self, model: nn.Module, conv: nn.Module, norm: nn.Module, names: tuple[str, str]) -> None:
        self.conv, self.norm = conv, norm
        self.conv_name, self.norm_name = names
        split = [name.rpartition(".") for name in names]
        self.places = [(model.get_submodule(parent), name) for parent, _, name in split]  # where callers find them

    def obstacle(self) -> str:
        """Why the two are computed apart now, or ""."""
        conv, norm = self.conv, self.norm
        if conv.training or norm.training:
            return "training mode"
        found = [parent._modules.get(name) for parent, name in self.places]
        if found[0] is not conv or found[1] is not norm or conv._fold is not self or norm._fold is not self:
            return "the convolution or the batch norm was replaced or copied"
        if "weight" not in conv._parameters or "bias" not in conv._parameters:
            return "the convolution's parameters are computed"
        if norm.running_mean is None or norm.running_var is None:
            return "the batch norm has no running statistics"
        between = (conv._forward_hooks, conv._backward_hooks, conv._backward_pre_hooks)
        between += (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
        if any(between) or nn.modules.module._has_any_global_hook():
            return "hooks see what is between"
        return ""

    def holds(self) -> bool:
        """Whether the convolution does the work of both now."""
        return not self.obstacle()

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that does both: differentiable, in the dtype of its weight."""
        conv, norm = self.conv, self.norm
        weight, bias = conv.weight, conv.bias
        wide = torch.promote_types(norm.running_var.dtype, torch.float32)
        scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.to(wide)
        shift = norm.running_mean.to(wide) if bias is None else norm.running_mean.to(wide) - bias.to(wide)
        shift = -shift * scale if norm.bias is None else norm.bias.to(wide) - shift * scale
        folded = weight.to(wide) * scale.view(-1, *[1] * (weight.ndim - 1))
        return folded.to(weight.dtype), shift.to(weight.dtype)


class _Folded(Swapped):
    """A batch norm in a pair; on its own, after copying say, its stock class."""

    packed_weight = None
    _fold = None  # the Pair; not annotated, since the script compiler reads annotations

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, ...], already normalised where the convolution before did it."""
        if self._fold is not None and self._fold.holds():
            return input
        return super().forward(input)

    def drop_pack(self) -> None:
        """The pack is the convolution's, and holds what was made of this layer's values."""
        if self._fold is not None:
            self._fold.conv.__dict__.pop("_pack", None)  # it may be of its stock class by now

    def __prepare_scriptable__(self) -> Any:
        twin = self.__copy__()
        twin.__class__ = self.stock_class
        return twin


class BatchNorm1d(_Folded, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, folded into a `Conv1d`."""

    stock_class = nn.BatchNorm1d


class BatchNorm2d(_Folded, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, folded into a `Conv2d`."""

    stock_class = nn.BatchNorm2d


class BatchNorm3d(_Folded, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, folded into a `Conv3d`."""

    stock_class = nn.BatchNorm3d


FOLDED = {cls.stock_class: cls for cls in (BatchNorm1d, BatchNorm2d, BatchNorm3d)}
