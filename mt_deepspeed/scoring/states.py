"""Tower states of the images and texts of a retrieval evaluation: each item passes its tower once.

Shapes: U different texts, L text tokens, P image tokens, N experts, D width, E contrastive embedding.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.collate import tokens_and_mask
from mt_deepspeed.data.retrieval_items import RetrievalItems
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import DTYPES, autocast
from mt_deepspeed.scoring.state_cache import StateCache

log = logging.getLogger("mt_deepspeed")


@dataclasses.dataclass(frozen=True)
class States:
    """What a rank needs to score pairs.

    Attributes:
        texts: Experts of the different texts, shortest text first.
        text_masks: `[U, longest]`, 1 at tokens; only where padding tokens have states of their own.
        text_of: `[T]`, which of the different texts each text is.
        images: Experts of this rank's images, in the order they were asked for.
        text_features: `[U, E]` float32 contrastive embeddings; None unless asked for.
        image_features: `[images, E]` of the images asked for.
    """

    texts: StateCache
    text_masks: Tensor | None
    text_of: Tensor
    images: StateCache
    text_features: Tensor | None
    image_features: Tensor | None

    def padded_texts(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Experts `[B, L, N, D]` and mask `[B, L]` of some of the different texts."""
        experts, mask = self.texts.padded(chosen)
        return experts, mask if self.text_masks is None else self.text_masks[torch.tensor(chosen)]


def encode(
    task: Any,
    config: RunConfig,
    items: RetrievalItems,
    images: Sequence[Sequence[int]],
    kept: Sequence[bool],
    place: Place,
    cache_gib: float,
    features: bool,
) -> States:
    """Runs both towers.

    Args:
        task: Model and heads, on `place.device`.
        config: Precision, batch size and text length are read.
        items: Images and texts.
        images: Blocks of images, each a few.
        kept: For each block, whether its states are needed, or only its features.
        place: This rank.
        cache_gib: States above this many GiB go to a file in the folder for temporary files.
        features: Also return the contrastive embeddings.
    """
    model = task.model.config
    dtype = DTYPES[config.train.precision] or torch.float32
    texts, text_of = different_texts(items.tokens)
    fixed = config.data.max_text_len if model.managers_read_padding else None
    lengths = [fixed or len(ids) for ids in texts]
    side = model.vision.image_size // model.vision.patch_size
    rows = [row for block, keep in zip(images, kept, strict=True) for row in block if keep]
    image_lengths = [side * side + 1] * len(rows)
    size = model.cross_modal.hidden_size
    text_shape, image_shape = (model.num_text_states, size), (model.num_image_states, size)
    left = int(cache_gib * 2**30)
    caches = []
    for name, counts, shape in (("text", lengths, text_shape), ("image", image_lengths, image_shape)):
        needed = StateCache.bytes_needed(counts, shape, dtype)
        folder = None if needed <= left else Path(tempfile.gettempdir())
        left -= needed if folder is None else 0
        log.info(
            "retrieval: %d %ss, %.2f GiB of states %s",
            len(counts),
            name,
            needed / 2**30,
            "in memory" if folder is None else f"in a file in {folder}",
        )
        caches.append(StateCache(counts, shape, dtype, folder))
    text_cache, image_cache = caches
    with torch.no_grad(), autocast(config.train.precision, place.device):
        text_features = _encode_texts(task, config, texts, items.pad_id, fixed, text_cache, place, features)
        image_features = _encode_images(task, items, images, kept, image_cache, place, features)
    masks = None
    if fixed is not None:
        masks = (torch.arange(fixed) < torch.tensor([len(ids) for ids in texts])[:, None]).long()
    return States(text_cache, masks, text_of, image_cache, text_features, image_features)


def different_texts(tokens: Sequence[np.ndarray[Any, Any]]) -> tuple[list[np.ndarray[Any, Any]], Tensor]:
    """The different token sequences, shortest first, and which of them each text is.

    Equal texts then have equal scores to the last bit, whatever stands beside them in a batch.
    """
    keys = [(len(ids), ids.tobytes()) for ids in tokens]
    order = sorted(set(keys))
    place_of = {key: place for place, key in enumerate(order)}
    found = [np.frombuffer(key[1], dtype=tokens[0].dtype).copy() for key in order]
    return found, torch.tensor([place_of[key] for key in keys])


def _encode_texts(
    task: Any,
    config: RunConfig,
    texts: Sequence[np.ndarray[Any, Any]],
    pad_id: int,
    fixed: int | None,
    cache: StateCache,
    place: Place,
    features: bool,
) -> Tensor | None:
    found = []
    for chosen in batches(range(len(texts)), config.train.micro_batch_size):
        length = fixed or len(texts[chosen[-1]])
        ids, mask = tokens_and_mask([texts[text] for text in chosen], length, pad_id)
        states = task.model.encode_text(ids.to(place.device), mask.to(place.device))
        experts = torch.stack(task.model.text_experts(states), dim=2).cpu()
        for row, text in enumerate(chosen):
            cache.put(text, experts[row, : cache.lengths[text]])
        if features:
            found.append(task.cross_modal_itc_text_head(states[-1][:, 0]).float().cpu())
    return torch.cat(found) if features else None


def _encode_images(
    task: Any,
    items: RetrievalItems,
    images: Sequence[Sequence[int]],
    kept: Sequence[bool],
    cache: StateCache,
    place: Place,
    features: bool,
) -> Tensor | None:
    wanted = [i for i, keep in enumerate(kept) if keep or features]
    found, row = [], 0
    for i, pixels in zip(wanted, items.pixels([images[i] for i in wanted]), strict=True):
        states = task.model.encode_image(pixels.to(place.device))
        if features:
            found.append(task.cross_modal_itc_image_head(states[-1][:, 0]).float().cpu())
        if kept[i]:
            for experts in torch.stack(task.model.image_experts(states), dim=2).cpu():
                cache.put(row, experts)
                row += 1
    if not features:
        return None
    return torch.cat(found) if found else torch.zeros(0, task.cross_modal_itc_image_head.fc.out_features)


def not_numbers(what: str) -> ValueError:
    """The error of values that no ranking can be made of."""
    return ValueError(
        f"{what} are not numbers: the model's weights are damaged, or they overflow; try --precision fp32"
    )


def batches(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive parts of at most `size`."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))
