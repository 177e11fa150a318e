"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules import linear as stock

from fastdl.nn.swapped import Swapped
from fastdl.ops.gemm import linear
from fastdl.ops.packed import linear_packed


class Linear(Swapped, stock.Linear):
    """`torch.nn.Linear` on fastdl: input [..., in_features] -> [..., out_features]; see `fastdl.functional.linear`."""

    stock_class = stock.Linear

    def forward(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """input [..., in_features] -> [..., out_features]; a stock layer has neither keyword."""
        if torch.jit.is_scripting():
            assert activation is None and residual is None, "fastdl.Linear: no epilogue in scripts"
            return F.linear(input, self.weight, self.bias)
        else:  # spelled out: the script compiler looks into everything but the branch not taken
            if activation is None and residual is None:
                if self._pack is None:
                    return linear(input, self.weight, self.bias)
                return linear_packed(input, self.weight, self.bias, self._pack)
            if self._pack is None:
                return linear(input, self.weight, self.bias, activation=activation, residual=residual)
            return linear_packed(input, self.weight, self.bias, self._pack, activation=activation, residual=residual)


class NonDynamicallyQuantizableLinear(Linear, stock.NonDynamicallyQuantizableLinear):
    """The out_proj of torch.nn.MultiheadAttention: a Linear that torch's dynamic quantization passes by."""

    stock_class = stock.NonDynamicallyQuantizableLinear
