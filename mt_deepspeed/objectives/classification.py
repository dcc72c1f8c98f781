"""Losses of the classification tasks. Shapes: B batch, A answers, C classes."""

import torch.nn.functional as F
from torch import Tensor


def vqa_loss(logits_BA: Tensor, targets_BA: Tensor) -> Tensor:
    """Binary cross-entropy against soft answer scores: mean over the batch, sum over the answers."""
    mean = F.binary_cross_entropy_with_logits(logits_BA.float(), targets_BA.float())
    return mean * targets_BA.shape[1]


def class_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy (such as NLVR2: 2 classes, SNLI-VE: 3), in fp32; 0 for an empty batch."""
    if labels_B.numel() == 0:
        return logits_BC.float().sum()
    return F.cross_entropy(logits_BC.float(), labels_B)


def score_loss(predicted_B: Tensor, scores_B: Tensor) -> Tensor:
    """Mean squared error (STS-B), in fp32; 0 for an empty batch."""
    if scores_B.numel() == 0:
        return predicted_B.float().sum()
    return F.mse_loss(predicted_B.float(), scores_B.float())
