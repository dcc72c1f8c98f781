"""Co-attention layers of the cross-modal encoder (post-norm).

Shapes: B batch, L and K tokens, D hidden, H heads, T text tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mt_deepspeed.config.model import CrossModalConfig
from mt_deepspeed.kernels.attention import attention, dropout


class Attention(nn.Module):
    """Multi-head attention with separate projections, scores scaled by 1 / sqrt(D / H)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BLD: Tensor, context_BKD: Tensor, attend: Tensor | None) -> Tensor:
        """Attends from `hidden` to `context`; `attend` is None or bool, broadcastable to `[B, H, L, K]`."""
        query, key = self._split(self.query(hidden_BLD)), self._split(self.key(context_BKD))
        value = self._split(self.value(context_BKD))
        mixed = attention(query, key, value, attend, self.dropout, self.training)
        return mixed.transpose(1, 2).flatten(2)

    def weights(self, query_BLD: Tensor, key_BKD: Tensor, attend: Tensor | None) -> Tensor:
        """The attention of projected queries to keys, `[B, H, L, K]`, which the kernel of `forward` never writes."""
        query, key = self._split(query_BLD), self._split(key_BKD)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if attend is not None:
            scores = scores.masked_fill(~attend, float("-inf"))
        return scores.softmax(dim=-1)

    def _split(self, projected_BLD: Tensor) -> Tensor:
        """`[B, H, L, D / H]`."""
        return projected_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Output(nn.Module):
    """`LN(residual + dropout(dense(x)))`, the end of every sub-layer."""

    def __init__(self, in_size: int, hidden_size: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Same shape as `residual`."""
        normed: Tensor = self.LayerNorm(residual + dropout(self.dense(x), self.dropout, self.training))
        return normed


class AttentionBlock(nn.Module):
    """Attention with its output sub-layer; self-attention when the context is the input."""

    def __init__(self, config: CrossModalConfig) -> None:
        super().__init__()
        self.self = Attention(config.hidden_size, config.num_heads, config.dropout)
        self.output = Output(config.hidden_size, config.hidden_size, config.layer_norm_eps, config.dropout)

    def forward(self, hidden_BLD: Tensor, context_BKD: Tensor, attend: Tensor | None) -> Tensor:
        """`[B, L, D]`."""
        result: Tensor = self.output(self.self(hidden_BLD, context_BKD, attend), hidden_BLD)
        return result


class Intermediate(nn.Module):
    """First half of the feed-forward network."""

    def __init__(self, config: CrossModalConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """`[B, L, intermediate_size]`."""
        result: Tensor = self.activation(self.dense(hidden_BLD))
        return result


class CrossModalLayer(nn.Module):
    """Self-attention, attention to the other modality, feed-forward (arXiv 2206.08657, section 3).

    Args:
        config: Sizes.
        modality: Whose stream this layer carries. The text mask concerns the self-attention of a text layer
            and the cross-attention of an image layer; image tokens are never masked.
    """

    def __init__(self, config: CrossModalConfig, modality: Literal["text", "image"]) -> None:
        super().__init__()
        self.modality = modality
        self.attention = AttentionBlock(config)
        self.crossattention = AttentionBlock(config)
        self.intermediate = Intermediate(config)
        self.output = Output(
            config.intermediate_size, config.hidden_size, config.layer_norm_eps, config.dropout
        )

    def forward(
        self,
        hidden_BLD: Tensor,
        other_BKD: Tensor,
        text_attend_B11T: Tensor,
        stream_BSD: Tensor | None = None,
    ) -> Tensor:
        """`[B, L, D]`; positional tensors only, so that activation checkpointing can wrap the layer.

        Where only some tokens' results are needed, `hidden` holds these and `stream` all of the layer's own tokens.
        """
        own, other = (text_attend_B11T, None) if self.modality == "text" else (None, text_attend_B11T)
        hidden = self.attention(hidden_BLD, hidden_BLD if stream_BSD is None else stream_BSD, own)
        hidden = self.crossattention(hidden, other_BKD, other)
        result: Tensor = self.output(self.intermediate(hidden), hidden)
        return result


@contextmanager
def watched(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that receives the layers' attention to the other modality, `[B, H, L, K]` each, as they run."""
    seen: list[Tensor] = []
    projected: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        projected.append(output.detach())

    def note(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        assert isinstance(module, Attention)
        # What the projections gave: to call them again would gather their weights again (ZeRO-3).
        query_BLD, key_BKD = projected
        seen.append(module.weights(query_BLD, key_BKD, inputs[2]))
        projected.clear()

    hooks: list[Any] = []
    for layer in layers:
        assert isinstance(layer, CrossModalLayer)
        attention = layer.crossattention.self
        hooks += [part.register_forward_hook(keep) for part in (attention.query, attention.key)]
        hooks.append(attention.register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Pooler(nn.Module):
    """`tanh(dense(first token))`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """`[B, D]`."""
        result: Tensor = self.dense(hidden_BLD[:, 0]).tanh()
        return result
