"""Image-text retrieval: contrastive loss, and matching against hard negatives (as ALBEF, arXiv 2107.07651).

Shapes: B samples of the micro-batch, G samples of all ranks, L text tokens, P image tokens, N layers, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.config.model import HeadsConfig
from mt_deepspeed.evaluation.sums import Report, pair
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.models.heads import ContrastiveHead, LinearHead
from mt_deepspeed.models.managers import Record
from mt_deepspeed.objectives.classification import cross_entropy
from mt_deepspeed.objectives.contrastive import ContrastiveResult, contrastive_loss
from mt_deepspeed.objectives.hard_negatives import draw_negatives, negative_weights
from mt_deepspeed.tasks.base import Batch, TwoTowerTask
from mt_deepspeed.tasks.noise import noise_batch


@dataclass(frozen=True)
class Ranks:
    """This rank among those that train together.

    Attributes:
        rank: This rank.
        gather: `[B, ...]` of every rank, equal shapes -> `[G, ...]` in rank order, with gradient.
    """

    rank: int
    gather: Callable[[Tensor], Tensor]


ALONE = Ranks(0, lambda rows: rows)


class RetrievalTask(TwoTowerTask):
    """ITC over all ranks, and ITM of each pair, of each text with a hard negative image, and of each image with one.

    Negatives are drawn by contrastive similarity from the micro-batches of all ranks, or of the own one
    (`retrieval.negatives`); their states carry gradients back to the rank they come from. Texts of one image
    are positives of each other's.
    """

    itm_score: LinearHead
    cross_modal_itc_text_head: ContrastiveHead
    cross_modal_itc_image_head: ContrastiveHead
    temperature: nn.Parameter

    def __init__(self, config: RunConfig, ranks: Ranks = ALONE) -> None:
        own = config.retrieval
        heads = HeadsConfig(itm=True, itc_size=own.itc_size, itc_temperature=own.itc_temperature)
        super().__init__(config.model, heads)
        self.config, self.ranks = own, ranks
        self.loss_weights = {"itc": 1.0, "itm": 1.0}

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Report]:
        """Losses of one micro-batch: `pixels [B,3,S,S]`, `text_ids`, `text_mask [B,L]`, `image_ids [B]`.

        L must be the same on all ranks.
        """
        return self._losses(batch, self.ranks, drawn=True)

    def _losses(
        self, batch: Batch, ranks: Ranks, drawn: bool, record: Record | None = None
    ) -> tuple[dict[str, Tensor], Report]:
        """Losses and report; `drawn` False takes the likeliest negative instead of drawing one."""
        mask_BL = batch["text_mask"]
        rows, self._text_len = mask_BL.shape
        texts = self.model.encode_text(batch["text_ids"], mask_BL)
        images = self.model.encode_image(batch["pixels"])
        contrast = contrastive_loss(
            self.cross_modal_itc_text_head(texts[-1][:, 0]),
            self.cross_modal_itc_image_head(images[-1][:, 0]),
            self.temperature,
            batch["image_ids"],
            ranks.gather,
            ranks.rank * rows,
        )
        own = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
        if self.config.negatives == "local":
            ranks, columns = ALONE, own
        else:
            columns = slice(None)
        image_B, image_label_B = _negatives(contrast.logits_t2i, contrast.positives, columns, drawn)
        text_B, text_label_B = _negatives(contrast.logits_i2t, contrast.positives, columns, drawn)
        # The own rows come first, as they are: only negatives pass through the exchange.
        text_BNLD = torch.stack(self.model.text_experts(texts), dim=1)
        image_BNPD = torch.stack(self.model.image_experts(images), dim=1)
        text = torch.cat([text_BNLD, text_BNLD, ranks.gather(text_BNLD)[text_B]])
        image = torch.cat([image_BNPD, ranks.gather(image_BNPD)[image_B], image_BNPD])
        mask = torch.cat([mask_BL, mask_BL, ranks.gather(mask_BL)[text_B]])
        fused = self.model.fuse_experts(
            list(text.unbind(1)),
            list(image.unbind(1)),
            mask,
            record,
            pooled_from=0,
        )
        logits = self.itm_score(fused.cls_feats)
        labels = torch.cat([torch.ones_like(image_label_B), image_label_B, text_label_B])
        report = {
            "itm_accuracy": pair((logits.argmax(dim=-1) == labels).sum(), len(labels)),
            "itc_accuracy": pair(_right(contrast), 2 * rows),
        }
        return {"itc": contrast.loss, "itm": cross_entropy(logits, labels)}, report

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Pairs of one micro-batch."""
        rows = torch.tensor(len(batch["sample_ids"]), device=batch["sample_ids"].device)
        return {"itc": rows, "itm": 3 * rows}

    def fake_batch(self, samples: int, text_len: int) -> Batch:
        """See `PretrainTask.fake_batch`."""
        batch = noise_batch(self.model.config, samples, text_len, samples)
        return batch | {"image_ids": torch.arange(samples)}

    def eval_step(self, batch: Batch) -> Report:
        """(sum, count) of losses and accuracies within one evaluation batch; recall is measured apart.

        Negatives are the likeliest ones, so that nothing is left to chance; the figures depend on the batch size.
        """
        with self._gallery.watch(self.model, batch["pixels"], batch["text_mask"]) as record:
            losses, report = self._losses(batch, ALONE, drawn=False, record=record)
        return report | self.loss_sums(losses, batch)

    def score(self, metrics: dict[str, float]) -> float:
        """Accuracy against hard negatives plus accuracy within the batch."""
        return metrics["itm_accuracy"] + metrics["itc_accuracy"]

    def flops_per_sample(self, text_len: int | None = None) -> float:
        """Floating-point operations of forward and backward per sample, at the last batch's or a given text length."""
        tokens = self.text_tokens(text_len)
        return 3 * forward_flops(
            self.model.config, tokens, pairs=3, images=1, masked_tokens=0, texts=1, pooled=3
        )


def match_scores(task: Any, cls_feats: Tensor) -> Tensor:
    """How well text and image of each pair fit, `[B]`: the matching logit, or the false-text objective's score.

    Args:
        task: Anything with the head `rank_output` or `itm_score`: a retrieval task, or pre-training with ITM.
        cls_feats: `[B, 2D]` of the fused pairs.
    """
    if hasattr(task, "rank_output"):
        score: Tensor = task.rank_output(cls_feats)[:, 0]
    else:
        score = task.itm_score(cls_feats)[:, 1]
    return score


def _negatives(logits_BG: Tensor, positives_BG: Tensor, columns: slice, drawn: bool) -> tuple[Tensor, Tensor]:
    """One column (of `columns`) that does not match for each row, and its label, `[B]` each.

    The label is 0, and 1 where no column is a negative (a tiny batch of one image's texts): such a pair
    counts as the match it is.
    """
    weights = negative_weights(logits_BG, positives_BG)[:, columns]
    positives = positives_BG[:, columns]
    if drawn:
        chosen_B = draw_negatives(weights, positives)
    else:
        chosen_B = weights.masked_fill(positives, -1.0).argmax(dim=1)
    return chosen_B, positives.gather(1, chosen_B[:, None])[:, 0].long()


def _right(contrast: ContrastiveResult) -> Tensor:
    """Rows, of both directions, whose likeliest column matches."""
    both = (contrast.logits_i2t, contrast.logits_t2i)
    return sum(
        (contrast.positives.gather(1, logits.argmax(dim=1, keepdim=True)).sum() for logits in both),
        start=torch.zeros((), device=both[0].device),
    )
