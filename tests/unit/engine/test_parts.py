"""Small parts: loss scale, guards, seeds, monitor, activation checkpointing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from mt_deepspeed.engine.activation_checkpointing import wrap_layers
from mt_deepspeed.engine.gpus import peak_tflops
from mt_deepspeed.engine.gradients import EngineError, StepGuard
from mt_deepspeed.engine.loop import evaluation_due
from mt_deepspeed.engine.monitor import clock, heatmap, throughput
from mt_deepspeed.engine.precision import LossScale
from mt_deepspeed.engine.resuming import differences
from mt_deepspeed.engine.step import derive_seed, norm_is_finite


def test_loss_scale_halves_and_doubles() -> None:
    scale = LossScale.for_precision("fp16")
    scale.update(overflow=True)
    assert scale.value == 2.0**15
    for _ in range(scale.growth_interval):
        scale.update(overflow=False)
    assert scale.value == 2.0**16
    for _ in range(40):
        scale.update(overflow=True)
    assert scale.value == 1.0
    assert not scale.absorbs_overflow()  # from here on a non-finite gradient is a fault


def test_loss_scale_is_one_without_fp16() -> None:
    scale = LossScale.for_precision("bf16")
    scale.update(overflow=True)
    assert (scale.value, scale.absorbs_overflow()) == (1.0, False)


class FakeEngine:
    """Calls the optimizer, or (as DeepSpeed may) leaves it out in silence."""

    def __init__(self, optimizer: torch.optim.Optimizer, silent: bool) -> None:
        self.optimizer, self.silent = optimizer, silent

    def step(self) -> None:
        if not self.silent:
            self.optimizer.step()


def guarded(silent: bool) -> tuple[nn.Parameter, FakeEngine, StepGuard]:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    guard = StepGuard(optimizer)
    return parameter, FakeEngine(optimizer, silent), guard


def test_guard_blocks_the_update() -> None:
    parameter, engine, guard = guarded(silent=False)
    guard.apply(engine, skip=True)
    assert parameter.tolist() == [1.0, 1.0]
    guard.apply(engine, skip=False)
    assert parameter.tolist() == [0.5, 0.5]


def test_guard_notices_a_step_skipped_in_silence() -> None:
    _, engine, guard = guarded(silent=True)
    guard.apply(engine, skip=True)
    with pytest.raises(EngineError, match="no weight moved"):
        guard.apply(engine, skip=False)


def test_seeds_differ_by_step_and_micro_batch() -> None:
    seeds = {derive_seed(seed, step, number) for seed in (0, 1) for step in range(5) for number in range(4)}
    assert len(seeds) == 40
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2)


def test_norm_is_finite() -> None:
    assert [norm_is_finite(value) for value in (0.0, 1e30, float("inf"), float("nan"))] == [
        True,
        True,
        False,
        False,
    ]


def test_evaluation_is_due_on_schedule_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if evaluation_due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if evaluation_due(step, 0, 7)] == [7]


def test_configuration_differences_are_listed_by_path() -> None:
    before = {"optim": {"lr": 1.0, "betas": [0.9, 0.98]}, "old": 1}
    now = {"optim": {"lr": 2.0, "betas": [0.9, 0.98]}, "new": 1}
    assert differences(before, now) == ["optim.lr: 1.0 -> 2.0", "old: 1 -> None", "new: None -> 1"]


def test_peaks_of_known_gpus() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA A10") == 125.0
    assert peak_tflops("NVIDIA L40S") == 362.0
    assert peak_tflops("Some CPU") is None


def test_throughput_on_a_cpu_has_no_mfu() -> None:
    cpu = torch.device("cpu")
    assert throughput(10.0, 2e12, "bf16", cpu, 2) == {"speed/tflops_per_device": 10.0}
    assert throughput(10.0, None, "bf16", cpu, 2) == {}


def test_heatmap_and_clock() -> None:
    picture = heatmap(torch.tensor([[0.0, 1.0, 0.5]]))
    assert (tuple(picture.shape), picture.dtype) == ((16, 48, 3), torch.uint8)
    assert not torch.equal(picture[0, 0], picture[0, 16])
    assert heatmap(torch.ones(2, 2)).shape == (32, 32, 3)  # constant: no division by 0
    assert clock(3_725.4) == "1:02:05"


class Layer(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


def test_layers_are_given_aliases_that_may_be_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's activation offload replaces the storage of what it is given; managers read it again."""

    def emptying(function: Any, *args: Any) -> Any:
        result = function(*args)
        for value in args:
            if torch.is_tensor(value):
                value.data = torch.empty(0)
        return result

    layers = [Layer(3, 3) for _ in range(4)]
    task = SimpleNamespace(checkpointable_layers=lambda: layers)
    monkeypatch.setattr(deepspeed.checkpointing, "configure", lambda *args, **kwargs: None)
    monkeypatch.setattr(deepspeed.checkpointing, "non_reentrant_checkpoint", emptying)
    assert wrap_layers(task, 2, {}) == 2  # type: ignore[arg-type]
    x, mask = torch.randn(2, 3, requires_grad=True), torch.ones(2, 1)
    states = [x]
    for layer in layers:
        states.append(layer(states[-1], mask=mask))
    assert [tuple(state.shape) for state in states] == [(2, 3)] * 5
    assert mask.shape == (2, 1)
    with torch.no_grad():
        layers[0](x)
    assert x.shape == (2, 3)


def test_checkpointing_needs_layers() -> None:
    with pytest.raises(ValueError, match="offers no checkpointable_layers"):
        wrap_layers(SimpleNamespace(), 1, {})  # type: ignore[arg-type]
