"""What tasks share: learning-rate groups, and all else of those on a two-tower model that are no classifiers."""

from torch import Tensor, nn

from mt_deepspeed.config import ModelConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.evaluation.sums import Report, pair
from mt_deepspeed.models.heads import attach_heads
from mt_deepspeed.models.two_tower import TwoTowerModel
from mt_deepspeed.tasks.heatmaps import Gallery

Batch = dict[str, Tensor]

HEADS = ("mlm_score", "itm_score", "_classifier.")


def published_role(name: str) -> str:
    """The published code's learning-rate group of a parameter.

    Returns:
        `head`, `cross_modal`, or `tower` for all else (which includes type and layer embeddings).
    """
    if any(head in name for head in HEADS):
        return "head"
    return "cross_modal" if "cross_modal" in name else "tower"


class TwoTowerTask(nn.Module):
    """A two-tower model with heads beside it.

    Args:
        model: The model.
        heads: The heads.
    """

    def __init__(self, model: ModelConfig, heads: HeadsConfig) -> None:
        super().__init__()
        self.model = TwoTowerModel(model)
        attach_heads(self, model, heads)
        self._gallery = Gallery()
        self._text_len = 0

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Loss name -> elements it averages over in this micro-batch."""
        raise NotImplementedError

    def loss_sums(self, losses: dict[str, Tensor], batch: Batch) -> Report:
        """(sum, count) of each loss."""
        counts = self.loss_counts(batch)
        return {f"{name}_loss": pair(losses[name] * count, count) for name, count in counts.items()}

    def heatmaps(self) -> dict[str, Tensor]:
        """Of the first batch evaluated since the last call; see `heatmaps.pictures`."""
        return self._gallery.take()

    def checkpointable_layers(self) -> list[nn.Module]:
        """Layers that activation checkpointing may wrap."""
        return self.model.checkpointable_layers()

    def text_tokens(self, text_len: int | None) -> int:
        """The given text length, else the last batch's, else the longest possible."""
        return text_len or self._text_len or self.model.config.text.max_positions

    @staticmethod
    def parameter_role(name: str) -> str:
        """See `published_role`."""
        return published_role(name)
