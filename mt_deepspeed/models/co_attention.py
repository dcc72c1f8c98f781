"""Multi-head attention with its output sub-layer, within a sequence or to another one.

Shapes: B batch, L and K tokens, D hidden, H heads, E = D / H.
"""

import torch
from torch import Tensor, nn

from mt_deepspeed.config.model import CrossModalConfig
from mt_deepspeed.kernels.attention import attention, dropout
from mt_deepspeed.models.projection import Projection, adjoint, after_sum, before_sum, by_head, by_item


class Attention(nn.Module):
    """Multi-head attention with separate projections, scores scaled by 1 / sqrt(E)."""

    seen: list[Tensor] | None = None
    """Where it is a list, it receives the weights of every call, `[B, H, L, K]`."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Projection(hidden_size, hidden_size)
        self.key = Projection(hidden_size, hidden_size)
        self.value = Projection(hidden_size, hidden_size)

    def forward(self, hidden_BLD: Tensor, context_BKD: Tensor, attend: Tensor | None) -> Tensor:
        """What `hidden` gathers from `context`, `[B, L, D]`; `attend` is None or bool `[B, 1, 1, K]`."""
        if self.are_few(hidden_BLD, beside=context_BKD):
            return self._by_few(hidden_BLD, context_BKD, attend)
        query, key, value = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, x in ((self.query, hidden_BLD), (self.key, context_BKD), (self.value, context_BKD))
        )
        if self.seen is not None:
            self._weights(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, attend)
        mixed = attention(query, key, value, attend, self.dropout, self.training)
        return mixed.transpose(1, 2).flatten(2)

    def are_few(self, tokens_BLD: Tensor, beside: Tensor) -> bool:
        """Whether attention between `tokens` and `beside` `[B, K, D]` is to apply every projection to `tokens`.

        One of `beside` then meets H * L vectors instead of a D x D matrix. On a CPU that is faster while H * L is
        below 0.7 D at D = 768, but not at D = 64.
        """
        return 2 * tokens_BLD.shape[1] <= min(beside.shape[1], tokens_BLD.shape[2] // self.num_heads)

    def to_few(self, context_BKD: Tensor, attend: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a longer sequence needs of a short context.

        Returns:
            `[B, H * K, D]`, whose dot products with a token, added to `[B, 1, H * K]`, are its scores (-inf where
            `attend` is False), and the values `[H, B * K, E]`.
        """
        key = self._scaled(self.key(context_BKD))
        readers, shifts = (by_item(part, context_BKD.shape[1]) for part in self.query(key, product=adjoint))
        shifts = shifts.unflatten(1, (self.num_heads, -1)).permute(0, 3, 1, 2)  # [B, 1, H, K]
        if attend is not None:
            shifts = shifts.masked_fill(~attend, float("-inf"))
        return readers, shifts.flatten(2), by_head(self.value(context_BKD), self.num_heads)

    def weights_of_few(self, hidden_BLD: Tensor, readers: Tensor, shifts: Tensor) -> Tensor:
        """The weights of `hidden` for a context that was given to `to_few`, `[B, L, H * K]`."""
        scores = torch.baddbmm(shifts, hidden_BLD, readers.transpose(1, 2))
        weights = scores.unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)
        if self.seen is not None:
            self.seen.append(weights.detach().transpose(1, 2))
        return dropout(weights, self.dropout, self.training).flatten(2)

    def _by_few(self, hidden_BLD: Tensor, context_BKD: Tensor, attend: Tensor | None) -> Tensor:
        length, heads = hidden_BLD.shape[1], self.num_heads
        query = self._scaled(self.query(hidden_BLD))
        readers, shifts = (by_item(part, length) for part in self.key(query, product=adjoint))
        scores = torch.baddbmm(shifts, readers, context_BKD.transpose(1, 2))
        weights = self._weights(scores.unflatten(1, (heads, -1)), attend).flatten(1, 2)
        # Back from [B, H * L, ...] to heads first.
        mixed, total = (
            part.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
            for part in (weights @ context_BKD, weights.sum(dim=-1, keepdim=True))
        )
        value = self.value(mixed, total, product=after_sum)
        return value.unflatten(1, (-1, length)).permute(1, 2, 0, 3).flatten(2)

    def _weights(self, scores: Tensor, attend: Tensor | None) -> Tensor:
        """Of scores `[B, H, L, K]`."""
        if attend is not None:
            scores = scores.masked_fill(~attend, float("-inf"))
        weights = scores.softmax(dim=-1)
        if self.seen is not None:
            self.seen.append(weights.detach())
        return dropout(weights, self.dropout, self.training)

    def _scaled(self, projected_BLD: Tensor) -> Tensor:
        """`[H, B * L, E]`, with the scale of the scores."""
        heads = by_head(projected_BLD, self.num_heads)
        return heads * heads.shape[-1] ** -0.5


class Output(nn.Module):
    """`LN(residual + dropout(dense(x)))`, the end of every sub-layer."""

    def __init__(self, in_size: int, hidden_size: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = Projection(in_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor, values: Tensor | None = None) -> Tensor:
        """Same shape as `residual`; with `values`, `x` are weights, as `before_sum` describes both."""
        dense = self.dense(x) if values is None else self.dense(x, values, product=before_sum)
        normed: Tensor = self.LayerNorm(residual + dropout(dense, self.dropout, self.training))
        return normed


class AttentionBlock(nn.Module):
    """Attention with its output sub-layer; self-attention when the context is the input.

    Between a few tokens and many all four projections are applied to the few: the result is the same but for
    rounding, and the many neither pass a matrix nor are kept for backward as queries, keys, values or sums.
    """

    def __init__(self, config: CrossModalConfig) -> None:
        super().__init__()
        self.self = Attention(config.hidden_size, config.num_heads, config.dropout)
        self.output = Output(config.hidden_size, config.hidden_size, config.layer_norm_eps, config.dropout)

    def forward(self, hidden_BLD: Tensor, context_BKD: Tensor, attend: Tensor | None) -> Tensor:
        """`[B, L, D]`; `attend` is None or bool `[B, 1, 1, K]`."""
        attention = self.self
        if attention.are_few(context_BKD, beside=hidden_BLD):
            readers, shifts, values = attention.to_few(context_BKD, attend)
            weights = attention.weights_of_few(hidden_BLD, readers, shifts)
            few: Tensor = self.output(weights, hidden_BLD, values)
            return few
        result: Tensor = self.output(attention(hidden_BLD, context_BKD, attend), hidden_BLD)
        return result
