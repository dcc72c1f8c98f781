"""Matching scores of image-text pairs from cached tower states, one image with a batch of texts at a time.

Shapes: R images of this rank, U different texts.
"""

import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import DTYPES
from mt_deepspeed.evaluation.recall import NOT_SCORED
from mt_deepspeed.models.pair_fusion import ImageSide, PairFusion, TextSide
from mt_deepspeed.scoring.states import States, batches, not_numbers
from mt_deepspeed.tasks.retrieval import match_scores

log = logging.getLogger("mt_deepspeed")

PROGRESS_EVERY_S = 10.0


class PairScorer:
    """Scores one image with a batch of texts at a time; prepares an image or a batch again only when it changes.

    Args:
        task: Model and heads.
        config: Precision and pairs per pass are read.
        states: Of all images to score, in order, and of all texts.
        place: This rank.
        wanted: `[R, U]` bool, the pairs to score; None: all.
    """

    def __init__(
        self, task: Any, config: RunConfig, states: States, place: Place, wanted: Tensor | None
    ) -> None:
        self.task, self.states, self.place, self.wanted = task, states, place, wanted
        self.size = config.train.micro_batch_size
        self.fusion = PairFusion(task.model, DTYPES[config.train.precision] or torch.float32)
        every = len(states.images.lengths) * len(states.texts.lengths)
        self.progress = _Progress(every if wanted is None else int(wanted.sum()), place.world_size)
        self._image: tuple[int, ImageSide] | None = None
        self._texts: tuple[list[int], TextSide] | None = None

    def __call__(self, images: range) -> Tensor:
        """Scores `[images, U]` float32 on the CPU, `NOT_SCORED` where not wanted.

        Raises:
            ValueError: A score is not a number.
        """
        size = (len(images), len(self.states.texts.lengths))
        scores = torch.full(size, NOT_SCORED, device=self.place.device)
        for image, texts in self.tiles(images):
            cls_feats = self.fusion(self._image_side(image), self._text_side(texts))
            columns = torch.tensor(texts, device=self.place.device)
            with torch.no_grad():
                scores[image - images.start, columns] = match_scores(self.task, cls_feats.float())
            self.progress.add(len(texts))
        if bool(scores.isnan().any()):  # a ranking would take them for the best
            raise not_numbers("matching scores")
        return scores.cpu()

    def tiles(self, images: range) -> Iterator[tuple[int, list[int]]]:
        """(image, texts of similar length) that together cover all wanted pairs once."""
        if self.wanted is None:  # a batch of texts, once prepared, serves all images
            for texts in batches(range(len(self.states.texts.lengths)), self.size):
                yield from ((image, texts) for image in images)
            return
        for image in images:
            chosen = torch.nonzero(self.wanted[image])[:, 0].tolist()
            yield from ((image, texts) for texts in batches(chosen, self.size))

    def _image_side(self, image: int) -> ImageSide:
        if self._image is None or self._image[0] != image:
            experts = self.states.images.get(image).to(self.place.device, non_blocking=True)
            self._image = image, self.fusion.image(experts)
        return self._image[1]

    def _text_side(self, texts: list[int]) -> TextSide:
        if self._texts is None or self._texts[0] is not texts:
            experts, mask = self.states.padded_texts(texts)
            side = self.fusion.texts(experts.to(self.place.device), mask.to(self.place.device))
            self._texts = texts, side
        return self._texts[1]


class _Progress:
    """Logs pairs done, pairs per second and the time left of this rank."""

    def __init__(self, total: int, world_size: int) -> None:
        self.total, self.done = total, 0
        self.world_size = world_size
        self.start = self.last = time.monotonic()

    def add(self, pairs: int) -> None:
        """Call after each batch."""
        self.done += pairs
        now = time.monotonic()
        if now - self.last < PROGRESS_EVERY_S and self.done < self.total:
            return
        self.last = now
        rate = self.done / max(now - self.start, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        log.info(
            "retrieval: %d of %d pairs of this rank (of %d), %.0f pairs/s, %s to go",
            self.done,
            self.total,
            self.world_size,
            rate,
            left,
        )
