"""Fine-tunes every task on the synthetic world: from a pre-trained model, from scratch, and blind.

    python -m benchmarks.downstream --shards DIR --pretrained quickstart/model-short-seed0 \
        [--tasks vqa snli-ve nlvr2 retrieval] [--seeds 0 1 2] [--ways pretrained scratch text_only image_only]

DIR holds the shards `vqav2`, `snli_ve`, `nlvr2` and `flickr30k` (docs/tasks.md says how to make them) and the
tokenizer of the pre-trained model. Each run takes the preset `quickstart-<task>` and is measured on pictures that
neither training nor the choice of its checkpoint has seen (VQA: `val`, whose answers are known). Blind runs start
from the pre-trained model too: `text_only` sees the same grey for every picture, `image_only` an empty text, in
training and in evaluation. Chance is the best constant answer; for retrieval, a draw among the pictures.

Prints a table of means and spreads over the seeds, and appends a row per run to benchmarks/results/downstream.csv.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import RESULTS, append
from mt_deepspeed.config import DatasetConfig, RunConfig, load_config
from mt_deepspeed.data.pipeline import TrainStream, eval_batches
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.ds_config import load_ds_config
from mt_deepspeed.engine.evaluate import evaluate_task
from mt_deepspeed.engine.gather import gather_rows
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.loop import train
from mt_deepspeed.engine.watchdog import Watchdog
from mt_deepspeed.evaluation.visual_words import GREY
from mt_deepspeed.pretrained import keep_answers, load
from mt_deepspeed.starting_weights import check_start, load_starting_weights
from mt_deepspeed.task_evaluation import retrieve
from mt_deepspeed.tasks import Ranks, build_task

Batch = dict[str, Tensor]

ROOT = Path(__file__).resolve().parents[1]
TESTED = {"vqa": "val", "snli-ve": "test", "nlvr2": "test1", "retrieval": "test"}
METRIC = {"vqa": "vqa_score", "snli-ve": "accuracy", "nlvr2": "accuracy", "retrieval": "r_mean"}
WAYS = ("pretrained", "scratch", "text_only", "image_only")


def blind(batch: Batch, way: str) -> Batch:
    """The batch as a blind run sees it."""
    if way == "text_only":
        grey = batch["pixels"].new_tensor(GREY).view(3, 1, 1)
        return batch | {"pixels": grey.expand_as(batch["pixels"]).contiguous()}
    if way == "image_only":
        ids, mask = torch.full_like(batch["text_ids"], 1), torch.zeros_like(batch["text_mask"])
        ids[:, 0], ids[:, 1], mask[:, :2] = 0, 2, 1  # <s> </s>
        return batch | {"text_ids": ids, "text_mask": mask}
    return batch


class BlindStream(TrainStream):
    """The stream of a run that does not see everything."""

    way = ""

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """As `TrainStream.steps`."""
        for batches in super().steps(first_step):
            yield [blind(batch, self.way) for batch in batches]


def one_run(place: Place, args: argparse.Namespace, task: str, way: str, seed: int) -> tuple[float, float]:
    """(figure on the tested split, training seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"data.root={args.shards.resolve()}",
            f"run_dir={folder}/run",
            f"train.seed={seed}",
            *args.set,
        ]
        if way != "scratch":
            settings.append(f"checkpoint.init_from={args.pretrained.resolve()}")
        config = load_config(f"quickstart-{task}", (), settings)
        check_start(config)
        stream = BlindStream(config, 0, 1)
        stream.way = way
        if stream.answers:
            keep_answers(Path(config.run_dir), stream.answers)
        torch.manual_seed(seed)
        built = build_task(config, Ranks(0, gather_rows))

        def evaluation() -> Iterator[Batch]:
            return (blind(batch, way) for batch in eval_batches(config, 0, 1))

        started = time.perf_counter()
        ds_config = load_ds_config(ROOT / "ds_configs" / "zero0.json")
        watchdog = Watchdog(config, place.rank, place.world_size)
        train(
            config,
            ds_config,
            built,
            stream,
            evaluation,
            place,
            watchdog,
            lambda: load_starting_weights(built, config),
        )
        seconds = time.perf_counter() - started
        return test(place, config, task, way), seconds


def test(place: Place, config: RunConfig, task: str, way: str) -> float:
    """The figure of the run's best checkpoint on the tested split."""
    pretrained = load(config.run_dir)
    split = DatasetConfig(path=config.data.eval[0].path, splits=(TESTED[task],))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=(split,)))
    if task == "retrieval":
        return retrieve(pretrained, config, place)[METRIC[task]]
    batches = (blind(batch, way) for batch in eval_batches(config, 0, 1, max_samples=0))
    return evaluate_task(pretrained.task, batches, place, "fp32")[METRIC[task]]


def chance(args: argparse.Namespace, task: str) -> float:
    """What the best constant answer gets on the tested split."""
    config = load_config(f"quickstart-{task}", (), [f"data.root={args.shards.resolve()}", *args.set])
    split = DatasetConfig(path=config.data.eval[0].path, splits=(TESTED[task],))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=(split,)))
    batches = list(eval_batches(config, 0, 1, max_samples=0))
    if task == "vqa":
        return float(torch.cat([batch["answer_scores"] for batch in batches]).mean(dim=0).max())
    if task != "retrieval":
        labels = torch.cat([batch["labels"] for batch in batches])
        return float(labels.bincount().max() / len(labels))
    images, texts = torch.cat([batch["image_ids"] for batch in batches]).bincount(), 0.0
    total = int(images.sum())
    for k in (1, 5, 10):
        # Some text of the image among k of all; the image among k of all.
        missed = torch.ones_like(images, dtype=torch.float64)
        for drawn in range(k):
            missed *= (total - images - drawn) / (total - drawn)
        texts += float((1 - missed).mean()) + min(1.0, k / len(images))
    return texts / 6


def table(found: dict[tuple[str, str], list[float]], chances: dict[str, float], ways: list[str]) -> str:
    """Markdown: mean and spread (lowest to highest) in per cent."""
    lines = [f"| task | chance | {' | '.join(ways)} |", "|---|---|" + "---|" * len(ways)]
    for task, base in chances.items():
        cells = []
        for way in ways:
            values = [100 * value for value in found.get((task, way), [])]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        lines.append(f"| {task} | {100 * base:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True, type=Path)
    parser.add_argument("--pretrained", required=True, type=Path, help="run folder or exported model")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TESTED), default=list(TESTED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    place = launch.init()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    chances = {task: chance(args, task) for task in args.tasks}
    for task in args.tasks:
        for way in args.ways:
            if task == "retrieval" and way.endswith("_only"):
                continue  # blind, all pairs of a picture or of a text look alike: recall is 0
            for seed in args.seeds:
                value, seconds = one_run(place, args, task, way, seed)
                found[task, way].append(value)
                figures = {METRIC[task]: round(value, 4), "seconds": round(seconds, 1)}
                print(task, way, seed, figures, flush=True)
                row = {"task": task, "way": way, "seed": seed, "metric": METRIC[task], "value": value}
                append(RESULTS / "downstream.csv", [row | {"seconds": round(seconds, 1)}])
    print(table(found, chances, list(args.ways)))
    launch.shutdown()


if __name__ == "__main__":
    main()
