"""Retrieval at full size: matching scores of all image-text pairs, or of a shortlist, on all ranks.

Images are cut into blocks, blocks are dealt to ranks. A rank passes its images and all texts through their
towers once, keeps their states, and then fuses one image with a batch of texts at a time (`models.pair_fusion`).
Scores of finished blocks may be kept on disk, where a later run with any number of ranks finds them.

Shapes: I images, R of them on this rank, T texts, U different texts, E contrastive embedding.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.retrieval_items import RetrievalItems
from mt_deepspeed.engine.agreement import together
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.evaluation.recall import recall
from mt_deepspeed.pretrained.loading import Pretrained
from mt_deepspeed.scoring.kept_scores import KeptScores
from mt_deepspeed.scoring.pairs import PairScorer
from mt_deepspeed.scoring.states import States, batches, encode, not_numbers

log = logging.getLogger("mt_deepspeed")

LARGEST_BLOCK = 32  # images: what an interrupted run loses at most, for each rank


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
    items = together(lambda: RetrievalItems(config, place.rank, place.world_size), "opening the data")
    blocks = image_blocks(items.num_images)

    def opened() -> tuple[KeptScores | None, list[int]]:
        if options.keep is None:
            return None, []
        kept = KeptScores(options.keep, _identity(pretrained, config, items, options.top_k))
        return kept, kept.finished()  # the same on all ranks: nobody writes before all have looked

    kept, finished = together(opened, "opening the kept scores")
    left = sorted(set(range(len(blocks))) - set(finished))
    log.info("retrieval: %d of %d blocks of images are left to score", len(left), len(blocks))
    # Dealt apart, so that every rank has its share of the work that is left.
    found = finished[place.rank :: place.world_size]
    own = [*found, *left[place.rank :: place.world_size]]

    def loaded() -> dict[int, Tensor]:
        if kept is None:
            return {}
        return {block: kept.load(block, (len(blocks[block]), items.num_texts)) for block in found}

    done = together(loaded, "reading the kept scores")
    if left:
        own_blocks = {block: blocks[block] for block in own}
        done |= _score_blocks(pretrained, config, place, options, items, own_blocks, done, kept)
    rows = [image for block in own for image in blocks[block]]
    found_ids: list[list[int]] = [rows] * place.world_size
    dist.all_gather_object(found_ids, rows)
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
    kept: KeptScores | None,
) -> dict[int, Tensor]:
    """Scores `[images, T]` of those of this rank's `blocks` that are not done, kept as they come."""
    pending = [block not in done for block in blocks]
    images = list(blocks.values())
    task, shortlisting = pretrained.task, options.top_k > 0
    states = together(
        lambda: encode(task, config, items, images, pending, place, options.cache_gib, shortlisting),
        "encoding images and texts",
    )
    wanted = None
    if shortlisting:  # of the images that are left
        flags = [keep for block, keep in zip(images, pending, strict=True) for _ in block]
        wanted = _shortlist(states, options.top_k)[torch.tensor(flags, dtype=torch.bool)]
    scorer = PairScorer(task, config, states, place, wanted)

    def own_share() -> dict[int, Tensor]:
        found, first = {}, 0
        for block in (block for block in blocks if block not in done):
            rows = range(first, first + len(blocks[block]))
            found[block] = scorer(rows)[:, states.text_of]
            if kept is not None:
                kept.keep(block, found[block])
            first = rows.stop
        return found

    return together(own_share, "scoring")


def _shortlist(states: States, top_k: int) -> Tensor:
    """Pairs worth scoring, `[R, U]` bool: within the `top_k` nearest texts of the image or images of the text.

    Pairs as near as the last of a list belong to it, so the order of items does not decide. Equal texts count
    once, so that a list has no copies in it.
    """
    assert states.text_features is not None
    assert states.image_features is not None
    if not bool(states.text_features.isfinite().all() and states.image_features.isfinite().all()):
        raise not_numbers("contrastive embeddings")
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
        "text_length": config.data.max_text_len if config.model.managers_read_padding else 0,
        "top_k": top_k,
    }


def _reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType, place: Place) -> Tensor:
    """A CPU tensor reduced over all ranks."""
    moved = tensor.to(place.device).clone()
    dist.all_reduce(moved, op=operation)
    return moved.cpu()
