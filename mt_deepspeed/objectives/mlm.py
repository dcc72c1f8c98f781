"""Masked language modelling. Shapes: B batch, L tokens, M labelled positions, D hidden."""

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
