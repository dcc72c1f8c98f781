"""CIFAR and GLUE from raw files: converted, learned by one tower of a pre-trained model, evaluated on any ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.cli import main
from mt_deepspeed import evaluate as command
from mt_deepspeed.config import CheckpointConfig, RunConfig
from mt_deepspeed.data.text import train_tokenizer
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.export import export
from mt_deepspeed.pretrained.loading import load
from mt_deepspeed.pretrained.starting_weights import check_start, load_starting_weights
from mt_deepspeed.tasks import build_task
from tests.helpers.datasets import VOCABULARY, make_rows, write_dataset
from tests.helpers.probe_files import glue_samples, write_cifar10, write_glue
from tests.helpers.ranks import run_ranks
from tests.helpers.task_runs import evaluate_run, task_config, train_run

GLUE = {"sst2": ("sst2-dev",), "mnli": ("mnli-dev_matched", "mnli-dev_mismatched"), "stsb": ("stsb-dev",)}
RUNS = ("cifar", *GLUE)
SHORT: dict[str, Any] = {"max_steps": 2, "global_batch_size": 6, "micro_batch_size": 3}
LONG: dict[str, Any] = {
    "max_steps": 60,
    "global_batch_size": 32,
    "micro_batch_size": 16,
    "eval_every_steps": 20,
}


def settings(root: Path, name: str) -> RunConfig:
    """A run of that name: CIFAR and SST-2 long enough to learn something, MNLI and STS-B for two steps."""
    changes: dict[str, Any] = {
        "checkpoint": {"init_from": str(root / "pretrain")},
        "optim": {"lr": 3e-3, "head_lr_multiplier": 3.0},
        "train": LONG if name in ("cifar", "sst2") else SHORT,
    }
    if name == "cifar":
        data = {"train_transform": "clip", "eval_transform": "clip", "tokenizer": "never-read"}
        return task_config(root, "cifar", root / name, classifier={"num_answers": 10}, data=data, **changes)
    changes["data"] = {
        "max_text_len": 30,
        "train": [{"path": "glue", "splits": [f"{name}-train"]}],
        "eval": [{"path": "glue", "splits": [split]} for split in GLUE[name]],
    }
    return task_config(root, "glue", root / name, glue={"name": name}, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of raw files, a pre-trained two-tower run, and a run of each kind started from it."""
    folder = tmp_path_factory.mktemp("probes")
    write_cifar10(folder / "raw", train=20, test=31, classes=2)
    write_glue(folder / "raw", ("SST-2", "MNLI", "STS-B"), train=90, dev=31)
    for name in ("cifar10", "glue"):
        convert = ["convert", name, "--raw", str(folder / "raw"), "--out", str(folder / name)]
        assert main([*convert, "--workers", "1"]) == 0
    write_dataset(folder / "captions", {"train": make_rows(14), "val": make_rows(5, seed=50)})
    texts = [
        f"{first} {second}" for one in ("SST-2", "MNLI") for first, second, _ in glue_samples(one, 60, 0)
    ]
    train_tokenizer(texts, folder / "tokenizer", VOCABULARY)
    run_ranks(2, train_everything, folder)
    return folder


def train_everything(place: Place, root: Path) -> None:
    train_run(place, task_config(root, "pretrain", root / "pretrain"))
    for name in RUNS:
        assert "eval/score" in train_run(place, settings(root, name)), name


def evaluate_everything(place: Place, root: Path) -> dict[str, Any]:
    return {name: evaluate_run(place, root / name) for name in RUNS}


def test_learned_and_the_same_on_any_number_of_ranks(root: Path) -> None:
    alone = run_ranks(1, evaluate_everything, root)[0]
    assert alone["cifar"]["metrics"]["accuracy"] > 0.9
    assert alone["sst2"]["metrics"]["accuracy"] > 0.9
    assert alone["stsb"]["metrics"].keys() == {"glue_loss", "spearman", "pearson"}
    mnli = alone["mnli"]["metrics"]
    each = [mnli[f"accuracy/mnli-dev_{one}"] for one in ("matched", "mismatched")]
    assert mnli["accuracy"] == pytest.approx(sum(each) / 2)
    assert alone["mnli"]["predictions"].keys() == set(range(62))
    for found in run_ranks(3, evaluate_everything, root):
        for name, wanted in alone.items():
            assert found[name]["predictions"] == pytest.approx(wanted["predictions"], rel=1e-4), name
            assert found[name]["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4), name


def by_command(place: Place, commands: list[list[str]]) -> list[dict[str, float]]:
    return [command.figures(place, command.parse(arguments)) for arguments in commands]


def test_the_command_evaluates_runs_and_exports(root: Path, tmp_path: Path) -> None:
    commands = []
    for name, folder, split in (("cifar", "cifar10", "test"), ("stsb", "glue", "stsb-dev")):
        export(load(root / name), tmp_path / name)
        assert (tmp_path / name / "vocab.json").exists() == (name == "stsb")
        data = ["--shards", str(root / folder), "--splits", split, "--precision", "fp32"]
        commands += [["--checkpoint", str(place / name), *data] for place in (root, tmp_path)]
    cifar, cifar_again, stsb, stsb_again = run_ranks(1, by_command, commands)[0]
    assert cifar_again == pytest.approx(cifar)
    assert stsb_again == pytest.approx(stsb, rel=1e-4)
    assert cifar["accuracy"] > 0.9
    assert "spearman" in stsb
    assert load(root / "cifar").labels == tuple(f"class {i}" for i in range(10))
    with pytest.raises(ValueError, match="a model of task glue is the text tower alone"):
        load(root / "sst2").fill_mask("none.png", "a <mask>")


def test_only_the_own_tower_must_be_that_of_the_start(root: Path) -> None:
    start = {"init_from": str(root / "pretrain")}
    other_vision: dict[str, Any] = {"model": {"vision": {"num_heads": 4}}, "checkpoint": start}
    check_start(task_config(root, "glue", **other_vision))
    with pytest.raises(ValueError, match=r"model\.vision\.num_heads is 4, there 2"):
        check_start(task_config(root, "cifar", **other_vision))


@pytest.mark.parametrize("name", ["cifar", "stsb"])
def test_an_exported_model_starts_a_probe_as_its_run_does(root: Path, tmp_path: Path, name: str) -> None:
    export(load(root / "pretrain"), tmp_path / "exported")
    towers = []
    for start in (root / "pretrain", tmp_path / "exported"):
        config = replace(settings(root, name), checkpoint=CheckpointConfig(init_from=str(start)))
        check_start(config)
        task: Any = build_task(config)
        drawn = {key: value.clone() for key, value in task.model.state_dict().items()}
        load_starting_weights(task, config)
        towers.append(task.model.state_dict())
        assert any(not torch.equal(value, drawn[key]) for key, value in towers[-1].items())
    from_run, from_export = towers
    assert from_run.keys() == from_export.keys()
    assert all(torch.equal(value, from_export[key]) for key, value in from_run.items())
