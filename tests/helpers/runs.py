"""Short runs of the toy task for engine tests: what each step did, as plain numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_deepspeed.config import CheckpointConfig, OptimConfig, RunConfig, TrainConfig
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.evaluate import reduce_report
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.optim import lr_factor, set_learning_rates
from mt_deepspeed.engine.store import folder_name
from mt_deepspeed.engine.weights import read_weights
from tests.helpers.toy import Batch, ToyStream, ToyTask, make_task

GLOBAL_BATCH = 8
CPU_OPTIMIZER = {"device": "cpu"}


class ExtraSometimes(ToyStream):
    """The head `extra` takes part in steps 0 and 3 only."""

    def batch(self, step: int, positions: list[int]) -> Batch:
        import torch

        batch = super().batch(step, positions)
        if step in (0, 3):
            batch["use_extra"] = torch.ones(len(positions))
        return batch


@dataclass(frozen=True)
class Case:
    """One configuration of a short run."""

    stage: int = 0
    micro: int = 8
    """Samples per rank and forward pass."""
    steps: int = 20
    precision: str = "fp32"
    checkpointing: int = 0
    clip: float = 0.0
    dropout: float = 0.0
    zero: dict[str, Any] = field(default_factory=dict)
    ds: dict[str, Any] = field(default_factory=dict)
    stream: type[ToyStream] = ToyStream

    def ds_config(self) -> dict[str, Any]:
        """Small buckets and no persistent parameters, so that all of DeepSpeed's paths are walked."""
        zero = {"stage": self.stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        return {"zero_optimization": {**zero, **self.zero}, **self.ds}

    def run_config(self, run_dir: str = "runs/never-written") -> RunConfig:
        return RunConfig(
            run_dir=run_dir,
            train=TrainConfig(
                max_steps=self.steps,
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=self.micro,
                precision=self.precision,  # type: ignore[arg-type]
                activation_checkpointing=self.checkpointing,
                log_every_steps=1,
                eval_every_steps=0,
                max_skipped_steps=3,
            ),
            optim=OptimConfig(lr=8e-3, warmup=2, max_grad_norm=self.clip),
            checkpoint=CheckpointConfig(every_steps=4, best_metric=""),
        )


def run_steps(
    place: Place, case: Case, on_task: Callable[[ToyTask], None] | None = None
) -> list[dict[str, float]]:
    """Per step: global losses, accuracies, gradient norm (`norm`), and whether the step was applied."""
    config = case.run_config()
    task = make_task(case.dropout)
    if on_task:
        on_task(task)
    session = build(config, case.ds_config(), task, place)
    stream = case.stream(GLOBAL_BATCH, case.micro, place.rank, place.world_size).steps(0)
    history = []
    for step in range(case.steps):
        set_learning_rates(session.optimizer, lr_factor(step, config.optim, case.steps))
        result = session.stepper.step(step, next(stream), {})
        found = reduce_report(result.report, place.device)
        history.append({**found, "norm": result.grad_norm, "applied": float(result.applied)})
    session.engine.destroy()
    return history


def run_cases(place: Place, cases: dict[str, Case]) -> dict[str, list[dict[str, float]]]:
    """`run_steps` of every case, by name."""
    return {name: run_steps(place, case) for name, case in cases.items()}


def largest_difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Over all steps and figures; runs of different length differ infinitely."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a[key] - b[key]) for a, b in zip(one, other, strict=True) for key in a)


def with_run_dir(case: Case, run_dir: Path, **checkpoint: Any) -> RunConfig:
    """The case's configuration with another run folder and checkpoint settings."""
    config = case.run_config(str(run_dir))
    return replace(config, checkpoint=replace(config.checkpoint, **checkpoint))


class StopHere(Exception):
    """Raised by a stream in place of a step: the run ends as if killed there."""


def train_until(
    place: Place, case: Case, run_dir: Path, stop: int | None, resume: str = "auto", kill: bool = False
) -> None:
    """`engine.loop.train` of the toy task; ends before step `stop` (None: at the last).

    Args:
        kill: End by SIGKILL instead of an exception.
    """
    import os
    import signal

    from mt_deepspeed.engine.loop import train
    from mt_deepspeed.engine.watchdog import Watchdog

    class Interrupted(case.stream):  # type: ignore[name-defined, misc]
        def steps(self, first_step: int) -> Any:
            for step, batches in enumerate(super().steps(first_step), first_step):
                if step == stop:
                    if kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise StopHere
                yield batches

    stream = Interrupted(GLOBAL_BATCH, case.micro, place.rank, place.world_size)
    # A killed run must have its last checkpoint on disk.
    config = with_run_dir(case, run_dir, resume=resume, background=not kill)
    watchdog = Watchdog(config, place.rank, place.world_size)
    try:
        train(config, case.ds_config(), make_task(case.dropout), stream, None, place, watchdog)
    except StopHere:
        assert stream.closed
    else:
        assert stop is None


def logged(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> training figures of `metrics.jsonl`; a step that was repeated counts with its last record."""
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["step"]] = {key: value for key, value in record.items() if key.startswith("train/")}
    return found


def final_weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights of the checkpoint of a step."""
    return dict(read_weights(run_dir / "checkpoints" / folder_name(step)))
