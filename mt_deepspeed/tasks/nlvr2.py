"""Is a statement about two images true? (NLVR2)"""

import torch
from torch import Tensor, nn

from mt_deepspeed.config import RunConfig
from mt_deepspeed.models.managers import Record
from mt_deepspeed.tasks.classification import Batch, PairClassificationTask, classifier_heads


class Nlvr2Task(PairClassificationTask):
    """Each image is fused with the statement; the head reads the features of both pairs, `[B, 4D]`.

    Tokens of the first image carry row 1 of the type table, those of the second row 2. The published code
    encodes the statement once for each image (with other dropout in training); here it is encoded once.
    """

    head_name, loss_name = "nlvr2_classifier", "nlvr2"
    labels = ("false", "true")
    num_images = 2

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, classifier_heads(config, nlvr2=True))
        self.dropout = nn.Dropout(config.classifier.dropout)

    def features(self, batch: Batch, record: Record | None = None) -> Tensor:
        """`pixels` holds the B first images, then the B second ones."""
        mask_BL = batch["text_mask"]
        self._text_len = mask_BL.shape[1]
        rows = len(mask_BL)
        text = self.model.text_experts(self.model.encode_text(batch["text_ids"], mask_BL))
        states = self.model.encode_image(batch["pixels"])
        first = self.model.image_experts([state[:rows] for state in states], token_type=1)
        second = self.model.image_experts([state[rows:] for state in states], token_type=2)
        fused = self.model.fuse_experts(
            [expert.repeat(2, 1, 1) for expert in text],
            [torch.cat(both) for both in zip(first, second, strict=True)],
            mask_BL.repeat(2, 1),
            record,
            pooled_from=0,
        )
        features: Tensor = self.dropout(torch.cat([fused.cls_feats[:rows], fused.cls_feats[rows:]], dim=-1))
        return features

    def fake_labels(self, samples: int) -> Batch:
        """True or not."""
        return {"labels": torch.randint(2, (samples,))}
