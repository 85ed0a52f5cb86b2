"""`nn.MultiheadAttention` with its projections as four linear layers that are called.

In: an attention module, whose query, key and value projections are rows of one bare parameter that
no hook sees. Out: an `Attention` that computes the same by

    softmax(Q Kᵀ / sqrt(d) + mask) V,   Q = q Wqᵀ, K = k Wkᵀ, V = v Wvᵀ,   then out

a head, so that each projection can be fitted and replaced like any other linear layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("query", "key", "value")


class Attention(nn.Module):
    """Takes the place of `nn.MultiheadAttention`, with the same call and the same outputs.

    Parameters
    ----------
    source : nn.MultiheadAttention
        Its weights are copied; it must be `splittable`.
    """

    # Read by nn.TransformerEncoderLayer, which takes its slow path, the one that calls the
    # projections, where the bias of a fused projection is None.
    in_proj_bias = None

    @torch.no_grad()
    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.batch_first, self.dropout = source.batch_first, source.dropout
        self._qkv_same_embed_dim = source._qkv_same_embed_dim
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        else:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        bias = source.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        for name, weight, part in zip(PROJECTIONS, weights, biases, strict=True):
            setattr(self, name, _linear(weight, part))
        self.out = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

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
        """See `nn.MultiheadAttention`; inputs (N, L, E), (L, N, E) or without N, as there."""
        batched = query.dim() == 3
        turned = batched and not self.batch_first
        inputs = [x.transpose(0, 1) if turned else x for x in (query, key, value)]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        layers = (self.query, self.key, self.value)
        q, k, v = (self._heads(f(x)) for f, x in zip(layers, inputs, strict=True))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, attn_mask, key_padding_mask)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, rate, self.training)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal=causal)
        output = self.out(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if turned else output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, E) as (N, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, q: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """The sum of both masks, to be added to scores (N, heads, L, S)."""
        parts = []
        if attention is not None:
            attention = _additive(attention, q.dtype)
            several = attention.dim() == 3  # (N * heads, L, S)
            parts.append(attention.unflatten(0, q.shape[:2]) if several else attention)
        if padding is not None:
            parts.append(_additive(padding, q.dtype)[:, None, None])
        return sum(parts) if parts else None

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def splittable(module: nn.Module) -> bool:
    """Whether `Attention` computes what a module does."""
    plain = type(module) is nn.MultiheadAttention
    return plain and module.bias_k is None and not module.add_zero_attn


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    n, m = weight.shape
    layer = nn.Linear(m, n, bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added: minus infinity where a boolean one is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
