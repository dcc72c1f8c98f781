"""Losses of answers among many. Shapes: B batch, A answers, C classes, n false texts."""

import torch
import torch.nn.functional as F
from torch import Tensor


def vqa_loss(logits_BA: Tensor, targets_BA: Tensor) -> Tensor:
    """Binary cross-entropy against soft answer scores: mean over the batch, sum over the answers."""
    mean = F.binary_cross_entropy_with_logits(logits_BA.float(), targets_BA.float())
    return mean * targets_BA.shape[1]


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy in fp32: of a task's classes, of matched pairs (1) against others (0), of masked words.

    Without any label it is exactly 0 and still attached to the graph: the published code returns NaN
    there, and a loss without graph would leave a rank out of the gradient exchange.
    """
    if labels_B.numel() == 0:
        return logits_BC.float().sum()
    return F.cross_entropy(logits_BC.float(), labels_B)


def score_loss(predicted_B: Tensor, scores_B: Tensor) -> Tensor:
    """Mean squared error (STS-B), in fp32; 0 for an empty batch."""
    if scores_B.numel() == 0:
        return predicted_B.float().sum()
    return F.mse_loss(predicted_B.float(), scores_B.float())


def false_text_loss(scores: Tensor) -> Tensor:
    """Cross-entropy of each image's own text among its false ones.

    Args:
        scores: `[B, 1 + n]`, own text first.
    """
    return cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64))
