"""Small runs of the fine-tuning tasks: data, configuration, training and evaluation in one process group."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from mt_deepspeed.config import RunConfig, from_dict, to_dict
from mt_deepspeed.data.collate import Batch
from mt_deepspeed.data.pipeline import TrainStream, eval_batches
from mt_deepspeed.data.text import train_tokenizer
from mt_deepspeed.engine.gather import gather_rows
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.loop import train
from mt_deepspeed.engine.watchdog import Watchdog
from mt_deepspeed.pretrained.loading import keep_answers, load
from mt_deepspeed.pretrained.starting_weights import check_start, load_starting_weights
from mt_deepspeed.scoring.classification import classify
from mt_deepspeed.scoring.retrieval import retrieve
from mt_deepspeed.tasks import CLASSIFIERS, Ranks, build_task
from tests.helpers.datasets import VOCABULARY, make_rows, write_dataset
from tests.helpers.task_datasets import entailment_rows, nlvr2_rows, vqa_rows

NUM_ANSWERS = 6
ANSWERS = [f"answer {label}" for label in range(NUM_ANSWERS)]

DATA: dict[str, tuple[str, tuple[str, ...]]] = {
    "pretrain": ("captions", ("val",)),
    "vqa": ("vqa", ("val",)),
    "snli_ve": ("snli", ("dev", "test")),
    "nlvr2": ("nlvr2", ("dev", "test1")),
    "retrieval": ("captions", ("val",)),
    "cifar": ("cifar10", ("test",)),
    "glue": ("glue", ("sst2-dev",)),
}
"""Task -> folder and evaluation splits; `train` is in each but GLUE's, and the last two are not written here."""


def write_task_root(root: Path) -> Path:
    """A data set for each task, and a tokenizer."""
    write_dataset(root / "captions", {"train": make_rows(14), "val": make_rows(5, seed=50)})
    options = {"answers": ANSWERS}
    splits = {
        "train": vqa_rows(12, NUM_ANSWERS),
        "val": vqa_rows(5, NUM_ANSWERS, seed=100),
        "test": vqa_rows(4, NUM_ANSWERS, seed=200, answered=False),
    }
    write_dataset(root / "vqa", splits, task="vqa", options=options)
    sentences = {"train": entailment_rows(8), "dev": entailment_rows(3, 100), "test": entailment_rows(2, 200)}
    write_dataset(root / "snli", sentences, task="entailment")
    statements = {"train": nlvr2_rows(10), "dev": nlvr2_rows(3, 100), "test1": nlvr2_rows(2, 200)}
    write_dataset(root / "nlvr2", statements, task="nlvr2")
    texts = [text for row in make_rows(40) for text in row["captions"]] + ["is it ? the left one is red"] * 9
    train_tokenizer(texts, root / "tokenizer", VOCABULARY)
    return root


def task_config(root: Path, task: str, run_dir: Path | str = "never-written", **changes: Any) -> RunConfig:
    """A run of a model of a few thousand parameters; `changes` replace whole sections' keys (nested dicts)."""
    folder, splits = DATA[task]
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "task": task,
        "model": {
            "init_std": 0.1,
            "text": {
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 24,
                "max_positions": 40,
                "dropout": 0.0,
            },
            "vision": {"image_size": 16, "patch_size": 8, "width": 16, "num_layers": 2, "num_heads": 2},
            "cross_modal": {
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 24,
                "dropout": 0.0,
                "num_token_types": 3 if task == "nlvr2" else 2,
            },
            "link": {"kind": "aaue", "num_text_experts": 2, "num_image_experts": 2, "noise": False},
        },
        "data": {
            "root": str(root),
            "train": [{"path": folder, "splits": ["sst2-train" if task == "glue" else "train"]}],
            "eval": [{"path": folder, "splits": [split]} for split in splits],
            "tokenizer": "tokenizer",
            "max_text_len": 14,
            "num_workers": 0,
            "train_transform": "albef_randaug_wc",
            "eval_transform": "albef",
        },
        "classifier": {"num_answers": NUM_ANSWERS},
        "retrieval": {"num_false_texts": 2, "itc_size": 8},
        "optim": {"lr": 1e-3, "warmup": 0},
        "train": {
            "max_steps": 2,
            "global_batch_size": 6,
            "micro_batch_size": 3,
            "precision": "fp32",
            "log_every_steps": 1,
            "eval_every_steps": 0,
        },
        "checkpoint": {"every_steps": 0, "every_minutes": 0, "resume": "never"},
    }
    for section, values in changes.items():
        tree[section] = _merged(tree.get(section, {}), values)
    return from_dict(RunConfig, tree)


def _merged(base: Any, update: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(update, dict)):
        return update
    return {**base, **{key: _merged(base.get(key), value) for key, value in update.items()}}


def train_run(place: Place, config: RunConfig) -> dict[str, float]:
    """As `mt_deepspeed.train` does it inside its process group; returns the last metrics."""
    check_start(config)
    stream = TrainStream(config, place.rank, place.world_size)
    task = build_task(config, Ranks(place.rank, gather_rows))
    if place.rank == 0 and stream.answers:
        keep_answers(Path(config.run_dir), stream.answers)

    def evaluation() -> Any:
        return eval_batches(config, place.rank, place.world_size)

    ds_config = {"zero_optimization": {"stage": 1}}
    watchdog = Watchdog(config, place.rank, place.world_size)
    result = train(
        config,
        ds_config,
        task,
        stream,
        evaluation,
        place,
        watchdog,
        lambda: load_starting_weights(task, config),
    )
    return result.metrics


def training_batches(config: RunConfig, steps: int = 4) -> list[Batch]:
    """The micro-batches of the first steps of a single process."""
    stream = TrainStream(config, 0, 1)
    found = list(itertools.chain.from_iterable(itertools.islice(stream.steps(0), steps)))
    stream.close()
    return found


def evaluate_run(place: Place, run: Path, **data: Any) -> dict[str, Any]:
    """Metrics of a run's model, and for classifiers the predictions by sample id."""
    pretrained = load(run)
    config = pretrained.config
    if data:
        config = replace(config, data=from_dict(type(config.data), {**to_dict(config.data), **data}))
    if config.task in CLASSIFIERS:
        classified = classify(pretrained, config, place)
        return {"metrics": classified.metrics, "predictions": classified.predictions}
    return {"metrics": retrieve(pretrained, config, place)}
