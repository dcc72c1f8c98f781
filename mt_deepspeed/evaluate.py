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
import os
import sys
from pathlib import Path

from mt_deepspeed.config import DatasetConfig, RunConfig
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.evaluation.vqa_accuracy import write_submission
from mt_deepspeed.pretrained.loading import Pretrained, load
from mt_deepspeed.scoring.classification import (
    Classified,
    check_questions,
    check_vqa_files,
    classify,
    official_accuracy,
    vqa_answers,
)
from mt_deepspeed.scoring.pretraining import evaluate_pretrained
from mt_deepspeed.scoring.retrieval import RetrievalOptions, retrieve

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
            args.out.write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")


def figures(place: Place, args: argparse.Namespace) -> dict[str, float]:
    """What the command line asks for; call on all ranks."""
    _check_files(args)
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
        metrics |= _vqa_figures(pretrained, classified, place, args)
    elif args.predictions is not None and place.rank == 0:
        args.predictions.write_text(json.dumps(classified.predictions, indent=0) + "\n", "utf-8")
    return dict(sorted(metrics.items()))


def _vqa_figures(
    pretrained: Pretrained, classified: Classified, place: Place, args: argparse.Namespace
) -> dict[str, float]:
    """The official accuracy; the submission gets its name when it is known to be complete."""
    answers = vqa_answers(pretrained, classified)
    unchecked = (
        None if args.predictions is None else args.predictions.with_name(args.predictions.name + ".unchecked")
    )
    if unchecked is not None and place.rank == 0:
        write_submission(answers, unchecked)
    try:
        if args.questions is not None:
            check_questions(answers, args.questions)
        metrics = {}
        if args.annotations is not None:
            metrics = official_accuracy(answers, args.annotations, pretrained.answers)
    except ValueError as error:
        kept = "" if unchecked is None else f"; the predictions are in {unchecked}"
        raise ValueError(f"{error}{kept}") from error
    if unchecked is not None and place.rank == 0:
        unchecked.replace(args.predictions)
    return metrics


def _check_files(args: argparse.Namespace) -> None:
    """Looks at the files of the command line before anything is computed.

    Raises:
        ValueError: One cannot be read, is of another kind, or cannot be written.
    """
    check_vqa_files(args.questions, args.annotations)
    for path in (args.out, args.predictions):
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: cannot be written: {'a folder' if path.is_dir() else 'no permission'}")


def _refuse_unused(config: RunConfig, args: argparse.Namespace) -> None:
    ranks = config.task == "retrieval" or args.retrieval
    complete = args.annotations is not None or args.questions is not None
    for flag, given, fits in (
        ("--max-samples", args.max_samples, not ranks and not complete),
        ("--visual-words", args.visual_words, config.task == "pretrain" and not ranks),
        ("--top-k", args.top_k, ranks),
        ("--keep", args.keep, ranks),
        ("--predictions", args.predictions, not ranks and config.task != "pretrain"),
        ("--annotations", args.annotations, config.task == "vqa"),
        ("--questions", args.questions, config.task == "vqa"),
    ):
        if given and not fits:
            rest = " with --annotations or --questions" if flag == "--max-samples" and complete else ""
            raise ValueError(f"{flag}: has no meaning for a model of task {config.task}{rest}; leave it out")


def _config(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The run's configuration with the data of the command line."""
    data = config.data
    if args.shards is not None or args.splits is not None:
        paths = [one.path for one in data.eval] if args.shards is None else [str(args.shards.resolve())]
        splits = args.splits or ["val"]
        chosen = [
            DatasetConfig(path=path, splits=(split,)) for path in dict.fromkeys(paths) for split in splits
        ]
        data = dataclasses.replace(data, eval=tuple(chosen))
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
    parser.add_argument(
        "--splits", nargs="+", help="default: val of --shards; without that those of the run's data.eval"
    )
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
    args = parser.parse_args(arguments)
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--max-samples", args.max_samples, 0)):
        if value < least:
            parser.error(f"{flag} {value}: expected at least {least}")
    return args


if __name__ == "__main__":
    main()
