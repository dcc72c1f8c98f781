"""Co-attention layers of the cross-modal encoder (post-norm).

Shapes: B batch, L and K tokens, D hidden, T text tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mt_deepspeed.config.model import CrossModalConfig
from mt_deepspeed.models.co_attention import AttentionBlock, Output


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
    attentions = [layer.crossattention.self for layer in layers if isinstance(layer, CrossModalLayer)]
    for attention in attentions:
        attention.seen = seen
    try:
        yield seen
    finally:
        for attention in attentions:
            attention.seen = None


class Pooler(nn.Module):
    """`tanh(dense(first token))`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """`[B, D]`."""
        result: Tensor = self.dense(hidden_BLD[:, 0]).tanh()
        return result
