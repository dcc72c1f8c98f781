"""What `mt_deepspeed.show` draws: held-out captions with masked words, and the managers' weights over pairs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_deepspeed.data.images import decode_image, to_picture
from mt_deepspeed.data.shards import CaptionDataset
from mt_deepspeed.pretrained.model import Guess, Pretrained
from mt_deepspeed.pretrained.processor import Picture
from mt_deepspeed.tasks.heatmaps import manager_weights


@dataclass(frozen=True)
class Filled:
    """One picture whose caption had words masked."""

    picture: Image.Image
    text: str
    """The caption with `<mask>` in it."""
    answers: tuple[str, ...]
    """The masked words."""
    guesses: list[list[Guess]]
    """For each mask the likeliest words, best first."""

    def __str__(self) -> str:
        lines = [self.text]
        for i, (row, answer) in enumerate(zip(self.guesses, self.answers, strict=True)):
            shown = ", ".join(f"{guess.text} {guess.probability:.2f}" for guess in row)
            lines.append(f"    mask {i + 1}: {shown}   (answer: {answer})")
        return "\n".join(lines)


def held_out(shards: Path, split: str, num: int) -> list[tuple[Picture, str]]:
    """Up to `num` pictures with a caption each, spread over the split.

    Raises:
        ValueError: No such shards, or no such split.
    """
    dataset = CaptionDataset(shards, [split])
    pairs: list[tuple[Picture, str]] = []
    for picture, caption in _spread(dataset, num):
        pairs.append((picture, caption))
        if len(pairs) == num:
            break
    return pairs


def fill_held_out(
    pretrained: Pretrained, shards: Path, split: str, num: int, visual_words: Path, top: int
) -> list[Filled]:
    """Masks up to two visual words in captions of `num` pictures, spread over the split, and fills them.

    Raises:
        ValueError: No caption has such a word.
    """
    words = {word for group in json.loads(visual_words.read_text("utf-8")).values() for word in group}
    filled: list[Filled] = []
    for picture, caption in _spread(CaptionDataset(shards, [split]), 8 * num):
        text, answers = mask_words(caption, words, at_most=2)
        if answers:
            filled.append(Filled(picture, text, answers, pretrained.fill_mask(picture, text, top)))
        if len(filled) == num:
            return filled
    if not filled:
        raise ValueError(f"{shards}: no caption of split {split} holds any of the visual words")
    return filled


def _spread(dataset: CaptionDataset, num: int) -> Iterator[tuple[Image.Image, str]]:
    seen: set[int] = set()
    for index in np.linspace(0, dataset.num_pairs - 1, num=min(dataset.num_pairs, num)).astype(int).tolist():
        pair = dataset.pair(index)
        if pair.row not in seen:
            seen.add(pair.row)
            yield to_picture(decode_image(dataset.image(pair.row).data)), pair.caption


def mask_words(caption: str, words: set[str], at_most: int) -> tuple[str, tuple[str, ...]]:
    """Replaces up to `at_most` of `words` in a caption, the last ones first, by `<mask>`."""
    parts = caption.split()
    places = [i for i, part in enumerate(parts) if part.strip(".,") in words][-at_most:]
    answers = tuple(parts[i].strip(".,") for i in places)
    return " ".join("<mask>" if i in places else part for i, part in enumerate(parts)), answers


@torch.no_grad()
def manager_tables(pretrained: Pretrained, pairs: Sequence[tuple[Picture, str]]) -> dict[str, Tensor]:
    """The managers' mean weights over pairs, `text` and `image` `[cross-modal layer, N]`; empty for bridges."""
    if not pretrained.config.model.has_managers:
        return {}
    model = pretrained.task.model
    totals: dict[str, Tensor] = {}
    for picture, text in pairs:
        ids, mask = pretrained.tokens([text])
        record: dict[str, Tensor] = {}
        image = model.encode_image(pretrained.pixels([picture]))
        model.fuse(model.encode_text(ids, mask), image, mask, record=record)
        for key, rows in manager_weights(record, model.config.cross_modal.num_layers).items():
            totals[key] = totals.get(key, torch.zeros_like(rows)) + rows / len(pairs)
    return totals


def seen_picture(pretrained: Pretrained, image: Picture) -> Image.Image:
    """The picture as the model sees it: resized and cut."""
    return to_picture(pretrained.processor.pixels([image])[0])
