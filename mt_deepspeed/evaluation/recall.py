"""Recall of retrieval: is a matching item among the k best? Shapes: I images, T texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

KS = (1, 5, 10)


def match_ranks(scores_QC: Tensor, matches_QC: Tensor) -> Tensor:
    """How many wrong candidates stand before the best right one of each query, `[Q]`.

    Wrong candidates with an equal score count as standing before it, so the order of the candidates cannot
    change the result, and a model that gives every pair the same score finds nothing.

    Args:
        scores_QC: Higher is better.
        matches_QC: bool.
    """
    best_Q1 = scores_QC.masked_fill(~matches_QC, -torch.inf).max(dim=1, keepdim=True).values
    return ((scores_QC >= best_Q1) & ~matches_QC).sum(dim=1)


def recall(scores_IT: Tensor, image_of_text_T: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall in both directions from the scores of all pairs.

    Args:
        scores_IT: Row i belongs to image i.
        image_of_text_T: Row of each text's image; every image has a text.
        ks: Cuts.

    Returns:
        `tr@k` (image to text), `ir@k` (text to image), from 0 to 1, their means `tr_mean` and `ir_mean`, and
        `r_mean`, the mean of both.

    Raises:
        ValueError: An image without text.
    """
    images = torch.arange(len(scores_IT), device=scores_IT.device)
    matches_IT = images[:, None] == image_of_text_T[None]
    if not bool(matches_IT.any(dim=1).all()):
        row = int((~matches_IT.any(dim=1)).nonzero()[0])
        raise ValueError(f"recall: image {row} has no text")
    found: dict[str, float] = {}
    for name, scores, matches in (("tr", scores_IT, matches_IT), ("ir", scores_IT.T, matches_IT.T)):
        ranks = match_ranks(scores, matches)
        shares = {f"{name}@{k}": float((ranks < k).double().mean()) for k in ks}
        found |= {**shares, f"{name}_mean": sum(shares.values()) / len(shares)}
    found["r_mean"] = (found["tr_mean"] + found["ir_mean"]) / 2
    return found
