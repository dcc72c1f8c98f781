"""Evaluation of pre-trained models on all ranks: the objectives of held-out pairs, and masked visual words."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.pipeline import eval_batches
from mt_deepspeed.data.text import CaptionTokenizer
from mt_deepspeed.engine.evaluate import evaluate_task, reduce_report
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import autocast
from mt_deepspeed.engine.runner import add_reports, to_device
from mt_deepspeed.evaluation.visual_words import majority_share, mask_one_visual_word, visual_word_report
from mt_deepspeed.pretrained.loading import Pretrained
from mt_deepspeed.tasks.pretrain import PretrainTask

Batch = dict[str, Tensor]


def evaluate_pretrained(
    pretrained: Pretrained, config: RunConfig, place: Place, visual_words: Path | None, max_samples: int
) -> dict[str, float]:
    """All figures, by name; call on all ranks.

    Args:
        pretrained: The model, on `place.device`.
        config: Says which data (`data.eval`) and which batch size (`train.micro_batch_size`).
        place: This rank.
        visual_words: JSON file class -> words; None: leave these figures out.
        max_samples: Pairs, spread evenly; 0: all.
    """

    def batches() -> Iterator[Batch]:
        return eval_batches(config, place.rank, place.world_size, max_samples)

    metrics = evaluate_task(pretrained.task, batches(), place, config.train.precision)
    if visual_words is not None and isinstance(pretrained.task, PretrainTask) and pretrained.task.has_mlm:
        classes = token_classes(visual_words, pretrained.tokenizer)
        metrics |= _visual_figures(pretrained, batches(), classes, place, config.train.precision)
    return dict(sorted(metrics.items()))


def token_classes(visual_words: Path, tokenizer: CaptionTokenizer) -> dict[int, str]:
    """Token id -> class of every visual word that is a single token, at a text's start or behind a space.

    Raises:
        ValueError: The file is not such a JSON, or none of its words is a single token.
    """
    try:
        classes = json.loads(visual_words.read_text("utf-8"))
        pairs = [(word, name) for name, words in classes.items() for word in words]
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f'--visual-words {visual_words}: expected JSON {{"class": ["word", ...]}}: {error}'
        ) from error
    found = {}
    for word, name in pairs:
        for text in (word, f"a {word}"):
            ids = tokenizer.encode(text).ids.tolist()
            if len(ids) == len(text.split()) + 2:
                found[ids[-2]] = name
    if not found:
        raise ValueError(
            f"--visual-words {visual_words}: no word is a single token of this model's tokenizer"
        )
    return found


def _visual_figures(
    pretrained: Pretrained, batches: Iterator[Batch], classes: dict[int, str], place: Place, precision: str
) -> dict[str, float]:
    task, mask_id = pretrained.task, pretrained.tokenizer.mask_id
    assert isinstance(task, PretrainTask)
    total: dict[str, Tensor] = {}
    asked: Counter[int] = Counter()
    task.eval()
    with torch.no_grad(), autocast(precision, place.device):
        for batch in batches:
            if len(batch["text_ids"]) == 0:
                continue
            _, chosen = mask_one_visual_word(batch["text_ids"], classes, mask_id, batch["sample_ids"])
            asked.update(batch["text_ids"][chosen].tolist())
            on_device = to_device(batch, place.device)
            add_reports(total, visual_word_report(task.fill_masks, on_device, classes, mask_id))
    metrics = reduce_report(total, place.device)
    return {**metrics, "visual_chance": majority_share(_of_all_ranks(asked), classes)}


def _of_all_ranks(counts: Counter[int]) -> Counter[int]:
    found: list[Counter[int]] = [Counter() for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, counts)
    return sum(found, Counter())
