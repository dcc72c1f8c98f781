"""The real model under every shipped DeepSpeed file: five steps equal those of one rank without ZeRO.

Dropout, manager noise and activation checkpointing are on: both are seeded by the micro-batch, so they are the
same at any number of ranks. Tolerance as in engine/test_equivalence.py, for losses and norms near 5.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.config import ObjectivesConfig, OptimConfig, RunConfig, TrainConfig
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.ds_config import load_ds_config
from mt_deepspeed.engine.evaluate import reduce_report
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.tasks.pretrain import PretrainTask
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import largest_difference
from tests.unit.tasks.test_pretrain import tiny_batch, tiny_model

FOLDER = Path(__file__).parents[2] / "ds_configs"
# NVMe needs a device and libaio.
FILES = sorted(path.name for path in FOLDER.glob("*.json") if path.name != "zero_infinity.json")
STEPS, MICRO, GLOBAL = 5, 4, 8
TOLERANCE = 1e-4


def settings(checkpointing: int) -> RunConfig:
    model = tiny_model("aaue")
    model = dataclasses.replace(
        model,
        text=dataclasses.replace(model.text, dropout=0.1),
        cross_modal=dataclasses.replace(model.cross_modal, dropout=0.1),
        link=dataclasses.replace(model.link, noise=True),
    )
    train = TrainConfig(
        max_steps=STEPS,
        global_batch_size=GLOBAL,
        micro_batch_size=MICRO,
        precision="fp32",
        activation_checkpointing=checkpointing,
    )
    return RunConfig(model=model, train=train, optim=OptimConfig(lr=1e-3, warmup=1))


def micro_batches(step: int, place: Place) -> Iterator[dict[str, torch.Tensor]]:
    share = GLOBAL // MICRO // place.world_size
    for number in range(place.rank * share, (place.rank + 1) * share):
        yield tiny_batch(seed=10 * step + number, rows=MICRO, false_images=2)


def train_with(place: Place, file: str, checkpointing: int) -> list[dict[str, float]]:
    config = settings(checkpointing)
    ds_config = load_ds_config(FOLDER / file)
    zero: dict[str, Any] = ds_config["zero_optimization"]
    for key in (
        "offload_optimizer",
        "offload_param",
    ):  # torch's Adam: DeepSpeed's own is compiled for a minute
        if key in zero:
            zero[key] = {**zero[key], "pin_memory": False}
            ds_config["zero_force_ds_cpu_optimizer"] = False
    torch.manual_seed(0)
    task = PretrainTask(config.model, ObjectivesConfig())
    session = build(config, ds_config, task, place)
    session.engine.train()
    history = []
    for step in range(STEPS):
        result = session.stepper.step(step, list(micro_batches(step, place)), {})
        history.append({**reduce_report(result.report, place.device), "norm": result.grad_norm})
    session.engine.destroy()
    return history


def train_with_all(place: Place) -> dict[str, list[dict[str, float]]]:
    runs = {file: train_with(place, file, 0) for file in FILES}
    return runs | {
        f"{file}, checkpointed": train_with(place, file, 1) for file in ("zero2.json", "zero3.json")
    }


@pytest.fixture(scope="module")
def histories() -> dict[str, list[dict[str, float]]]:
    reference = run_ranks(1, train_with, "zero0.json", 0)[0]
    return {"one rank": reference, **run_ranks(2, train_with_all, timeout_s=500)[0]}


@pytest.mark.parametrize("name", [*FILES, "zero2.json, checkpointed", "zero3.json, checkpointed"])
def test_two_ranks_equal_one(histories: dict[str, list[dict[str, float]]], name: str) -> None:
    assert histories["one rank"][0]["norm"] > 0
    assert largest_difference(histories[name], histories["one rank"]) < TOLERANCE


def test_the_task_trains(histories: dict[str, list[dict[str, float]]]) -> None:
    first, last = histories["one rank"][0], histories["one rank"][-1]
    assert first.keys() == last.keys()
    assert first["loss/mlm"] != last["loss/mlm"]
