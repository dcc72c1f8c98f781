"""Recall of retrieval: is a matching item among the k best? Shapes: R images of this rank, T texts.

Every rank holds the scores of its own images with all texts; the whole matrix is never in one place.
"""

from collections.abc import Callable

import torch
from torch import Tensor

KS = (1, 5, 10)
"""Cuts."""
NOT_SCORED = -torch.inf
"""Score of a pair that was left out: it is found by no k."""

Reduce = Callable[[Tensor], Tensor]


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def match_ranks(scores_QC: Tensor, matches_QC: Tensor) -> Tensor:
    """How many wrong candidates stand before the best right one of each query, `[Q]`.

    Wrong candidates with an equal score count as standing before it, so the order of the candidates cannot
    change the result, and a model that gives every pair the same score finds nothing.

    Args:
        scores_QC: Higher is better.
        matches_QC: bool.
    """
    best_Q1 = scores_QC.masked_fill(~matches_QC, NOT_SCORED).max(dim=1, keepdim=True).values
    before_Q = ((scores_QC >= best_Q1) & ~matches_QC).sum(dim=1)
    return _unless_missing(before_Q, best_Q1[:, 0])


def _unless_missing(before: Tensor, best: Tensor) -> Tensor:
    return before.masked_fill(best == NOT_SCORED, torch.iinfo(torch.int64).max)


def recall(
    scores_RT: Tensor,
    image_of_text_T: Tensor,
    image_of_row_R: Tensor | None = None,
    total: Reduce = _alone,
    largest: Reduce = _alone,
) -> dict[str, float]:
    """Recall in both directions from the scores of all pairs.

    Args:
        scores_RT: This rank's rows, `NOT_SCORED` where a pair was left out.
        image_of_text_T: Number of each text's image; every image has a text.
        image_of_row_R: Number of each row's image; every image is a row of one rank. None: 0, 1, ...
        total: Adds up a tensor over the ranks.
        largest: The element-wise maximum over the ranks.

    Returns:
        `tr@k` (image to text), `ir@k` (text to image), from 0 to 1, their means `tr_mean` and `ir_mean`, and
        `r_mean`, the mean of both; the same on all ranks.

    Raises:
        ValueError: An image without text.
    """
    rows_R = torch.arange(len(scores_RT)) if image_of_row_R is None else image_of_row_R
    matches_RT = rows_R[:, None] == image_of_text_T[None]
    if not bool(matches_RT.any(dim=1).all()):
        row = int((~matches_RT.any(dim=1)).nonzero()[0])
        raise ValueError(f"recall: image {int(rows_R[row])} has no text")
    image_ranks_R = match_ranks(scores_RT, matches_RT)
    # A text's own image is one rank's: the others learn its score first, then all count what stands before it.
    none = torch.full((1, scores_RT.shape[1]), NOT_SCORED)
    own_T = torch.cat([scores_RT.masked_fill(~matches_RT, NOT_SCORED), none]).max(dim=0).values
    own_T = largest(own_T)
    text_ranks_T = _unless_missing(total(((scores_RT >= own_T) & ~matches_RT).sum(dim=0)), own_T)
    num_images = int(total(torch.tensor(len(scores_RT))))
    found: dict[str, float] = {}
    for name, ranks, count in (("tr", image_ranks_R, num_images), ("ir", text_ranks_T, len(text_ranks_T))):
        hits = torch.stack([(ranks < k).sum() for k in KS])
        if name == "tr":
            hits = total(hits)
        shares = {f"{name}@{k}": int(hit) / count for k, hit in zip(KS, hits, strict=True)}
        found |= {**shares, f"{name}_mean": sum(shares.values()) / len(shares)}
    found["r_mean"] = (found["tr_mean"] + found["ir_mean"]) / 2
    return found
