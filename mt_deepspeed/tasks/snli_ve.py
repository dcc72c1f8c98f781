"""Visual entailment: does the image contradict, leave open or entail the hypothesis? (SNLI-VE)"""

import torch

from mt_deepspeed.config import RunConfig
from mt_deepspeed.tasks.classification import Batch, PairClassificationTask, classifier_heads


class SnliVETask(PairClassificationTask):
    """Three classes: 0 contradiction, 1 neutral, 2 entailment. The text is the hypothesis alone."""

    head_name, loss_name = "snli_classifier", "snli"
    labels = ("contradiction", "neutral", "entailment")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, classifier_heads(config, snli_ve=True))

    def fake_labels(self, samples: int) -> Batch:
        """Any of the three classes."""
        return {"labels": torch.randint(3, (samples,))}
