"""Pre-training: masked language modelling and image-text matching in one forward pass.

Shapes: B samples, F false images, L text tokens, P image tokens, M masked positions, D width, V vocabulary.
"""

import torch
from torch import Tensor

from mt_deepspeed.config import ModelConfig, ObjectivesConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.evaluation.sums import Report, pair
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.models.heads import LinearHead, MLMHead
from mt_deepspeed.models.managers import Record
from mt_deepspeed.models.two_tower import FusionOutput
from mt_deepspeed.objectives.classification import cross_entropy
from mt_deepspeed.objectives.mlm import IGNORED, gather_labelled
from mt_deepspeed.tasks.base import Batch, TwoTowerTask
from mt_deepspeed.tasks.noise import noise_batch, noise_matching


class PretrainTask(TwoTowerTask):
    """MLM on the masked text with its own picture, ITM on the plain text with its own or a false one.

    The published code runs each objective as a forward pass of its own, so that the true pictures pass their
    tower twice. Here masked and plain texts form one batch of 2B rows, true and false pictures one of B + F,
    and the cross-modal encoder sees the 2B pairs at once; losses and gradients are the same.
    """

    mlm_score: MLMHead
    itm_score: LinearHead

    def __init__(self, model: ModelConfig, objectives: ObjectivesConfig) -> None:
        has_mlm, has_itm = objectives.mlm_weight > 0, objectives.itm_weight > 0
        if not (has_mlm or has_itm):
            raise ValueError(
                "objectives: mlm_weight and itm_weight are both 0; at least one must be positive"
            )
        heads = HeadsConfig(
            mlm=has_mlm,
            mlm_hidden_act=model.cross_modal.hidden_act,
            mlm_layer_norm_eps=objectives.mlm_layer_norm_eps,
            itm=has_itm,
        )
        super().__init__(model, heads)
        self.objectives, self.has_mlm, self.has_itm = objectives, has_mlm, has_itm
        weights = {"mlm": objectives.mlm_weight, "itm": objectives.itm_weight}
        self.loss_weights = {name: weight for name, weight in weights.items() if weight > 0}

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Report]:
        """Losses of one micro-batch.

        Args:
            batch: `pixels [B+F,3,S,S]`, `text_mask [B,L]`; for MLM `mlm_ids`, `mlm_labels` `[B,L]`,
                `mlm_positions [M]`; for ITM `text_ids [B,L]`, `itm_image_index [B]` (rows of `pixels`),
                `itm_labels [B]`.

        Returns:
            Mean losses `mlm` and `itm`, and (sum, count) of `mlm_accuracy` and `itm_accuracy`.
        """
        return self._losses(batch)

    def _losses(self, batch: Batch, record: Record | None = None) -> tuple[dict[str, Tensor], Report]:
        fused = self._fuse(batch, record)
        losses: dict[str, Tensor] = {}
        report: Report = {}
        batch_size = len(batch["text_mask"])
        if self.has_mlm:
            feats_MD, labels_M = gather_labelled(
                fused.text_feats[:batch_size], batch["mlm_labels"], batch["mlm_positions"]
            )
            logits_MV = self.mlm_score(feats_MD)
            losses["mlm"] = cross_entropy(logits_MV, labels_M)
            report["mlm_accuracy"] = pair((logits_MV.argmax(dim=-1) == labels_M).sum(), labels_M.numel())
        if self.has_itm:
            logits_B2 = self.itm_score(fused.cls_feats)
            losses["itm"] = cross_entropy(logits_B2, batch["itm_labels"])
            report["itm_accuracy"] = pair((logits_B2.argmax(dim=-1) == batch["itm_labels"]).sum(), batch_size)
        return losses, report

    def _fuse(self, batch: Batch, record: Record | None = None) -> FusionOutput:
        """Both objectives' pairs through towers and fusion: MLM rows first, then ITM rows."""
        mask_BL = batch["text_mask"]
        self._text_len = mask_BL.shape[1]
        texts, image_rows = [], []
        if self.has_mlm:
            texts.append(batch["mlm_ids"])
            image_rows.append(torch.arange(len(mask_BL), device=mask_BL.device))
        if self.has_itm:
            texts.append(batch["text_ids"])
            image_rows.append(batch["itm_image_index"])
        masks = mask_BL.repeat(len(texts), 1)
        text_experts = self.model.text_experts(self.model.encode_text(torch.cat(texts), masks))
        # Projected once per picture, then copied to the pairs it belongs to.
        image_experts = self.model.image_experts(self.model.encode_image(batch["pixels"]))
        rows = torch.cat(image_rows)
        pooled_from = len(rows) - len(mask_BL) if self.has_itm else None
        return self.model.fuse_experts(
            text_experts, [expert[rows] for expert in image_experts], masks, record, pooled_from
        )

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Masked tokens and pairs of one micro-batch."""
        counts = {}
        if self.has_mlm:
            counts["mlm"] = (batch["mlm_labels"] != IGNORED).sum()
        if self.has_itm:
            counts["itm"] = torch.tensor(len(batch["itm_labels"]), device=batch["itm_labels"].device)
        return counts

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """A batch of noise with the shapes and the value ranges of real ones, to measure with and to try a run on.

        Args:
            samples: B.
            text_len: L; every text is that long.
        """
        false_images = samples // 2 if self.has_itm and self.objectives.itm_negatives == "dataset" else 0
        batch = noise_batch(self.model.config, samples, text_len, samples + false_images)
        if self.has_mlm:
            ids_BL = batch["text_ids"]
            labels_BL = torch.full_like(ids_BL, IGNORED)
            masked = torch.arange(
                1, min(text_len, 1 + max(1, round(self.objectives.mlm_probability * text_len)))
            )
            labels_BL[:, masked] = ids_BL[:, masked]
            positions_M = (torch.arange(samples)[:, None] * text_len + masked).flatten()
            batch |= {"mlm_ids": ids_BL.clone(), "mlm_labels": labels_BL, "mlm_positions": positions_M}
        if self.has_itm:
            batch |= noise_matching(samples, false_images)
        return batch

    def eval_step(self, batch: Batch) -> Report:
        """(sum, count) of losses and accuracies of one evaluation batch; remembers pictures for `heatmaps`."""
        pixels = batch["pixels"] if self.has_mlm else batch["pixels"][batch["itm_image_index"]]
        with self._gallery.watch(self.model, pixels, batch["text_mask"]) as record:
            losses, report = self._losses(batch, record)
        return report | self.loss_sums(losses, batch)

    def fill_masks(
        self, pixels: Tensor, text_ids_BL: Tensor, text_mask_BL: Tensor, chosen_BL: Tensor
    ) -> Tensor:
        """Vocabulary logits `[M, V]` at the positions where bool `chosen_BL` is True, in reading order.

        Args:
            pixels: `[B, 3, S, S]`.
            text_ids_BL: Token ids with mask tokens in them.
            text_mask_BL: 1 where a token is, 0 at padding.
            chosen_BL: bool.
        """
        text, image = self.model.encode_text(text_ids_BL, text_mask_BL), self.model.encode_image(pixels)
        fused = self.model.fuse(text, image, text_mask_BL)
        logits: Tensor = self.mlm_score(fused.text_feats[chosen_BL])
        return logits

    def score(self, metrics: dict[str, float]) -> float:
        """Sum of the accuracies, as the published code chooses its checkpoints."""
        return sum(metrics[f"{name}_accuracy"] for name in self.loss_weights)

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        tokens = self.text_tokens(text_len)
        false_images = 0.5 if self.has_itm and self.objectives.itm_negatives == "dataset" else 0.0
        pairs = len(self.loss_weights)
        masked = self.objectives.mlm_probability * tokens if self.has_mlm else 0.0
        pooled = 1.0 if self.has_itm else None
        return 3 * forward_flops(self.model.config, tokens, pairs, 1 + false_images, masked, pooled=pooled)
