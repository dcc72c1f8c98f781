"""Image-text matching, and retrieval with sampled false texts. Shapes: B batch, n false texts per image."""

import torch.nn.functional as F
from torch import Tensor


def matching_loss(logits_B2: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy of matched (1) against not matched (0), in fp32; 0 for an empty batch."""
    if labels_B.numel() == 0:
        return logits_B2.float().sum()
    return F.cross_entropy(logits_B2.float(), labels_B)


def false_text_loss(scores: Tensor) -> Tensor:
    """Cross-entropy of each image's own text among its false ones.

    Args:
        scores: `[B, 1 + n]`, own text first.
    """
    return F.cross_entropy(scores.float(), scores.new_zeros(scores.shape[0]).long())
