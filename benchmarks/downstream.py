"""Fine-tunes every task on the synthetic world: from a pre-trained model, from scratch, and blind.

    python -m benchmarks.downstream --shards DIR --pretrained quickstart/model-short-seed0 \
        [--tasks vqa snli-ve nlvr2 retrieval false-texts] [--seeds 0 1 2] \
        [--ways pretrained scratch text_only image_only] [--save]

DIR holds the shards `vqav2`, `snli_ve`, `nlvr2` and `flickr30k` (docs/tasks.md says how to make them) and the
tokenizer of the pre-trained model. Each run takes the preset `quickstart-<task>`, `false-texts` that of retrieval with
the other objective; its last checkpoint, chosen by nothing, is measured on pictures that no training has seen. Blind
runs start from the pre-trained model too: `text_only` sees the same grey for every picture, `image_only` an empty
text, in training and in evaluation. Retrieval needs none: a ranking that does not depend on the query is chance.
Chance is the best constant answer; for retrieval, a draw among the pictures or texts.

Prints a table of means and spreads over the seeds. With `--save` each run adds a row to
benchmarks/results/downstream.csv, nothing is run whose row (task, way, seed and number of steps) is there, and the
table is that of all rows.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import add_save, append, measured
from mt_deepspeed.config import DatasetConfig, RunConfig, load_config
from mt_deepspeed.data.pipeline import TrainStream, eval_batches
from mt_deepspeed.data.retrieval_items import RetrievalItems
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.ds_config import load_ds_config
from mt_deepspeed.engine.evaluate import evaluate_task
from mt_deepspeed.engine.gather import gather_rows
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.loop import train
from mt_deepspeed.engine.watchdog import Watchdog
from mt_deepspeed.evaluation.recall import KS
from mt_deepspeed.evaluation.visual_words import GREY
from mt_deepspeed.pretrained.loading import keep_answers, load
from mt_deepspeed.pretrained.starting_weights import check_start, load_starting_weights
from mt_deepspeed.scoring.retrieval import retrieve
from mt_deepspeed.tasks import Ranks, build_task

Batch = dict[str, Tensor]

DS_CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "zero0.json"
TESTED = {"vqa": "val", "snli-ve": "test", "nlvr2": "test1", "retrieval": "test", "false-texts": "test"}
RANKED = ("retrieval", "false-texts")
METRIC = {"vqa": "vqa_score", "snli-ve": "accuracy", "nlvr2": "accuracy"} | dict.fromkeys(RANKED, "r_mean")
WAYS = ("pretrained", "scratch", "text_only", "image_only")
BLIND = WAYS[2:]
COLUMNS = ("task", "way", "seed", "steps", "value", "chance")


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

    def __init__(self, config: RunConfig, way: str) -> None:
        super().__init__(config, 0, 1)
        self._way = way

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """As `TrainStream.steps`."""
        return ([blind(batch, self._way) for batch in batches] for batches in super().steps(first_step))


def one_run(place: Place, config: RunConfig, task: str, way: str) -> tuple[float, float]:
    """Trains; the figure of the last checkpoint on the tested split, and that of chance."""
    check_start(config)
    stream = BlindStream(config, way)
    if stream.answers:
        keep_answers(Path(config.run_dir), stream.answers)
    torch.manual_seed(config.train.seed)
    built = build_task(config, Ranks(0, gather_rows))
    train(
        config,
        load_ds_config(DS_CONFIG),
        built,
        stream,
        lambda: (blind(batch, way) for batch in eval_batches(config, 0, 1)),
        place,
        Watchdog(config, place.rank, place.world_size),
        lambda: load_starting_weights(built, config),
    )
    last = load(max(Path(config.run_dir, "checkpoints").glob("step-*")))
    split = DatasetConfig(path=config.data.eval[0].path, splits=(TESTED[task],))
    tested = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=(split,)))
    if task in RANKED:
        texts_per_image = RetrievalItems(tested, 0, 1).image_of_text.bincount()
        return retrieve(last, tested, place)[METRIC[task]], mean_recall_by_chance(texts_per_image)
    batches = list(eval_batches(tested, 0, 1, max_samples=0))
    seen = (blind(batch, way) for batch in batches)
    return evaluate_task(last.task, seen, place, "fp32")[METRIC[task]], best_constant(batches)


def best_constant(batches: list[Batch]) -> float:
    """What the best constant answer gets."""
    if "answer_scores" in batches[0]:
        return float(torch.cat([batch["answer_scores"] for batch in batches]).mean(dim=0).max())
    labels = torch.cat([batch["labels"] for batch in batches])
    return float(labels.bincount().max() / len(labels))


def mean_recall_by_chance(texts_I: Tensor) -> float:
    """Of rankings drawn at random, given the number of texts of each image."""
    found, total = 0.0, int(texts_I.sum())
    for k in KS:
        # Some text of the image among k of all; the image among k of all.
        missed_I = torch.ones_like(texts_I, dtype=torch.float64)
        for drawn in range(k):
            missed_I *= (total - texts_I - drawn) / (total - drawn)
        found += float((1 - missed_I).mean()) + min(1.0, k / len(texts_I))
    return found / (2 * len(KS))


def curve(run_dir: Path) -> str:
    """`step:score` of the evaluations in training."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text("utf-8").splitlines())
    found = {line["step"]: line["eval/score"] for line in lines if "eval/score" in line}
    return " ".join(f"{step}:{score:.3f}" for step, score in found.items())


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Markdown of rows with `COLUMNS`: mean and spread (lowest to highest) in per cent."""
    found: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for task, way, _, steps, value, base in rows:
        found[task, int(steps), way].append(100 * float(value))
        found[task, int(steps), "chance"] = [100 * float(base)]
    lines = [f"| task | steps | chance | {' | '.join(WAYS)} |", "|---|---|---|" + "---|" * len(WAYS)]
    lengths = {(task, steps) for task, steps, _ in found}
    for task, length in sorted(lengths, key=lambda one: (list(TESTED).index(one[0]), one[1])):
        cells = []
        for way in ("chance", *WAYS):
            values = found.get((task, length, way), [])
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        lines.append(f"| {task} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settled(task: str, settings: list[str]) -> RunConfig:
    """The run of a task with further settings."""
    if task == "false-texts":
        return load_config("quickstart-retrieval", (), ["retrieval.objective=false_texts", *settings])
    return load_config(f"quickstart-{task}", (), settings)


def measure(place: Place, args: argparse.Namespace, task: str, way: str, seed: int) -> dict[str, object]:
    """The row of one run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.root={args.shards.resolve()}", f"run_dir={folder}", f"train.seed={seed}"]
        if way != "scratch":
            settings.append(f"checkpoint.init_from={args.pretrained.resolve()}")
        config = settled(task, [*settings, *args.set])
        started = time.process_time()
        value, chance = one_run(place, config, task, way)
        return {
            "task": task,
            "way": way,
            "seed": seed,
            "metric": METRIC[task],
            "value": round(value, 5),
            "chance": round(chance, 5),
            "steps": config.train.max_steps,
            "curve": curve(Path(folder)),
            "cpu_s": round(time.process_time() - started, 1),
        }


def measure_all(place: Place, args: argparse.Namespace) -> None:
    """All runs that have no row yet: seed by seed, so that a job that is cut short leaves whole tables."""
    rows = measured(args.save, COLUMNS) if args.save else set()
    done = {row[:4] for row in rows}
    root = f"data.root={args.shards.resolve()}"
    steps = {task: settled(task, [root, *args.set]).train.max_steps for task in args.tasks}
    for seed in args.seeds:
        for task in args.tasks:
            for way in args.ways:
                run = (task, way, str(seed), str(steps[task]))
                if run not in done and not (task in RANKED and way in BLIND):
                    found = measure(place, args, task, way, seed)
                    print(found, flush=True)
                    rows.add(tuple(str(found[name]) for name in COLUMNS))
                    if args.save:
                        append(args.save, [found])
    print(table(rows))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
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
    add_save(parser, "downstream.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parse()
    measure_all(launch.init(), chosen)
    launch.shutdown()
