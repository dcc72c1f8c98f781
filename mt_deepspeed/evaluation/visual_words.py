"""Does the model look? Masked words that only the picture can tell, with the right, a wrong and no picture.

A model that guesses from text alone scores the same under all three conditions.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mt_deepspeed.evaluation.sums import Report, pair

GREY = (123, 117, 104)
"""The mean colour of the pictures CLIP was trained on: a picture that shows nothing."""

Fill = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(pixels [B,3,S,S], text_ids [B,L], text_mask [B,L], rows-and-columns mask [B,L] bool) -> logits [masked, V]."""


def mask_one_visual_word(
    text_ids_BL: Tensor, class_of_token: Mapping[int, str], mask_id: int, seeds_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Masks one visual word in each row that has any.

    Args:
        text_ids_BL: int64 token ids.
        class_of_token: Token id -> class name ("colour", ...) of every one-token visual word.
        mask_id: Id of the mask token.
        seeds_B: int64, one per row: which word is masked depends on it and on the row's text alone.

    Returns:
        The masked ids [B, L] and a bool mask [B, L] with at most one True per row.
    """
    ids = text_ids_BL.clone()
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, seed) in enumerate(zip(text_ids_BL.tolist(), seeds_B.tolist(), strict=True)):
        places = [column for column, token in enumerate(tokens) if token in class_of_token]
        if places:
            column = places[int(np.random.default_rng([abs(seed), 0x57]).integers(len(places)))]
            chosen[row, column] = True
    ids[chosen] = mask_id
    return ids, chosen


def visual_word_report(
    fill: Fill, batch: Mapping[str, Tensor], class_of_token: Mapping[int, str], mask_id: int
) -> Report:
    """Top-1 accuracy at one masked visual word per caption.

    Args:
        fill: The model: logits [masked, V] at the masked places, row by row.
        batch: `pixels [B,3,S,S]` uint8, `text_ids`, `text_mask` [B, L], `sample_ids` [B].
        class_of_token: See `mask_one_visual_word`.
        mask_id: See `mask_one_visual_word`.

    Returns:
        `visual_<condition>` over all words and `visual_<condition>/<class>`; the shuffled condition
        pairs rows of the same batch
        and counts those whose picture really changed.
    """
    text_ids, text_mask = batch["text_ids"], batch["text_mask"]
    pixels = batch["pixels"][: len(text_ids)]
    ids, chosen = mask_one_visual_word(text_ids, class_of_token, mask_id, batch["sample_ids"])
    rows = chosen.nonzero()[:, 0]
    targets = text_ids[chosen]
    # Captions of one picture stand next to each other: half a batch away is another picture.
    shuffled = pixels.roll(max(1, len(pixels) // 2), dims=0)
    changed = (shuffled != pixels).flatten(1).any(dim=1)[rows]
    grey = pixels.new_tensor(GREY).view(3, 1, 1).expand_as(pixels)
    everywhere = torch.ones_like(changed)
    report: Report = {}
    for condition, images, counted in (
        ("right_image", pixels, everywhere),
        ("shuffled_images", shuffled, changed),
        ("no_image", grey, everywhere),
    ):
        right = (fill(images, ids, text_mask, chosen).argmax(dim=-1) == targets) & counted
        report[f"visual_{condition}"] = pair(right.sum(), counted.sum())
        for name in sorted(set(class_of_token.values())):
            of_class = torch.tensor(
                [class_of_token[token] == name for token in targets.tolist()],
                dtype=torch.bool,
                device=counted.device,
            )
            report[f"visual_{condition}/{name}"] = pair((right & of_class).sum(), (counted & of_class).sum())
    return report


def majority_share(asked: Mapping[int, int], class_of_token: Mapping[int, str]) -> float:
    """Accuracy of always answering the commonest word of the right class: what guessing from text alone gives.

    Args:
        asked: Token id -> how often it was asked for.
        class_of_token: Token id -> class.
    """
    total = sum(asked.values())
    if total == 0:
        return float("nan")
    best: dict[str, int] = {}
    for token, count in asked.items():
        name = class_of_token[token]
        best[name] = max(best.get(name, 0), count)
    return sum(best.values()) / total
