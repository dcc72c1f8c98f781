"""Batches of tasks with one tower: pictures without texts, texts without pictures, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.cli import main
from mt_deepspeed.config import ConfigError, RunConfig
from mt_deepspeed.data.pipeline import TrainStream, eval_batches, eval_sample_ids
from mt_deepspeed.data.shards import ShardReadError
from mt_deepspeed.data.text import load_tokenizer, train_tokenizer
from tests.helpers.datasets import VOCABULARY, write_dataset
from tests.helpers.probe_files import glue_samples, write_cifar10, write_glue
from tests.helpers.task_runs import task_config, training_batches


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    write_cifar10(folder / "raw")
    write_glue(folder / "raw")
    for name in ("cifar10", "glue"):
        command = ["convert", name, "--raw", str(folder / "raw"), "--out", str(folder / name)]
        assert main([*command, "--workers", "1"]) == 0
    texts = [f"{first} {second}" for first, second, _ in glue_samples("MNLI", 60, 0)]
    train_tokenizer(texts, folder / "tokenizer", VOCABULARY)
    return folder


def cifar(root: Path, **classifier: Any) -> RunConfig:
    data = {"train_transform": "clip", "eval_transform": "clip", "tokenizer": "never-read"}
    return task_config(root, "cifar", classifier={"num_answers": 10, **classifier}, data=data)


def glue(root: Path, name: str, *dev: str, **data: Any) -> RunConfig:
    sets = [{"path": "glue", "splits": [f"{name}-{one}"]} for one in dev or ("dev",)]
    train = [{"path": "glue", "splits": [f"{name}-train"]}]
    changes = {"train": train, "eval": sets, "max_text_len": 30, **data}
    return task_config(root, "glue", glue={"name": name}, data=changes)


def test_cifar_has_pictures_and_no_texts(root: Path) -> None:
    for batch in training_batches(cifar(root)):
        assert batch.keys() == {"pixels", "labels", "sample_ids", "dataset_ids"}
        assert batch["pixels"].shape == (3, 3, 16, 16)
        red = batch["pixels"][:, 0].double().mean(dim=(1, 2))
        assert torch.equal(((red - 10) / 25).round().long(), 7 * batch["labels"] % 10)
    assert TrainStream(cifar(root), 0, 1).answers == [f"class {i}" for i in range(10)]


def test_glue_has_texts_and_no_pictures(root: Path) -> None:
    config = glue(root, "mnli", "dev_matched", "dev_mismatched")
    tokenizer = load_tokenizer("tokenizer", root, 30)
    samples = glue_samples("MNLI", 7, 0)
    classes = ("contradiction", "neutral", "entailment")
    seen = set()
    for batch in training_batches(config):
        assert batch.keys() == {"text_ids", "text_mask", "labels", "sample_ids", "dataset_ids"}
        assert batch["labels"].dtype == torch.int64
        for row, sample in enumerate(batch["sample_ids"].tolist()):
            first, second, label = samples[sample]
            a, b = (tokenizer.encode(text).ids.tolist() for text in (first, second))
            wanted = [*a, tokenizer.eos_id, *b[1:]]  # <s> a </s></s> b </s>
            assert batch["text_ids"][row][batch["text_mask"][row].bool()].tolist() == wanted
            assert batch["labels"][row] == classes.index(label)
            seen.add(sample)
    assert seen == set(range(7))
    sets = torch.cat([batch["dataset_ids"] for batch in eval_batches(config, 0, 1)])
    assert sets.tolist() == [0] * 5 + [1] * 5
    assert eval_sample_ids(config).tolist() == list(range(10))


def test_single_sentences_and_scores(root: Path) -> None:
    tokenizer = load_tokenizer("tokenizer", root, 30)
    batches = list(eval_batches(glue(root, "cola"), 0, 1))
    first = glue_samples("CoLA", 5, 1)[0][0]
    ids = batches[0]["text_ids"][0][batches[0]["text_mask"][0].bool()]
    assert ids.tolist() == tokenizer.encode(first).ids.tolist()
    (*_, last) = eval_batches(glue(root, "stsb"), 0, 1)
    assert last["labels"].dtype == torch.float32
    assert torch.cat([b["labels"] for b in eval_batches(glue(root, "stsb"), 0, 1)]).tolist() == [
        0,
        2.5,
        5,
        0,
        2.5,
    ]


def test_long_pairs_are_cut_from_the_longer_text(root: Path) -> None:
    config = glue(root, "rte", max_text_len=9)
    tokenizer = load_tokenizer("tokenizer", root, 30)
    for batch in eval_batches(config, 0, 1):
        assert batch["text_ids"].shape[1] == 9
        for ids in batch["text_ids"].tolist():
            inner = ids[1:-1]
            at = inner.index(tokenizer.eos_id)
            assert inner[at + 1] == tokenizer.eos_id
            assert abs(at - (len(inner) - at - 2)) <= 1  # as many tokens of either
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"10 answers, classifier\.num_answers is 100"):
        TrainStream(cifar(root, num_answers=100), 0, 1)
    with pytest.raises(
        (ValueError, ConfigError), match=r"glue\.name is rte: found split 'mnli-train', expected"
    ):
        glue(root, "rte", train=[{"path": "glue", "splits": ["mnli-train"]}])
    row = {"sentences": ["a"], "second_sentences": ["b"], "labels": [2.0], "image_id": "RTE/train.tsv:3"}
    write_dataset(tmp_path / "glue", {"rte-train": [row] * 6, "rte-dev": [row]}, task="glue")
    (tmp_path / "tokenizer").symlink_to(root / "tokenizer")
    with pytest.raises(
        ShardReadError, match=r"row 0: line 'RTE/train.tsv:3': found label 2.0, expected 0 to 1"
    ):
        next(iter(eval_batches(glue(tmp_path, "rte"), 0, 1)))
