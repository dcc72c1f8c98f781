"""Hard negatives drawn by contrastive similarity (as ALBEF, arXiv 2107.07651). Shapes: B rows, G columns."""

import torch
from torch import Tensor


@torch.no_grad()
def negative_weights(logits_BG: Tensor, positives_BG: Tensor) -> Tensor:
    """Unnormalised sampling weights: softmax over columns with the row's positives set to 0.

    Args:
        logits_BG: Similarities divided by the temperature.
        positives_BG: bool, columns that match the row.
    """
    return logits_BG.float().softmax(dim=1).masked_fill(positives_BG, 0.0)


@torch.no_grad()
def draw_negatives(weights_BG: Tensor, positives_BG: Tensor) -> Tensor:
    """One negative column per row.

    Rows whose weights all vanish, or are not numbers, draw uniformly from their negatives; the published code
    adds 1e-5 to every column there, which may draw a positive. A row without a negative draws any column.

    Returns:
        int64 `[B]`.
    """
    negatives = ~positives_BG | positives_BG.all(dim=1, keepdim=True)
    empty = ~(
        weights_BG.sum(dim=1, keepdim=True) > 0
    )  # also nan: the loss will tell, and the step is skipped
    weights = torch.where(empty, negatives.to(weights_BG.dtype), weights_BG)
    return torch.multinomial(weights, 1)[:, 0]
