"""Retrieval at full size: matching scores of all image-text pairs, or of a shortlist, on all ranks.

Images are cut into blocks, blocks are dealt to ranks. A rank passes its images and all texts through their
towers once, keeps their states, and then fuses one image with a batch of texts at a time (`models.pair_fusion`).
Scores of finished blocks may be kept on disk, where a later run with any number of ranks finds them.

Shapes: I images, R of them on this rank, T texts, U different texts, E contrastive embedding.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.retrieval_items import RetrievalItems
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import DTYPES
from mt_deepspeed.evaluation.kept_scores import KeptScores
from mt_deepspeed.evaluation.recall import NOT_SCORED, recall
from mt_deepspeed.models.pair_fusion import ImageSide, PairFusion, TextSide
from mt_deepspeed.pretrained import Pretrained
from mt_deepspeed.retrieval_states import States, batches, encode, reads_padding
from mt_deepspeed.tasks.retrieval import match_scores

log = logging.getLogger("mt_deepspeed")

LARGEST_BLOCK = 32  # images: what an interrupted run loses at most, for each rank
PROGRESS_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True)
class RetrievalOptions:
    """How to go about it.

    Attributes:
        top_k: Score only each image's and each text's `top_k` nearest by contrastive embedding; 0: all pairs.
        cache_gib: Memory for tower states, per rank; more go to a file.
        keep: Folder for the scores of finished blocks.
    """

    top_k: int = 0
    cache_gib: float = 16.0
    keep: Path | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores `[R, T]` float32 of this rank's images, their numbers `[R]`, and each text's image `[T]`."""

    scores_RT: Tensor
    image_of_row_R: Tensor
    image_of_text_T: Tensor


def retrieve(
    pretrained: Pretrained, config: RunConfig, place: Place, options: RetrievalOptions | None = None
) -> dict[str, float]:
    """Recall in both directions over `data.eval`; call on all ranks.

    Raises:
        ValueError: See `score_pairs`.
    """
    found = score_pairs(pretrained, config, place, options or RetrievalOptions())

    def total(tensor: Tensor) -> Tensor:
        return _reduced(tensor, dist.ReduceOp.SUM, place)

    def largest(tensor: Tensor) -> Tensor:
        return _reduced(tensor, dist.ReduceOp.MAX, place)

    return recall(found.scores_RT, found.image_of_text_T, found.image_of_row_R, total, largest)


def score_pairs(pretrained: Pretrained, config: RunConfig, place: Place, options: RetrievalOptions) -> Scores:
    """Matching scores of this rank's images with all texts; call on all ranks.

    Raises:
        ValueError: The model cannot match, or cannot make a shortlist; the data do not fit; the folder of kept
            scores belongs to another evaluation.
    """
    check_heads(pretrained, options.top_k)
    items = RetrievalItems(config, place.rank, place.world_size)
    blocks = image_blocks(items.num_images)
    own = {block: blocks[block] for block in range(place.rank, len(blocks), place.world_size)}
    done: dict[int, Tensor] = {}
    kept = None
    if options.keep is not None:
        kept = KeptScores(options.keep, _identity(pretrained, config, items, options.top_k))
        found = {block: kept.load(block, (len(images), items.num_texts)) for block, images in own.items()}
        done = {block: scores for block, scores in found.items() if scores is not None}
    left = int(_reduced(torch.tensor(len(own) - len(done)), dist.ReduceOp.SUM, place))
    log.info("retrieval: %d of %d blocks of images are left to score", left, len(blocks))
    if left:
        for block, scores in _score_blocks(pretrained, config, place, options, items, own, dict(done)):
            done[block] = scores
            if kept is not None:
                kept.keep(block, scores)
    rows = [image for block in own for image in blocks[block]]
    found_ids: list[list[int]] = [rows] * place.world_size
    dist.all_gather_object(found_ids, rows if done.keys() == own.keys() else [])
    if sorted(image for part in found_ids for image in part) != list(range(items.num_images)):
        raise AssertionError(f"not every one of {items.num_images} images was scored once")
    parts = [torch.zeros(0, items.num_texts), *(done[block] for block in own)]
    return Scores(torch.cat(parts), torch.tensor(rows, dtype=torch.int64), items.image_of_text)


def check_heads(pretrained: Pretrained, top_k: int) -> None:
    """Raises ValueError if the model lacks what it takes to rank."""
    task = pretrained.task
    if not (hasattr(task, "itm_score") or hasattr(task, "rank_output")):
        raise ValueError(
            "this model has no matching head (itm_score or rank_output): it cannot rank texts and images"
        )
    if top_k < 0:
        raise ValueError(f"--top-k: found {top_k}, expected 0 (all pairs) or more")
    if top_k and not hasattr(task, "cross_modal_itc_text_head"):
        raise ValueError(
            "--top-k: this model has no contrastive heads to make a shortlist with; leave it out to score all "
            "pairs"
        )


def image_blocks(num_images: int) -> list[list[int]]:
    """Images in order, in blocks that do not depend on the number of ranks."""
    return list(batches(range(num_images), min(LARGEST_BLOCK, max(1, num_images // 64))))


def _score_blocks(
    pretrained: Pretrained,
    config: RunConfig,
    place: Place,
    options: RetrievalOptions,
    items: RetrievalItems,
    blocks: Mapping[int, list[int]],
    done: Mapping[int, Tensor],
) -> Iterator[tuple[int, Tensor]]:
    """Yields those of this rank's `blocks` that are not done, with their scores `[images, T]`."""
    pending = [block not in done for block in blocks]
    images = list(blocks.values())
    task, shortlisting = pretrained.task, options.top_k > 0
    states = encode(task, config, items, images, pending, place, options.cache_gib, shortlisting)
    wanted = None
    if shortlisting:  # of the images that are left
        flags = [keep for block, keep in zip(images, pending, strict=True) for _ in block]
        wanted = _shortlist(states, options.top_k)[torch.tensor(flags, dtype=torch.bool)]
    scorer = PairScorer(task, config, states, place, wanted)
    first = 0
    for block in (block for block in blocks if block not in done):
        rows = range(first, first + len(blocks[block]))
        yield block, scorer(rows)[:, states.text_of]
        first = rows.stop


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
        """Scores `[images, U]` float32 on the CPU, `NOT_SCORED` where not wanted."""
        size = (len(images), len(self.states.texts.lengths))
        scores = torch.full(size, NOT_SCORED, device=self.place.device)
        for image, texts in self.tiles(images):
            cls_feats = self.fusion(self._image_side(image), self._text_side(texts))
            columns = torch.tensor(texts, device=self.place.device)
            with torch.no_grad():
                scores[image - images.start, columns] = match_scores(self.task, cls_feats.float())
            self.progress.add(len(texts))
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


def _shortlist(states: States, top_k: int) -> Tensor:
    """Pairs worth scoring, `[R, U]` bool: within the `top_k` nearest texts of the image or images of the text.

    Pairs as near as the last of a list belong to it, so the order of items does not decide. Equal texts count
    once, so that a list has no copies in it.
    """
    assert states.text_features is not None
    assert states.image_features is not None
    gathered: list[Tensor] = [states.image_features] * dist.get_world_size()
    dist.all_gather_object(gathered, states.image_features)
    first = sum(len(part) for part in gathered[: dist.get_rank()])
    own = slice(first, first + len(states.image_features))
    images, num_texts = torch.cat(gathered), len(states.text_features)
    near_RU = torch.zeros(len(states.image_features), num_texts, dtype=torch.bool)
    similar_RU = torch.empty(near_RU.shape)
    for texts in batches(range(num_texts), 4096):
        similar = images @ states.text_features[texts].T
        worst = similar.topk(min(top_k, len(images)), dim=0).values[-1]
        similar_RU[:, texts] = similar[own]
        near_RU[:, texts] = similar[own] >= worst
    return near_RU | (similar_RU >= similar_RU.topk(min(top_k, num_texts), dim=1).values[:, -1:])


def _identity(
    pretrained: Pretrained, config: RunConfig, items: RetrievalItems, top_k: int
) -> dict[str, str | int]:
    """What scores follow from, apart from rounding."""
    weights = hashlib.sha256()
    for name, tensor in sorted(pretrained.task.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    tokens = hashlib.sha256(b"".join(ids.tobytes() + b"|" for ids in items.tokens))
    return {
        "model": weights.hexdigest()[:16],
        "data": items.digest[:16],
        "tokens": tokens.hexdigest()[:16],
        "images": items.num_images,
        "image_size": config.model.vision.image_size,
        "transform": config.data.eval_transform,
        "precision": config.train.precision,
        "text_length": config.data.max_text_len if reads_padding(config.model) else 0,
        "top_k": top_k,
    }


def _reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType, place: Place) -> Tensor:
    """A CPU tensor reduced over all ranks."""
    moved = tensor.to(place.device).clone()
    dist.all_reduce(moved, op=operation)
    return moved.cpu()


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
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
        log.info(
            "retrieval: %d of %d pairs of this rank (of %d), %.0f pairs/s, %s to go",
            self.done,
            self.total,
            self.world_size,
            rate,
            left,
        )
