"""Image-text retrieval by false texts: find the own text of an image among others (as ViLT and METER do).

Shapes: B samples, F false images, n false texts, L text tokens.
"""

import torch
from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.evaluation.sums import Report, pair
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.models.heads import LinearHead
from mt_deepspeed.models.managers import Record
from mt_deepspeed.models.partition import whole
from mt_deepspeed.objectives.classification import cross_entropy, false_text_loss
from mt_deepspeed.tasks.base import Batch, TwoTowerTask
from mt_deepspeed.tasks.noise import noise_batch, noise_ids, noise_matching


class FalseTextsTask(TwoTowerTask):
    """Cross-entropy of the own text among 1 + n, and matching with random images under a frozen head.

    The score `rank_output` starts as the matched row of `itm_score` (`rank_from_matching`), which stays as it is.
    """

    itm_score: LinearHead
    rank_output: nn.Linear

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.model, HeadsConfig(itm=True, rank=True))
        self.config = config.retrieval
        self.itm_score.requires_grad_(False)
        self.loss_weights = {"irtr": 1.0, "itm": 1.0}

    @torch.no_grad()
    def rank_from_matching(self) -> None:
        """Copies the matched row of `itm_score` to `rank_output`; for a checkpoint without the latter."""
        for own, other in (
            (self.rank_output.weight, self.itm_score.fc.weight),
            (self.rank_output.bias, self.itm_score.fc.bias),
        ):
            with whole(other, write=False), whole(own):
                own.copy_(other[1:])

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Report]:
        """Losses of one micro-batch.

        Args:
            batch: `pixels [B+F,3,S,S]`, `choice_ids`, `choice_mask [B,1+n,L]` (own text first),
                `itm_image_index [B]` (rows of `pixels`), `itm_labels [B]`.
        """
        return self._losses(batch)

    def _losses(self, batch: Batch, record: Record | None = None) -> tuple[dict[str, Tensor], Report]:
        ids, mask = batch["choice_ids"], batch["choice_mask"]
        rows, choices, self._text_len = ids.shape
        mask_CL = mask.flatten(0, 1)
        texts = self.model.text_experts(self.model.encode_text(ids.flatten(0, 1), mask_CL))
        images = self.model.image_experts(self.model.encode_image(batch["pixels"]))
        every = torch.arange(rows, device=ids.device)
        # First the B x (1 + n) pairs of own image and choice, then the B pairs to be matched.
        text_rows = torch.cat([torch.arange(rows * choices, device=ids.device), every * choices])
        image_rows = torch.cat([every.repeat_interleave(choices), batch["itm_image_index"]])
        fused = self.model.fuse_experts(
            [expert[text_rows] for expert in texts],
            [expert[image_rows] for expert in images],
            mask_CL[text_rows],
            record,
            pooled_from=0,
        )
        scores = self.rank_output(fused.cls_feats[: rows * choices]).view(rows, choices)
        logits = self.itm_score(fused.cls_feats[rows * choices :])
        losses = {
            "irtr": false_text_loss(scores),
            "itm": cross_entropy(logits, batch["itm_labels"]),
        }
        return losses, {
            "irtr_accuracy": pair((scores.argmax(dim=1) == 0).sum(), rows),
            "itm_accuracy": pair((logits.argmax(dim=1) == batch["itm_labels"]).sum(), rows),
        }

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Samples of one micro-batch."""
        rows = torch.tensor(len(batch["sample_ids"]), device=batch["sample_ids"].device)
        return {"irtr": rows, "itm": rows}

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`."""
        false_images = samples // 2
        batch = noise_batch(self.model.config, samples, text_len, samples + false_images)
        choices = noise_ids(self.model.config, samples, 1 + self.config.num_false_texts, text_len)
        batch |= {"choice_ids": choices, "choice_mask": torch.ones_like(choices)}
        return batch | noise_matching(samples, false_images)

    def eval_step(self, batch: Batch) -> Report:
        """(sum, count) of losses and accuracies; recall is measured apart."""
        mask = batch["choice_mask"]  # an image's own text is the first of its choices
        with self._gallery.watch(self.model, batch["pixels"], mask[:, 0], every=mask.shape[1]) as record:
            losses, report = self._losses(batch, record)
        return report | self.loss_sums(losses, batch)

    def score(self, metrics: dict[str, float]) -> float:
        """Minus the loss, as the published code chooses its checkpoints."""
        return -metrics["irtr_loss"]

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        tokens = self.text_tokens(text_len)
        choices = 1 + self.config.num_false_texts
        return 3 * forward_flops(
            self.model.config,
            tokens,
            pairs=choices + 1,
            images=1.5,
            masked_tokens=0,
            texts=choices,
            pooled=choices + 1,
        )
