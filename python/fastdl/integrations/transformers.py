"""Hugging Face transformers: attn_implementation="fastdl", and the class that stands in for its Conv1D.

    import fastdl.integrations.transformers  # or fastdl.optimize(model), once transformers is imported
    model = AutoModel.from_pretrained(name, attn_implementation="fastdl")
    model.set_attn_implementation("fastdl")  # a model that exists

Importing this module registers it. Masks are those of transformers' "sdpa": bool, one for all heads, none where the
attention is plainly causal or full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, pytorch_utils
from transformers.masking_utils import sdpa_mask

from fastdl.nn.swapped import Swapped, method_named
from fastdl.ops.attention import scaled_dot_product_attention
from fastdl.ops.gemm import linear

NAME = "fastdl"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, L, E], key and value [B, Hkv, S, E] -> ([B, L, H, E], no weights).

    Grouped heads are read where they lie. ValueError for attention sinks and paged caches.
    """
    for name in ("s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='{NAME}': argument '{name}': expected None, it is not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)  # one query: the newest, which sees all
    mask = attention_mask
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
        else:
            mask = mask + position_bias
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        window=(None, 0) if causal else None,  # is_causal, together with a position bias
        softcap=softcap,
    )
    return out.transpose(1, 2).contiguous(), None


class Conv1D(Swapped, pytorch_utils.Conv1D):
    """`transformers.pytorch_utils.Conv1D` on fastdl: a linear layer whose weight is [in, out], read as it lies."""

    stock_class = pytorch_utils.Conv1D
    unpackable = "its weight is [in, out]; packs are made of [out, in]"
    torch_forward = method_named("torch_forward", pytorch_utils.Conv1D.forward)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., nx] -> [..., nf]."""
        if torch.jit.is_scripting():
            return self.torch_forward(x)
        else:  # spelled out: the script compiler looks into everything but the branch not taken
            return linear(x, self.weight.t(), self.bias)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
