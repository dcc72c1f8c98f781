"""Matrices of a task that are worth a picture."""

import torch
from torch import Tensor


def manager_weights(record: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Mean weight of each managed uni-modal layer in each cross-modal layer.

    Args:
        record: Intermediates of `TwoTowerModel.fuse_experts`.
        num_layers: Cross-modal layers.

    Returns:
        `text` and `image`: float32 `[num_layers, N]` on the CPU, averaged over channels, tokens and rows.
    """
    tables = {}
    for modality in ("text", "image"):
        rows = []
        for layer in range(num_layers):
            weights = record[f"manager.{modality}.{layer}.weights"].float()
            # Static managers: [N, D]; adaptive ones: [B, L, N].
            rows.append(weights.mean(dim=-1) if weights.dim() == 2 else weights.mean(dim=(0, 1)))
        tables[modality] = torch.stack(rows).cpu()
    return tables
