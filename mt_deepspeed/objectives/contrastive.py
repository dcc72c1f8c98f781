"""Image-text contrastive losses. Shapes: B local rows, G rows of all ranks, D embedding."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True)
class ContrastiveResult:
    """Loss and what hard-negative mining needs of it."""

    loss: Tensor
    """Mean of both directions."""
    logits_i2t: Tensor
    """`[B, G]`: local images against all texts."""
    logits_t2i: Tensor
    """`[B, G]`: local texts against all images."""
    positives: Tensor
    """bool `[B, G]`: columns that match the row."""


def _identity(x: Tensor) -> Tensor:
    return x


def contrastive_loss(
    text_BD: Tensor,
    image_BD: Tensor,
    temperature: Tensor,
    image_ids_B: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] = _identity,
    first_row: int = 0,
) -> ContrastiveResult:
    """Contrasts every local text and image with those of all ranks.

    Args:
        text_BD: Unit-length text embeddings.
        image_BD: Unit-length image embeddings.
        temperature: `[1]`; its value is taken as clamped to [0.001, 0.5], its gradient is not cut.
        image_ids_B: int64; columns of the same image share the target evenly. None: only the row's own column
            is a positive.
        gather: Concatenates rows of all ranks in rank order, with gradient.
        first_row: Row of the gathered tensors at which the local rows begin.
    """
    clamped = temperature + (temperature.clamp(*TEMPERATURE_RANGE) - temperature).detach()
    all_texts, all_images = gather(text_BD), gather(image_BD)
    logits_i2t = (image_BD @ all_texts.T).float() / clamped.float()
    logits_t2i = (text_BD @ all_images.T).float() / clamped.float()
    if image_ids_B is None:
        rows = torch.arange(first_row, first_row + text_BD.shape[0], device=text_BD.device)
        positives = rows[:, None] == torch.arange(all_texts.shape[0], device=text_BD.device)
    else:
        positives = image_ids_B[:, None] == gather(image_ids_B)
    targets = positives.float() / positives.sum(dim=1, keepdim=True)
    loss = (F.cross_entropy(logits_i2t, targets) + F.cross_entropy(logits_t2i, targets)) / 2
    return ContrastiveResult(loss, logits_i2t, logits_t2i, positives)


def three_way_contrastive_loss(
    text_BD: Tensor,
    image_BD: Tensor,
    fused_BD: Tensor,
    logit_scale: Tensor,
    gather: Callable[[Tensor], Tensor] = _identity,
    first_row: int = 0,
) -> Tensor:
    """Contrastive loss of the Hugging Face port of BridgeTower.

    Mean of text-image, text-fused and image-fused cross-entropies, each in one direction; similarities are
    multiplied by `exp(logit_scale)`. Embeddings have unit length; `logit_scale` is `[1]`; `gather` and `first_row`
    as in `contrastive_loss`.
    """
    labels = torch.arange(first_row, first_row + text_BD.shape[0], device=text_BD.device)
    all_images, all_fused = gather(image_BD), gather(fused_BD)
    pairs = ((text_BD, all_images), (text_BD, all_fused), (image_BD, all_fused))
    losses = [F.cross_entropy((a @ b.T).float() * logit_scale.exp().float(), labels) for a, b in pairs]
    return torch.stack(losses).mean()
