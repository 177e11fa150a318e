"""Transformer layers: torch's eval fast path bypasses the modules inside, so the layers themselves are swapped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import transformer as stock

from fastdl.nn.attention import MultiheadAttention, record_handback
from fastdl.nn.linear import Linear
from fastdl.nn.swapped import Swapped, method_named, traced_call


class TransformerEncoderLayer(Swapped, stock.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastdl, its activation and residual fused into the products around them.

    A nested tensor, as torch.nn.TransformerEncoder makes of a padded batch in eval mode, is computed without padding.
    """

    stock_class = stock.TransformerEncoderLayer
    packed_weight = None
    torch_forward = method_named("torch_forward", stock.TransformerEncoderLayer.forward)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src [L, N, E] ([N, L, E] with batch_first) -> the same; masks as in `MultiheadAttention`."""
        if torch.jit.is_scripting():
            return self.torch_forward(src, src_mask, src_key_padding_mask, is_causal)
        else:  # spelled out: the script compiler looks into everything but the branch not taken
            if isinstance(src, Proxy):
                return traced_call(self, src, src, src_mask, src_key_padding_mask, is_causal)
            if src.is_nested:
                masked = src_mask is not None or src_key_padding_mask is not None
                if not masked and _packable(self, src):
                    return self._forward_nested(src)
                out = self.torch_forward(src, src_mask, src_key_padding_mask, is_causal)
                reason = "src is nested, with a mask" if masked else "src is nested, and the layer cannot pack it"
                record_handback("transformer_encoder_layer", reason, (src,), out)
                return out
            if self.norm_first:
                x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
                return _feed_forward(self, self.norm2(x), x, self.dropout2)
            x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
            return self.norm2(_feed_forward(self, x, x, self.dropout2))

    def _forward_nested(self, src: Tensor) -> Tensor:
        sizes = src._nested_tensor_size()
        cu = F.pad(sizes[:, 0].cumsum(0), (1, 0))
        x = src.values().view(-1, self.self_attn.embed_dim)
        if self.norm_first:
            x = x + self.self_attn.attend_packed(self.norm1(x), cu)
            x = _feed_forward(self, self.norm2(x), x, self.dropout2)
        else:
            x = self.norm1(x + self.self_attn.attend_packed(x, cu))
            x = self.norm2(_feed_forward(self, x, x, self.dropout2))
        layout = src._nested_tensor_strides(), src._nested_tensor_storage_offsets()
        return torch._nested_view_from_buffer(x.reshape(-1), sizes, *layout)


class TransformerDecoderLayer(Swapped, stock.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fastdl, its activation and residual fused into the products around them."""

    stock_class = stock.TransformerDecoderLayer
    packed_weight = None
    torch_forward = method_named("torch_forward", stock.TransformerDecoderLayer.forward)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt [L, N, E], memory [S, N, E] ([N, L, E] with batch_first) -> as tgt; masks as in `MultiheadAttention`."""
        if torch.jit.is_scripting():
            return self.torch_forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        else:  # spelled out: the script compiler looks into everything but the branch not taken
            own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
            others = memory, memory_mask, memory_key_padding_mask, memory_is_causal
            if isinstance(tgt, Proxy):
                padding = tgt_key_padding_mask, memory_key_padding_mask
                causal = tgt_is_causal, memory_is_causal
                return traced_call(self, tgt, tgt, memory, tgt_mask, memory_mask, *padding, *causal)
            if self.norm_first:
                x = tgt + self._sa_block(self.norm1(tgt), *own)
                x = x + self._mha_block(self.norm2(x), *others)
                return _feed_forward(self, self.norm3(x), x, self.dropout3)
            x = self.norm1(tgt + self._sa_block(tgt, *own))
            x = self.norm2(x + self._mha_block(x, *others))
            return self.norm3(_feed_forward(self, x, x, self.dropout3))


# --- the feed-forward half ----------------------------------------------------------------------------------------
def _feed_forward(layer: Any, x: Tensor, residual: Tensor, dropout: nn.Module) -> Tensor:
    """residual + dropout(linear2(dropout(activation(linear1(x))))), fused where nothing can tell the difference."""
    first, second = layer.linear1, layer.linear2
    activation = _activation_name(layer.activation)
    fused = activation is not None and _bare(first)
    hidden = first(x, activation=activation) if fused else layer.activation(first(x))
    hidden = layer.dropout(hidden)
    inactive = type(dropout) is nn.Dropout and (dropout.p == 0 or not dropout.training)
    if inactive and _bare(second) and _bare(dropout, nn.Dropout) and not torch.is_autocast_enabled("cpu"):
        return second(hidden, residual=residual)
    return residual + dropout(second(hidden))


def _activation_name(function: Any) -> str | None:
    """The name by which `functional.linear` knows an activation, or None."""
    if isinstance(function, nn.Module):
        if not _bare(function, type(function)):
            return None
        if type(function) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
        return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(function))
    if function is F.relu or function is torch.relu:
        return "relu"
    if function is F.gelu:
        return "gelu"
    return "silu" if function is F.silu else None


def _bare(module: nn.Module, expected: type = Linear) -> bool:
    """Whether calling the module does what its class says and nothing else: no hooks, no override."""
    return (
        type(module) is expected
        and "forward" not in module.__dict__
        and _only_watched(module._forward_hooks)
        and _only_watched(module._forward_pre_hooks)
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not nn.modules.module._has_any_global_hook()
    )


def _only_watched(hooks: dict[int, Any]) -> bool:
    """Whether there are no hooks but those through which `explain` watches."""
    return not hooks or all(getattr(hook, "only_watches", False) for hook in hooks.values())


def _packable(layer: TransformerEncoderLayer, src: Tensor) -> bool:
    """Whether a nested src can be computed as packed rows: by fastdl's attention, without gradients and dropout."""
    attention = layer.self_attn
    return (
        src.layout == torch.strided
        and type(src) is Tensor
        and src.device.type == "cpu"
        and src.dim() == 3
        and src.is_contiguous()
        and not layer.training
        and type(attention) is MultiheadAttention
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in layer.parameters())))
    )
