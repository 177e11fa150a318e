"""Multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import activation as stock

from fastdl.nn.swapped import Swapped, method_named, traced_call
from fastdl.ops import calls
from fastdl.ops.attention import attention_varlen, scaled_dot_product_attention
from fastdl.ops.gemm import linear, matmul
from fastdl.ops.packed import linear_packed
from fastdl.ops.route import handback_reason

_NAME = "multi_head_attention"


class MultiheadAttention(Swapped, stock.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fastdl: the same arguments, shapes and results.

    Projections are views of one product, never copied apart, and heads are views of those. With need_weights=True,
    the default of `forward`, the weights are written out and take memory in O(L S), as in torch. A query that may see
    no key gives zeros, where torch's need_weights=True gives NaN.
    """

    stock_class = stock.MultiheadAttention
    packed_weight = "in_proj_weight"
    torch_forward = method_named("torch_forward", stock.MultiheadAttention.forward)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [L, N, E], key and value [S, N, E] ([N, L, E] with batch_first; no N: unbatched) -> (output, weights).

        key_padding_mask [N, S] and attn_mask [L, S] or [N * heads, L, S]: bool, True is left out, or added to the
        scores. is_causal promises that attn_mask is the causal one. weights: [N, L, S], one for each head without
        average_attn_weights, or None without need_weights.
        """
        if torch.jit.is_scripting():
            return self.torch_forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        else:  # spelled out: the script compiler looks into everything but the branch not taken
            if isinstance(query, Proxy):
                masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                return traced_call(self, query, query, key, value, *masks)
            reason = self._unsupported(query, key, value, key_padding_mask, attn_mask, is_causal)
            if reason is not None:
                out = self.torch_forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
                record_handback(_NAME, reason, (query, key, value), out[0])
                return out
            return self._attend(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )

    def _unsupported(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Why torch's own forward is called, or None. It is also what raises torch's errors."""
        tensors = {"query": query, "key": key, "value": value}
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        reason = handback_reason(_NAME, tensors | {name: m for name, m in masks.items() if m is not None})
        if reason is not None:
            return reason
        for name, m in masks.items():
            if m is not None and m.dtype != torch.bool and not m.is_floating_point():
                return f"{name} is {m.dtype}"
        if is_causal and attn_mask is None:
            return "is_causal without attn_mask"
        batched = query.dim() == 3
        if not (query.dim() in (2, 3) and key.dim() == value.dim() == query.dim()):
            return "dimensions do not fit"
        if not (query.shape[-1] == self.embed_dim and key.shape[-1] == self.kdim and value.shape[-1] == self.vdim):
            return "embedding sizes do not fit"
        time = 1 if batched and self.batch_first else 0
        N = query.shape[1 - time] if batched else 1
        L, S = query.shape[time], key.shape[time]
        if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[1 - time] != N):
            return "lengths or batches do not fit"
        if key_padding_mask is not None and key_padding_mask.shape != ((N, S) if batched else (S,)):
            return "the shape of key_padding_mask does not fit"
        if attn_mask is not None and attn_mask.shape not in ((L, S), (N * self.num_heads, L, S)):
            return "the shape of attn_mask does not fit"
        return None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        q, k, v = self._heads(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        k, v, extra = self._extend(k, v, 1 if batch_first else 0)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)  # to [N, H, L, D]
        q, k, v = q.permute(order), k.permute(order), v.permute(order)
        dropout = self.dropout if self.training else 0.0

        # The promise holds for the columns that attn_mask has; the kernel needs no mask to be causal.
        causal = is_causal and not need_weights and (key_padding_mask is None or not extra)
        mask = self._merge(None if causal else attn_mask, key_padding_mask, q, extra)
        weights = None
        if need_weights:
            out, weights = _weighted(q, k, v, mask, dropout)
        else:
            window = (None, 0) if causal else None
            out = scaled_dot_product_attention(q, k, v, mask, dropout, window=window)
        out = out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
        out = self._project_out(out if batched else out.squeeze(0))
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def attend_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Self-attention of packed sequences x [total, E] without masks and weights, in eval mode -> [total, E]."""
        q, k, v = self._heads(x, x, x)
        return self._project_out(attention_varlen(q, k, v, cu_seqlens, cu_seqlens).flatten(1))

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections [..., H, D] of [..., E]; views of one product where the arguments are one tensor."""
        E, bias = self.embed_dim, self.in_proj_bias
        heads = (self.num_heads, self.head_dim)
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
            return tuple(x.unflatten(-1, heads) for x in projected)
        weight = self.in_proj_weight
        if query is key and key is value:
            pack = self._pack
            x = linear(query, weight, bias) if pack is None else linear_packed(query, weight, bias, pack)
            return x.unflatten(-1, (3, *heads)).unbind(-3)
        if key is value:
            q = linear(query, weight[:E], None if bias is None else bias[:E])
            kv = linear(key, weight[E:], None if bias is None else bias[E:])
            return (q.unflatten(-1, heads), *kv.unflatten(-1, (2, *heads)).unbind(-3))
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projected = [linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)]
        return tuple(x.unflatten(-1, heads) for x in projected)

    def _extend(self, k: Tensor, v: Tensor, time: int) -> tuple[Tensor, Tensor, int]:
        """bias_k and bias_v, and a zero, appended to key and value along `time`; and how many those are."""
        shape = list(k.shape)
        shape[time] = 1
        ks, vs = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            heads = (1, 1, self.num_heads, self.head_dim)
            ks.append(self.bias_k.view(heads).expand(shape).to(k.dtype))
            vs.append(self.bias_v.view(heads).expand(shape).to(v.dtype))
        if self.add_zero_attn:
            ks.append(k.new_zeros(shape))
            vs.append(v.new_zeros(shape))
        extra = len(ks) - 1
        return (torch.cat(ks, time), torch.cat(vs, time), extra) if extra else (k, v, 0)

    def _merge(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, extra: int) -> Tensor | None:
        """One mask for scaled_dot_product_attention, broadcast dimensions at 1: bool (True takes part) or added."""
        if attn_mask is not None and padding is not None and attn_mask.dtype != padding.dtype:
            # Warns of the mix, as torch does.
            padding = F._canonical_mask(padding, "key_padding_mask", attn_mask.dtype, "attn_mask", q.dtype)
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, False)
        if attn_mask is not None:
            if attn_mask.dim() == 2:
                attn_mask = attn_mask[None, None]
            else:
                attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            padding = padding[:, None, None]
        if attn_mask is None:
            merged = padding
        elif padding is None:
            merged = attn_mask
        else:
            merged = attn_mask | padding if padding.dtype == torch.bool else attn_mask + padding
        if merged is None:
            return None
        merged = F.pad(merged, (0, extra)) if extra else merged
        return ~merged if merged.dtype == torch.bool else merged

    def _project_out(self, x: Tensor) -> Tensor:
        """out_proj's parameters, not its forward: as in torch, which does not call it either."""
        out_proj = self.out_proj
        pack = getattr(out_proj, "_pack", None)
        if pack is None:
            return linear(x, out_proj.weight, out_proj.bias)
        return linear_packed(x, out_proj.weight, out_proj.bias, pack)


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """(output, weights), the weights [N, H, L, S] written out; after dropout, as torch returns them."""
    scores = matmul(q * q.shape[-1] ** -0.5, k.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    weights = torch.ops.aten._safe_softmax(scores, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return matmul(weights, v), weights


def record_handback(name: str, reason: str, tensors: tuple[Tensor, ...], out: Tensor) -> None:
    """As of a call of the operation `name` that torch ran."""
    calls.handback(name, reason)
    if not is_compiling() and calls.observer is not None:
        calls.observer(calls.Call(name, "torch", calls.shapes(tensors), out.dtype, reason))
