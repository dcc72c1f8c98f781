"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.build import Session, build
from mt_deepspeed.engine.evaluate import evaluate
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.monitor import Monitor
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.optim import lr_factor, set_learning_rates
from mt_deepspeed.engine.protocols import Batch, SampleStream, Task

log = logging.getLogger(__name__)

EvalBatches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    """Optimizer steps made, over all starts of the run."""
    metrics: dict[str, float]
    """The latest value of everything that was logged."""


def train(
    config: RunConfig,
    ds_config: dict[str, Any],
    task: Task,
    stream: SampleStream,
    eval_batches: EvalBatches | None,
    place: Place,
) -> TrainResult:
    """Trains until `train.max_steps`; call on all ranks after `launch.init`.

    Args:
        ds_config: As `ds_config.load_ds_config` returns it.
        task: Built, with its starting weights, on the CPU or the device.
        stream: This rank's samples; closed at the end.
        eval_batches: Makes this rank's finite evaluation batches; None: no evaluation.
    """
    session = build(config, ds_config, task, place)
    flops: Callable[[], float] | None = getattr(task, "flops_per_sample", None)
    run_dir = Path(config.run_dir)
    monitor = Monitor(
        run_dir,
        config.train.max_steps,
        config.train.log_every_steps,
        config.train.precision,
        place.device,
        flops() if flops else None,
    )
    policy = NonFinitePolicy(config.train.max_skipped_steps, run_dir)
    try:
        step = _steps(session, stream, eval_batches, monitor, policy)
    finally:
        stream.close()
        monitor.close()
    return TrainResult(step, monitor.latest)


def _steps(
    session: Session,
    stream: SampleStream,
    eval_batches: EvalBatches | None,
    monitor: Monitor,
    policy: NonFinitePolicy,
) -> int:
    train_config, optim = session.config.train, session.config.optim
    step = 0
    batches = stream.steps(step)
    session.engine.train()
    while step < train_config.max_steps:
        started = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - started
        rates = set_learning_rates(session.optimizer, lr_factor(step, optim, train_config.max_steps))
        result = session.stepper.step(step, micro_batches, {})
        policy.check(step, result, session.loss_scale.value)
        step += 1
        monitor.add(result, waited, time.perf_counter() - started)
        if monitor.due(step):
            monitor.write_step(step, rates, {})
        if eval_batches and evaluation_due(step, train_config.eval_every_steps, train_config.max_steps):
            metrics = evaluate(session.engine, eval_batches(), session.place.device)
            metrics["score"] = session.task.score(metrics)
            monitor.write(step, {f"eval/{name}": value for name, value in metrics.items()})
            monitor.write_pictures(step, session.engine("heatmaps"))
            log.info("step %d evaluation: %s", step, " ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return step


def evaluation_due(step: int, every: int, max_steps: int) -> bool:
    """Whether to evaluate after step `step` (1-based): every `every` steps and after the last."""
    return step == max_steps or (every > 0 and step % every == 0)
