"""What of a task is worth a picture: matrices, and pictures with attention over them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_deepspeed.models.cross_modal import watched
from mt_deepspeed.models.managers import Record
from mt_deepspeed.models.two_tower import TwoTowerModel

SHOWN = 4
"""Pictures beside each other."""
SIDE = 160
"""Pixels per side of each."""


class Gallery:
    """Pictures of the first batch evaluated since they were last taken."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    @contextmanager
    def watch(
        self, model: TwoTowerModel, pixels: Tensor, text_mask_BL: Tensor, every: int = 1
    ) -> Iterator[Record | None]:
        """What the forward pass inside is to fill; None, and nothing is watched, once there are pictures.

        Args:
            model: Runs inside.
            pixels: `[B or more, 3, S, S]` uint8, the own pictures of the B texts first.
            text_mask_BL: 1 where a token of these texts is.
            every: Distance of these texts' rows within the pass; they begin at row 0.
        """
        if self._found:
            yield None
            return
        record: Record = {}
        with watched(model.cross_modal_text_layers[-1:]) as attention:
            yield record
        self._found = pictures(model, record, pixels, attention[0][::every], text_mask_BL)

    def take(self) -> dict[str, Tensor]:
        """What is there; the next batch is watched again."""
        found, self._found = self._found, {}
        return found


def pictures(
    model: TwoTowerModel,
    record: dict[str, Tensor],
    pixels: Tensor,
    attention_BHLP: Tensor,
    text_mask_BL: Tensor,
) -> dict[str, Tensor]:
    """`manager_weights/text` and `/image` (as `manager_weights`), and `attention/text_over_image` as a picture."""
    found = {"attention/text_over_image": attention_picture(pixels, attention_BHLP, text_mask_BL)}
    if model.config.has_managers:
        tables = manager_weights(record, model.config.cross_modal.num_layers)
        found |= {f"manager_weights/{modality}": table for modality, table in tables.items()}
    return found


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


def attention_picture(pixels: Tensor, attention_BHLP: Tensor, text_mask_BL: Tensor) -> Tensor:
    """The first pictures of a batch, and below them the same as bright as their patches are looked at.

    Args:
        pixels: `[B, 3, S, S]` uint8.
        attention_BHLP: Attention of B text tokens to the P image tokens, the class token first (left out).
        text_mask_BL: 1 where a token is; the first and the last token of a text do not count.

    Returns:
        `[2 * SIDE, n * SIDE, 3]` uint8 on the CPU, n at most `SHOWN`.
    """
    rows = min(SHOWN, len(text_mask_BL))  # behind the texts' own pictures there may be false ones
    words_BL = text_mask_BL[:rows].clone().float()
    words_BL[:, 0] = 0
    words_BL[torch.arange(rows), text_mask_BL[:rows].sum(dim=1) - 1] = 0
    share_BLP = attention_BHLP[:rows, :, :, 1:].float().mean(dim=1)
    share_BP = (share_BLP * words_BL[:, :, None]).sum(dim=1)
    side = round(share_BP.shape[1] ** 0.5)
    share = share_BP.view(rows, 1, side, side) / share_BP.amax(dim=1).clamp_min(1e-12).view(rows, 1, 1, 1)
    picture = F.interpolate(pixels[:rows].float(), (SIDE, SIDE))
    lit = picture * (0.15 + 0.85 * F.interpolate(share, (SIDE, SIDE)))
    both = torch.cat([torch.cat(list(part), dim=-1) for part in (picture, lit)], dim=-2)
    return both.round().to(torch.uint8).permute(1, 2, 0).cpu()
