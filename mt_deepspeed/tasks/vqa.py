"""Visual question answering: soft scores over a fixed answer vocabulary (VQAv2)."""

import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.objectives.classification import vqa_loss
from mt_deepspeed.tasks.classification import Batch, PairClassificationTask, classifier_heads


class VQATask(PairClassificationTask):
    """Binary cross-entropy over the answers; the metric is the soft score of the likeliest one.

    The official accuracy compares with each nine of ten people's answers instead: `evaluation.vqa_accuracy`.
    """

    head_name, loss_name, metric_name = "vqa_classifier", "vqa", "vqa_score"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, classifier_heads(config, vqa_answers=config.classifier.num_answers))
        self.num_answers = config.classifier.num_answers

    def loss(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """Mean over questions, sum over answers."""
        return vqa_loss(logits_BC, batch["answer_scores"])

    def fake_labels(self, samples: int) -> Batch:
        """Any scores."""
        return {"answer_scores": torch.rand(samples, self.num_answers)}

    def points(self, logits_BC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The score of the likeliest answer; questions without published answers do not count."""
        scores_BA = batch["answer_scores"].double()
        best_B1 = logits_BC.argmax(dim=-1, keepdim=True)
        return scores_BA.gather(1, best_B1)[:, 0], (scores_BA.sum(dim=1) > 0).double()
