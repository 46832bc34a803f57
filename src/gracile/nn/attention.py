"""Multi-head attention whose heads and widths are data: what `nn.MultiheadAttention` becomes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Computes what an `nn.MultiheadAttention` does, with any number and width of heads.

    It takes the other's place: the same parameters under the same names, the same arguments, the
    same results. A head loses a query and a key channel, or a value channel, without the others.

    Attributes:
        heads: how many there are.
        qk_width: channels of each head's queries and keys.
        v_width: channels of each head's values.
        scale: factor of the scores, 1 / sqrt(width at first); does not follow the width.
        dropout: share of attention weights that is dropped in train mode.
        batch_first: (batch, tokens, channels), not (tokens, batch, channels).
        add_zero_attn: one more token whose key and value are zero.

    >>> Attention(nn.MultiheadAttention(6, 2))(*[torch.zeros(5, 1, 6)] * 3)[0].shape
    torch.Size([5, 1, 6])
    """

    in_proj_weight: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    heads: int
    qk_width: int
    v_width: int
    scale: float
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    out_proj: nn.Linear

    def __init__(self, source: "nn.MultiheadAttention | Attention", *, spelled: bool = False):
        super().__init__()
        self.spelled = spelled
        if isinstance(source, Attention):
            self.heads, self.scale = source.heads, source.scale
            self.qk_width, self.v_width = source.qk_width, source.v_width
        else:
            self.heads, self.scale = source.num_heads, float(source.head_dim) ** -0.5
            self.qk_width = self.v_width = source.head_dim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        self.add_zero_attn = source.add_zero_attn
        for name, parameter in source._parameters.items():
            self.register_parameter(name, parameter)
        for name in ("bias_k", "bias_v"):  # plain None where there are none
            if name not in self._parameters:
                self.register_parameter(name, None)
        self.out_proj = source.out_proj
        self.training = source.training

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
        """As `nn.MultiheadAttention.forward`, which trusts `is_causal` where nothing else masks."""
        batched = query.dim() == 3
        q = self._batch_first(query, batched)
        k = q if key is query else self._batch_first(key, batched)
        v = q if value is query else k if value is key else self._batch_first(value, batched)
        q, k, v = (self._heads(t) for t in self._projected(q, k, v))
        k, v, more = self._more_keys(k, v)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, more)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights or self.spelled:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            mask = _causal(q, k) if causal else mask
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, self.dropout, self.training) if self.dropout else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, rate, causal, scale=self.scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not self.batch_first:
            out = out.transpose(0, 1)
        out = out if batched else out.squeeze(1 - self.batch_first)
        if not need_weights or weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        x = x if batched else x.unsqueeze(1 - self.batch_first)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        widths = [self.heads * w for w in (self.qk_width, self.qk_width, self.v_width)]
        if self.in_proj_weight is not None and key is query and value is query:
            return _parts(F.linear(query, self.in_proj_weight, self.in_proj_bias), widths, -1)
        bias: Any = [None] * 3
        if self.in_proj_bias is not None:
            bias = _parts(self.in_proj_bias, widths, 0)
        if self.in_proj_weight is not None:
            weights: Any = _parts(self.in_proj_weight, widths, 0)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        inputs = (query, key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, bias, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads * width) -> (batch, heads, tokens, width)."""
        apart: Tensor = x.unflatten(-1, (self.heads, -1))
        return apart.transpose(1, 2)

    def _more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values of learned and zero tokens behind the others', and how many."""
        n = k.shape[0]
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self._heads(self.bias_k).expand(n, -1, -1, -1)], 2)
            v = torch.cat([v, self._heads(self.bias_v).expand(n, -1, -1, -1)], 2)
            more += 1
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
            more += 1
        return k, v, more

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, more: int
    ) -> Tensor | None:
        """What is added to the scores: (batch or 1, heads or 1, queries, keys)."""
        both: Tensor | None = None
        if attn_mask is not None:
            both, each = _added(attn_mask, q), attn_mask.dim() == 3  # for each sample and head
            both = both.unflatten(0, (-1, self.heads)) if each else both[None, None]
        if padding is not None:
            keys = _added(padding, q).reshape(q.shape[0], 1, 1, -1)  # also of one without a batch
            both = keys if both is None else both + keys
        return both if both is None or not more else F.pad(both, (0, more))

    def extra_repr(self) -> str:
        """Heads and widths."""
        return f"heads={self.heads}, qk_width={self.qk_width}, v_width={self.v_width}"


def _parts(x: Tensor, widths: Sequence[int], dim: int) -> list[Tensor]:
    split = x.split(list(widths), dim)
    return [split[k] for k in range(len(widths))]  # by number, so that a tracer can follow


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """Minus infinity for every key behind the query's place."""
    square: Tensor = q.new_full((q.shape[-2], k.shape[-2]), float("-inf"))
    return square.triu(1)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add; True means: not this one."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
