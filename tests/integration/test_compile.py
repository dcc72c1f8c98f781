"""Compiled layers train like others, at ZeRO stages 0 to 2, with and without activation checkpointing."""

import dataclasses
from unittest.mock import patch

import pytest
import torch

from mt_deepspeed.config import ObjectivesConfig, OptimConfig, RunConfig, TrainConfig
from mt_deepspeed.engine import compiling
from mt_deepspeed.engine.build import build, plan
from mt_deepspeed.engine.ds_config import DsConfigError
from mt_deepspeed.engine.evaluate import reduce_report
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.tasks.pretrain import PretrainTask
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import largest_difference
from tests.unit.tasks.test_pretrain import tiny_batch, tiny_model

CASES = [(0, 0), (1, 0), (2, 1)]
TOLERANCE = 2e-5


def train_with(place: Place, compiled: bool, stage: int, checkpointing: int) -> list[dict[str, float]]:
    model = tiny_model("aaue")
    model = dataclasses.replace(model, link=dataclasses.replace(model.link, noise=True))
    train = TrainConfig(
        max_steps=3,
        global_batch_size=5,
        micro_batch_size=5,
        precision="fp32",
        activation_checkpointing=checkpointing,
        compile=compiled,
    )
    torch.manual_seed(0)
    task = PretrainTask(model, ObjectivesConfig())
    config = RunConfig(model=model, train=train, optim=OptimConfig(lr=1e-3, warmup=1))
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    session = build(config, {"zero_optimization": zero}, task, place)
    session.engine.train()
    history = []
    for step in range(3):
        result = session.stepper.step(step, [tiny_batch(step)], {})
        history.append({**reduce_report(result.report, place.device), "norm": result.grad_norm})
    session.engine.destroy()
    return history


def differences(place: Place, backend: str, cases: list[tuple[int, int]]) -> dict[str, float]:
    """Largest difference of each case to the run without compilation."""
    plain = train_with(place, False, 0, 0)
    with patch.object(compiling, "BACKEND", backend):
        return {str(case): largest_difference(train_with(place, True, *case), plain) for case in cases}


def test_stage_3_is_refused() -> None:
    config = RunConfig(
        train=TrainConfig(global_batch_size=1, micro_batch_size=1, precision="fp32", compile=True)
    )
    with pytest.raises(DsConfigError, match="stage 3"):
        plan(config, {"zero_optimization": {"stage": 3}}, Place(0, 1, 0, torch.device("cpu")))


def test_layers_are_traced() -> None:
    """All but the generated code: graphs, their derivatives, hooks and recomputation."""
    found = run_ranks(1, differences, "aot_eager", CASES)[0]
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow  # the C++ compiler takes minutes
def test_generated_code() -> None:
    found = run_ranks(1, differences, "inductor", [(2, 1)], timeout_s=900)[0]
    assert max(found.values()) < TOLERANCE, found
