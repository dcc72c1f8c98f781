"""Contrast of texts, images and fused pairs, as in transformers' `BridgeTowerForContrastiveLearning`."""

import torch
from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.evaluation.sums import Report, pair
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.models.heads import ContrastiveHead
from mt_deepspeed.models.managers import Record
from mt_deepspeed.objectives.contrastive import three_way_contrastive_loss
from mt_deepspeed.tasks.base import Batch, TwoTowerTask
from mt_deepspeed.tasks.noise import noise_batch
from mt_deepspeed.tasks.retrieval import ALONE, Ranks


class ThreeWayTask(TwoTowerTask):
    """One embedding each of the text, of the image and of the fused pair, contrasted two by two over all ranks.

    Every other pair is a negative, texts of the same image too.
    """

    itc_text_head: ContrastiveHead
    itc_image_head: ContrastiveHead
    itc_cross_modal_head: ContrastiveHead
    logit_scale: nn.Parameter

    def __init__(self, config: RunConfig, ranks: Ranks = ALONE) -> None:
        super().__init__(config.model, HeadsConfig(fused_itc_size=config.retrieval.itc_size))
        self.ranks = ranks
        self.loss_weights = {"itc": 1.0}

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Report]:
        """Loss of one micro-batch: `pixels [B,3,S,S]`, `text_ids`, `text_mask [B,L]`."""
        return self._loss(batch, self.ranks)

    def _loss(
        self, batch: Batch, ranks: Ranks, record: Record | None = None
    ) -> tuple[dict[str, Tensor], Report]:
        mask_BL = batch["text_mask"]
        rows, self._text_len = mask_BL.shape
        texts = self.model.encode_text(batch["text_ids"], mask_BL)
        images = self.model.image_experts(self.model.encode_image(batch["pixels"]))
        fused = self.model.fuse_experts(
            self.model.text_experts(texts), images, mask_BL, record, pooled_from=0
        )
        text_BE = self.itc_text_head(texts[-1][:, 0])
        image_BE = self.itc_image_head(images[-1][:, 0])
        fused_BE = self.itc_cross_modal_head(fused.cls_feats)
        first = ranks.rank * rows
        loss = three_way_contrastive_loss(text_BE, image_BE, fused_BE, self.logit_scale, ranks.gather, first)
        own_B = torch.arange(rows, device=mask_BL.device)
        right = ((text_BE @ image_BE.T).argmax(dim=1) == own_B).sum()
        return {"itc": loss}, {"itc_accuracy": pair(right, rows)}

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Pairs of one micro-batch."""
        return {"itc": torch.tensor(len(batch["sample_ids"]), device=batch["sample_ids"].device)}

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`."""
        return noise_batch(self.model.config, samples, text_len, samples)

    def eval_step(self, batch: Batch) -> Report:
        """(sum, count) of loss and accuracy within one evaluation batch; they depend on its size."""
        with self._gallery.watch(self.model, batch["pixels"], batch["text_mask"]) as record:
            losses, report = self._loss(batch, ALONE, record)
        return report | self.loss_sums(losses, batch)

    def score(self, metrics: dict[str, float]) -> float:
        """Accuracy within the batch."""
        return metrics["itc_accuracy"]

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        tokens = self.text_tokens(text_len)
        return 3 * forward_flops(
            self.model.config, tokens, pairs=1, images=1, masked_tokens=0, texts=1, pooled=1
        )

    @staticmethod
    def parameter_role(name: str) -> str:
        """See `published_role`; all contrastive heads train like cross-modal layers."""
        is_head = name.startswith("itc_") or name == "logit_scale"
        return "cross_modal" if is_head else TwoTowerTask.parameter_role(name)
