"""Visual entailment: does the image contradict, leave open or entail the hypothesis? (SNLI-VE)"""

import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.objectives.classification import class_loss
from mt_deepspeed.tasks.classification import (
    Batch,
    PairClassificationTask,
    accuracy_points,
    classifier_heads,
)


class SnliVETask(PairClassificationTask):
    """Three classes: 0 contradiction, 1 neutral, 2 entailment. The text is the hypothesis alone."""

    head_name, loss_name = "snli_classifier", "snli"
    labels = ("contradiction", "neutral", "entailment")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, classifier_heads(config, snli_ve=True))

    def loss(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return class_loss(logits_BC, batch["labels"])

    def fake_labels(self, samples: int) -> Batch:
        """Any of the three classes."""
        return {"labels": torch.randint(3, (samples,))}

    def points(self, logits_BC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """1 for a right answer."""
        return accuracy_points(logits_BC, batch["labels"])
