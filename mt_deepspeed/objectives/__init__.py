"""Training objectives: tensors in, losses out. Nothing here knows a model, a rank or a batch layout."""

from mt_deepspeed.objectives.classification import class_loss, vqa_loss
from mt_deepspeed.objectives.contrastive import (
    ContrastiveResult,
    contrastive_loss,
    three_way_contrastive_loss,
)
from mt_deepspeed.objectives.hard_negatives import draw_negatives, negative_weights
from mt_deepspeed.objectives.matching import false_text_loss, matching_loss
from mt_deepspeed.objectives.mlm import gather_labelled, mlm_loss

__all__ = [
    "ContrastiveResult",
    "class_loss",
    "contrastive_loss",
    "draw_negatives",
    "false_text_loss",
    "gather_labelled",
    "matching_loss",
    "mlm_loss",
    "negative_weights",
    "three_way_contrastive_loss",
    "vqa_loss",
]
