"""Evaluates a model: `python -m mt_deepspeed.evaluate --checkpoint RUN_OR_EXPORT [--shards DIR --splits val]`.

What comes out depends on what the model was trained for:

- pre-training: MLM and ITM of held-out pairs; with `--visual-words`, the accuracy at masked words that only the
  picture tells, given the right, a shuffled and no picture; with `--retrieval`, recall without fine-tuning
- VQA: the soft score; with `--annotations`, the official accuracy by answer type; with `--predictions`, the file
  for the evaluation server, which `--questions` checks for completeness
- SNLI-VE, NLVR2, CIFAR: accuracy on each split
- GLUE: the task's own metrics
- retrieval: recall at 1, 5 and 10 in both directions, over all pairs or, with `--top-k`, over shortlists

Runs on one process, or on many under the `deepspeed` launcher or `srun`; every sample counts once.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.config import DatasetConfig, RunConfig
from mt_deepspeed.data.pipeline import eval_batches
from mt_deepspeed.data.text import CaptionTokenizer
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.evaluate import evaluate_task, reduce_report
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.precision import autocast
from mt_deepspeed.engine.runner import add_reports, to_device
from mt_deepspeed.evaluation.visual_words import majority_share, mask_one_visual_word, visual_word_report
from mt_deepspeed.evaluation.vqa_accuracy import write_submission
from mt_deepspeed.pretrained.loading import Pretrained, load
from mt_deepspeed.scoring.classification import (
    check_questions,
    classify,
    official_accuracy,
    vqa_answers,
)
from mt_deepspeed.scoring.retrieval import RetrievalOptions, retrieve
from mt_deepspeed.tasks.pretrain import PretrainTask

Batch = dict[str, Tensor]

LONGEST_S = 24 * 3600.0
"""That ranks with little to score may wait for others; the launcher ends all when one dies."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = parse(arguments)
    place = launch.init(timeout_s=LONGEST_S)
    try:
        metrics = figures(place, args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        launch.shutdown()
    if place.rank == 0:
        for name, value in metrics.items():
            print(f"{name:40} {value:.4f}")
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")


def figures(place: Place, args: argparse.Namespace) -> dict[str, float]:
    """What the command line asks for; call on all ranks."""
    pretrained = load(args.checkpoint, place.device)
    config = _config(pretrained.config, args)
    _refuse_unused(config, args)
    if config.task == "retrieval" or args.retrieval:
        return retrieve(pretrained, config, place, RetrievalOptions(args.top_k, args.cache_gib, args.keep))
    if config.task == "pretrain":
        return evaluate_pretrained(pretrained, config, place, args.visual_words, args.max_samples)
    measured = args.predictions is None and args.annotations is None
    classified = classify(pretrained, config, place, args.max_samples, labelled=measured)
    metrics = classified.metrics
    if config.task == "vqa":
        answers = vqa_answers(pretrained, classified)
        if args.annotations is not None:
            metrics |= official_accuracy(answers, args.annotations, pretrained.answers)
        if args.questions is not None:
            check_questions(answers, args.questions)
        if args.predictions is not None and place.rank == 0:
            write_submission(answers, args.predictions)
    elif args.predictions is not None and place.rank == 0:
        args.predictions.parent.mkdir(parents=True, exist_ok=True)
        args.predictions.write_text(json.dumps(classified.predictions, indent=0) + "\n", "utf-8")
    return dict(sorted(metrics.items()))


def _refuse_unused(config: RunConfig, args: argparse.Namespace) -> None:
    ranks = config.task == "retrieval" or args.retrieval
    for flag, given, fits in (
        ("--top-k", args.top_k, ranks),
        ("--keep", args.keep, ranks),
        ("--predictions", args.predictions, not ranks and config.task != "pretrain"),
        ("--annotations", args.annotations, config.task == "vqa"),
        ("--questions", args.questions, config.task == "vqa"),
    ):
        if given and not fits:
            raise ValueError(f"{flag}: has no meaning for a model of task {config.task}; leave it out")


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


def _config(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The run's configuration with the data of the command line."""
    data = config.data
    if args.shards is not None:
        path = str(args.shards.resolve())
        chosen = tuple(DatasetConfig(path=path, splits=(split,)) for split in args.splits)
        data = dataclasses.replace(data, eval=chosen)
    if not data.eval:
        raise ValueError(
            "no evaluation data: the model's configuration names none (data.eval); pass --shards DIR"
        )
    if (Path(args.checkpoint) / "vocab.json").is_file():  # an exported model brings its tokenizer
        data = dataclasses.replace(data, tokenizer=str(Path(args.checkpoint).resolve()))
    train = dataclasses.replace(config.train, micro_batch_size=args.batch_size)
    if args.precision is not None:
        train = dataclasses.replace(train, precision=args.precision)
    return dataclasses.replace(config, data=data, train=train)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mt_deepspeed.evaluate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or exported model")
    parser.add_argument("--shards", type=Path, help="shard folder; default: the run's data.eval")
    parser.add_argument("--splits", nargs="+", default=["val"], help="splits of --shards (default: val)")
    parser.add_argument(
        "--visual-words", type=Path, help="JSON file: class -> words that only a picture tells"
    )
    parser.add_argument("--retrieval", action="store_true", help="recall of a model pre-trained with ITM")
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="retrieval: score the K nearest by contrastive embedding, both ways; 0: all pairs (default)",
    )
    parser.add_argument(
        "--cache-gib",
        type=float,
        default=16.0,
        help="retrieval: memory for tower states per rank; more go to a file in $TMPDIR (default: 16)",
    )
    parser.add_argument(
        "--keep", type=Path, help="retrieval: folder for finished scores; a later run continues from it"
    )
    parser.add_argument("--annotations", type=Path, help="VQA: the split's annotation file")
    parser.add_argument("--questions", type=Path, help="VQA: the split's question file")
    parser.add_argument(
        "--predictions",
        type=Path,
        help="JSON file for the predictions; VQA: as the evaluation server takes it",
    )
    parser.add_argument("--max-samples", type=int, default=0, help="pairs, spread evenly; 0: all (default)")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pairs per rank and forward pass (default: 64)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: the run's; bf16 for an exported model"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
