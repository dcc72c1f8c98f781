"""What tasks with a classifier have in common: one answer among C, of a pair of text and images or of one of them.

Shapes: B samples, L text tokens, C classes.
"""

import torch
from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.evaluation.sums import Report, pair
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.models.heads import attach_heads
from mt_deepspeed.models.managers import Record
from mt_deepspeed.models.single_tower import TextOnly, VisionOnly
from mt_deepspeed.models.two_tower import TwoTowerModel
from mt_deepspeed.objectives.classification import cross_entropy
from mt_deepspeed.tasks.base import Batch, published_role
from mt_deepspeed.tasks.heatmaps import Gallery
from mt_deepspeed.tasks.noise import noise_batch


class ClassificationTask(nn.Module):
    """A model with a classifier, which stands under `head_name`.

    Args:
        config: The run.
        model: What the classifier reads from.
    """

    head_name: str
    loss_name: str
    metric_name = "accuracy"
    labels: tuple[str, ...] = ()
    """Names of the classes, where the data set has fixed ones."""

    def __init__(self, config: RunConfig, model: TwoTowerModel | VisionOnly | TextOnly) -> None:
        super().__init__()
        self.model = model
        self.loss_weights = {self.loss_name: 1.0}
        self.eval_sets = eval_set_names(config)

    def logits(self, batch: Batch) -> Tensor:
        """`[B, C]` of a batch with the keys that the model reads."""
        raise NotImplementedError

    def predictions(self, logits_BC: Tensor) -> Tensor:
        """Likeliest classes, `[B]`."""
        return logits_BC.argmax(dim=-1)

    def loss(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """Mean loss of the batch: cross-entropy against `labels`."""
        return cross_entropy(logits_BC, batch["labels"])

    def points(self, logits_BC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What each sample's likeliest class earns, 1 for the label, and 1 where it counts at all: `[B]`, `[B]`."""
        right_B = (logits_BC.argmax(dim=-1) == batch["labels"]).double()
        return right_B, torch.ones_like(right_B)

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`."""
        raise NotImplementedError

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Report]:
        """Loss and metric of one micro-batch; keys as in `data.task_batches`."""
        logits_BC = self.logits(batch)
        earned_B, counted_B = self.points(logits_BC, batch)
        return {self.loss_name: self.loss(logits_BC, batch)}, {
            self.metric_name: pair(earned_B.sum(), counted_B.sum())
        }

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Samples of one micro-batch."""
        return {self.loss_name: torch.tensor(len(batch["sample_ids"]), device=batch["sample_ids"].device)}

    def eval_step(self, batch: Batch) -> Report:
        """(sum, count) of loss and metric."""
        return self.metrics(self.logits(batch), batch)

    def metrics(self, logits_BC: Tensor, batch: Batch) -> Report:
        """(sum, count) of loss and metric, the metric also for each evaluation set."""
        earned_B, counted_B = self.points(logits_BC, batch)
        labelled = counted_B.sum()
        report = {
            self.metric_name: pair(earned_B.sum(), labelled),
            f"{self.loss_name}_loss": pair(self.loss(logits_BC, batch) * labelled, labelled),
        }
        if len(self.eval_sets) > 1:
            for number, name in enumerate(self.eval_sets):
                here_B = batch["dataset_ids"] == number
                key = f"{self.metric_name}/{name}"
                report[key] = pair((earned_B * here_B).sum(), (counted_B * here_B).sum())
        return report

    def score(self, metrics: dict[str, float]) -> float:
        """The metric on the first evaluation set: later ones (test sets) choose no checkpoint."""
        first = f"{self.metric_name}/{self.eval_sets[0]}" if self.eval_sets else self.metric_name
        return metrics.get(first, metrics[self.metric_name])

    def heatmaps(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def checkpointable_layers(self) -> list[nn.Module]:
        """Layers that activation checkpointing may wrap."""
        return self.model.checkpointable_layers()

    @staticmethod
    def parameter_role(name: str) -> str:
        """See `published_role`."""
        return published_role(name)


class PairClassificationTask(ClassificationTask):
    """A two-tower model with a classifier on the features of a text with one or two images: VQA, SNLI-VE, NLVR2.

    Args:
        config: The run.
        heads: The head.
    """

    model: TwoTowerModel
    num_images = 1

    def __init__(self, config: RunConfig, heads: HeadsConfig) -> None:
        super().__init__(config, TwoTowerModel(config.model))
        attach_heads(self, config.model, heads)
        self._gallery = Gallery()
        self._text_len = 0

    def features(self, batch: Batch, record: Record | None = None) -> Tensor:
        """What the head reads, `[B, features]`."""
        self._text_len = batch["text_mask"].shape[1]
        text = self.model.encode_text(batch["text_ids"], batch["text_mask"])
        image = self.model.encode_image(batch["pixels"])
        return self.model.fuse(text, image, batch["text_mask"], record=record, pooled_from=0).cls_feats

    def logits(self, batch: Batch, record: Record | None = None) -> Tensor:
        """`[B, C]` of a batch with `pixels`, `text_ids`, `text_mask`."""
        logits: Tensor = getattr(self, self.head_name)(self.features(batch, record))
        return logits

    def fake_labels(self, samples: int) -> Batch:
        """Invented labels of B samples: the keys that `loss` and `points` read."""
        raise NotImplementedError

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`."""
        images = samples * self.num_images
        batch = noise_batch(self.model.config, samples, text_len, images)
        batch["dataset_ids"] = torch.zeros(samples, dtype=torch.int64)
        return batch | self.fake_labels(samples)

    def eval_step(self, batch: Batch) -> Report:
        """(sum, count) of loss and metric; the first time since `heatmaps`, keeps pictures for it."""
        with self._gallery.watch(self.model, batch["pixels"], batch["text_mask"]) as record:
            logits_BC = self.logits(batch, record)
        return self.metrics(logits_BC, batch)

    def heatmaps(self) -> dict[str, Tensor]:
        """Of the first batch evaluated since the last call; see `heatmaps.pictures`."""
        return self._gallery.take()

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        tokens = text_len or self._text_len or self.model.config.text.max_positions
        images = self.num_images
        return 3 * forward_flops(self.model.config, tokens, images, images, 0, texts=1, pooled=images)


def eval_set_names(config: RunConfig) -> list[str]:
    """A name for each data set of `data.eval`: its splits, with its folder's name where they are not unique."""
    splits = ["+".join(dataset.splits) for dataset in config.data.eval]
    if len(set(splits)) == len(splits):
        return splits
    names = [f"{dataset.path}:{split}" for dataset, split in zip(config.data.eval, splits, strict=True)]
    return names if len(set(names)) == len(names) else [f"{i}:{name}" for i, name in enumerate(names)]


def classifier_heads(config: RunConfig, **wanted: bool | int) -> HeadsConfig:
    """The configured depth and width for the heads `wanted`."""
    return HeadsConfig(
        classifier_layers=config.classifier.layers,
        classifier_scale=config.classifier.scale,
        **wanted,  # type: ignore[arg-type]
    )
