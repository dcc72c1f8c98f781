"""Masked language modelling. Shapes: B batch, L tokens, M labelled positions, D hidden, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def gather_labelled(
    feats_BLD: Tensor, labels_BL: Tensor, positions_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Features and labels of the labelled positions, so that the vocabulary head runs on them alone.

    Args:
        feats_BLD: Final text features.
        labels_BL: int64 token ids, -100 where there is nothing to predict.
        positions_M: int64, where labels are in the flattened `[B * L]`. None: they are looked for here; on a GPU
            the host then waits for their number.

    Returns:
        `[M, D]` and `[M]`.
    """
    if positions_M is None:
        positions_M = (labels_BL.flatten() != IGNORED).nonzero()[:, 0]
    return feats_BLD.flatten(0, 1).index_select(0, positions_M), labels_BL.flatten()[positions_M]


def mlm_loss(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled positions, in fp32.

    Without any position it is exactly 0 and still attached to the graph: the published code returns NaN
    there, and a loss without graph would leave a rank out of the gradient exchange.
    """
    if labels_M.numel() == 0:
        return logits_MV.float().sum()
    return F.cross_entropy(logits_MV.float(), labels_M)
