"""Sentences and pairs of them (GLUE): a probe of the text tower alone, as BridgeTower has it.

Shapes: B samples, L text tokens, C classes (1 where a score is predicted), N samples of an evaluation.
"""

from statistics import mean

import torch
from torch import Tensor
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from mt_deepspeed.config import RunConfig
from mt_deepspeed.evaluation.glue import METRICS
from mt_deepspeed.evaluation.sums import SAMPLES, Report, pair
from mt_deepspeed.models.flops import text_flops
from mt_deepspeed.models.partition import init_weights
from mt_deepspeed.models.single_tower import TextOnly
from mt_deepspeed.models.text_tower import roberta_config
from mt_deepspeed.objectives.classification import score_loss
from mt_deepspeed.tasks.classification import Batch, ClassificationTask
from mt_deepspeed.tasks.noise import noise_ids

CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("different", "equivalent"),
    "qqp": ("different", "duplicate"),
    "stsb": (),
    "mnli": ("contradiction", "neutral", "entailment"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
"""Names of the classes in the order of their numbers."""


class GlueTask(ClassificationTask):
    """RoBERTa's classification head on `<s>`; STS-B's score by mean squared error, all else by cross-entropy."""

    head_name, loss_name = "glue_classifier", "glue"
    model: TextOnly

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, TextOnly(config.model))
        self.num_classes = config.glue.num_classes
        self.labels = CLASSES[config.glue.name]
        self.of_all = METRICS[config.glue.name]
        self.metric_name = "accuracy" if self.num_classes else "absolute_error"
        sizes = roberta_config(config.model.text, num_labels=max(1, self.num_classes))
        self.glue_classifier = RobertaClassificationHead(sizes)
        init_weights(self.glue_classifier, config.model.init_std)
        self._text_len = 0

    def logits(self, batch: Batch) -> Tensor:
        """`[B, C]` of a batch with `text_ids`, `text_mask`."""
        self._text_len = batch["text_mask"].shape[1]
        state_BLD = self.model.encode_text(batch["text_ids"], batch["text_mask"])[-1]
        logits: Tensor = self.glue_classifier(state_BLD)
        return logits

    def predictions(self, logits_BC: Tensor) -> Tensor:
        """Likeliest classes, or scores: `[B]`."""
        return logits_BC.argmax(dim=-1) if self.num_classes else logits_BC[:, 0].float()

    def loss(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy or squared error."""
        if self.num_classes:
            return super().loss(logits_BC, batch)
        return score_loss(logits_BC[:, 0], batch["labels"])

    def points(self, logits_BC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """1 for the right class; of a score, how far it is from the right one."""
        if self.num_classes:
            return super().points(logits_BC, batch)
        error_B = (self.predictions(logits_BC) - batch["labels"]).abs().double()
        return error_B, torch.ones_like(error_B)

    def metrics(self, logits_BC: Tensor, batch: Batch) -> Report:
        """(sum, count) of the loss, and for `figures` a row (evaluation set, prediction, label) of each sample."""
        count = len(logits_BC)
        columns = (batch["dataset_ids"], self.predictions(logits_BC), batch["labels"])
        return {
            f"{self.loss_name}_loss": pair(self.loss(logits_BC, batch) * count, count),
            SAMPLES: torch.stack([column.double() for column in columns], dim=1),
        }

    def figures(self, samples_N3: Tensor) -> dict[str, float]:
        """The task's metrics on each evaluation set, and their means over the sets (MNLI has two)."""
        found: dict[str, float] = {}
        sets_N, predicted_N, labels_N = samples_N3.unbind(dim=1)
        numbers = sets_N.unique().tolist()
        for metric, of in self.of_all.items():
            each = {int(n): of(predicted_N[sets_N == n], labels_N[sets_N == n]) for n in numbers}
            found[metric] = mean(each.values())
            if len(self.eval_sets) > 1:
                found |= {f"{metric}/{self.eval_sets[n]}": value for n, value in each.items()}
        return found

    def score(self, metrics: dict[str, float]) -> float:
        """The first metric, averaged over the evaluation sets."""
        return metrics[next(iter(self.of_all))]

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`; there are no pictures."""
        ids_BL = noise_ids(self.model.config, samples, text_len)
        labels = torch.randint(self.num_classes, (samples,)) if self.num_classes else 5 * torch.rand(samples)
        return {
            "text_ids": ids_BL,
            "text_mask": torch.ones_like(ids_BL),
            "labels": labels,
            "sample_ids": torch.arange(samples),
            "dataset_ids": torch.zeros(samples, dtype=torch.int64),
        }

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        config = self.model.config
        return 3 * text_flops(config, text_len or self._text_len or config.text.max_positions)
