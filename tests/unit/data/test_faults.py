"""What is wrong with data or configuration is told: before training where possible, by name always."""

import dataclasses
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from mt_deepspeed.config.model import TextTowerConfig
from mt_deepspeed.config.run import DatasetConfig
from mt_deepspeed.data.pipeline import TrainStream
from mt_deepspeed.data.shards import ShardReadError
from tests.helpers.datasets import VOCABULARY, configuration, make_rows, write_dataset


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_names_file_row_and_reason(root: Path, tmp_path: Path, num_workers: int) -> None:
    bad = make_rows(12)
    bad[7]["image"] = bad[7]["image"][:-40]
    write_dataset(tmp_path / "bad", {"train": bad}, rows_per_shard=5)
    config = configuration(root, train=(DatasetConfig(path=str(tmp_path / "bad")),), num_workers=num_workers)
    stream = TrainStream(config, 0, 1)
    with pytest.raises(
        ShardReadError, match=r"train-00001\.arrow: row 2: image 'picture-0-7\.jpg': cannot decode"
    ):
        list(itertools.islice(stream.steps(0), 20))
    stream.close()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"train": ()}, "data.train: empty"),
    "half weighted": (
        {"train": (DatasetConfig(path="one", weight=1.0), DatasetConfig(path="two"))},
        "1 of 2 data sets have a weight",
    ),
    "weight in evaluation": ({"eval": (DatasetConfig(path="one", weight=1.0),)}, "weights have no meaning"),
    "no folder": ({"train": (DatasetConfig(path="three"),)}, "three"),
    "no split": ({"train": (DatasetConfig(path="one", splits=("test",)),)}, "choose from"),
    "evaluation unreadable": ({"eval": (DatasetConfig(path="three"),)}, "three"),
    "no tokenizer": ({"tokenizer": "one"}, r"vocab\.json"),
    "long texts": ({"max_text_len": 39}, "choose 3 to 38"),
    "few pairs": ({"global_batch_size": 1000}, "fewer than train.global_batch_size 1000"),
    "no multiple": ({"global_batch_size": 9}, "no multiple"),
    "transform": ({"train_transform": "crop"}, "train_transform 'crop'"),
    "random evaluation": ({"eval_transform": "clip_randaug"}, "eval_transform 'clip_randaug'"),
    "micro-batch of one": (
        {"micro_batch_size": 1, "itm_negatives": "in_batch"},
        "needs train.micro_batch_size >= 2",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_before_training(root: Path, name: str) -> None:
    changes, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        TrainStream(configuration(root, **changes), 0, 1)


def test_tokenizer_and_model_must_fit(root: Path) -> None:
    config = configuration(root)
    for text, message in (
        (TextTowerConfig(vocab_size=500), r"has 320 tokens, model\.text\.vocab_size is 500"),
        (TextTowerConfig(vocab_size=VOCABULARY, pad_token_id=0), "pads with 1"),
    ):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
        with pytest.raises(ValueError, match=message):
            TrainStream(other, 0, 1)


def test_one_image_gives_no_negatives(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "lonely", {"train": make_rows(1)})
    with pytest.raises(ValueError, match="at least two images"):
        TrainStream(configuration(root, train=(DatasetConfig(path=str(tmp_path / "lonely")),)), 0, 1)


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_run(root: Path) -> None:
    stream = TrainStream(configuration(root, num_workers=1, worker_kind="process"), 0, 1)
    steps = stream.steps(0)
    next(steps)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    # DataLoader names the worker, unless it died while handing over a batch: then the connection breaks.
    with pytest.raises((RuntimeError, EOFError, ConnectionError)):
        list(itertools.islice(steps, 100))
