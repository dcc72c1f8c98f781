"""The training loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mt_deepspeed.config import RunConfig, to_yaml
from mt_deepspeed.engine.build import Session, build
from mt_deepspeed.engine.checkpoint import versions
from mt_deepspeed.engine.evaluate import evaluate
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.monitor import Monitor
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.optim import lr_factor, set_learning_rates
from mt_deepspeed.engine.protocols import Batch, SampleStream, Task
from mt_deepspeed.engine.saving import Progress, Resume, Saver

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
    initialise: Callable[[], object] | None = None,
) -> TrainResult:
    """Trains until `train.max_steps`, or continues the run in `run_dir`; call on all ranks after `launch.init`.

    Args:
        ds_config: As `ds_config.load_ds_config` returns it.
        task: Built, on the CPU or the device.
        stream: This rank's samples; closed at the end.
        eval_batches: Makes this rank's finite evaluation batches; None: no evaluation.
        initialise: Fills `task` with its starting weights; not called when a checkpoint is continued.
    """
    identity = {**stream.identity, "global_batch_size": config.train.global_batch_size}
    resume = Resume.find(config, identity)
    if resume:
        resume.prepare(task, config)
    elif initialise is not None:
        initialise()
    session = build(config, ds_config, task, place)
    policy = NonFinitePolicy(config.train.max_skipped_steps, Path(config.run_dir))
    progress = resume.restore(session, policy) if resume else Progress()
    _describe_run(session)
    run = _Run(
        session,
        eval_batches,
        _monitor(session, progress.step),
        policy,
        Saver(session, policy, identity),
    )
    try:
        run.train(stream, progress)
    finally:
        stream.close()
        run.monitor.close()
    return TrainResult(progress.step, run.monitor.latest)


@dataclass(frozen=True)
class _Run:
    session: Session
    eval_batches: EvalBatches | None
    monitor: Monitor
    policy: NonFinitePolicy
    saver: Saver

    def train(self, stream: SampleStream, progress: Progress) -> None:
        """Steps from `progress` on; updates it."""
        session, config = self.session, self.session.config.train
        batches = stream.steps(progress.step)
        session.engine.train()
        while progress.step < config.max_steps:
            started = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - started
            rates = set_learning_rates(
                session.optimizer, lr_factor(progress.step, session.config.optim, config.max_steps)
            )
            requests = {"save": self.saver.minutes_are_over()}
            result = session.stepper.step(progress.step, micro_batches, requests)
            self.policy.check(progress.step, result, session.loss_scale.value)
            progress.step += 1
            progress.adam_steps += result.applied
            self.monitor.add(result, waited, time.perf_counter() - started)
            if self.monitor.due(progress.step):
                self.monitor.write_step(progress.step, rates, self._counters())
            best = self._evaluate(progress.step)
            if best or self.saver.due(progress.step, result.requests["save"]):
                self.saver.save(progress, best)

    def _evaluate(self, step: int) -> dict[str, float] | None:
        """Evaluates if it is time; returns the metrics if they are the best so far."""
        config = self.session.config.train
        if self.eval_batches is None or not evaluation_due(step, config.eval_every_steps, config.max_steps):
            return None
        found = evaluate(self.session.engine, self.eval_batches(), self.session.place.device)
        found["score"] = self.session.task.score(found)
        metrics = {f"eval/{name}": value for name, value in found.items()}
        self.monitor.write(step, metrics)
        self.monitor.write_pictures(step, self.session.engine("heatmaps"))
        log.info(
            "step %d evaluation: %s", step, " ".join(f"{name} {value:.4g}" for name, value in found.items())
        )
        return metrics if self.saver.is_best(metrics) else None

    def _counters(self) -> dict[str, float]:
        counters = {
            "steps/skipped": float(self.policy.skipped),
            "speed/last_save_s": self.saver.last_save_s,
        }
        if self.session.loss_scale.dynamic:
            counters["steps/overflows"] = float(self.policy.overflows)
            counters["train/loss_scale"] = self.session.loss_scale.value
        return counters


def evaluation_due(step: int, every: int, max_steps: int) -> bool:
    """Whether to evaluate after step `step` (1-based): every `every` steps and after the last."""
    return step == max_steps or (every > 0 and step % every == 0)


def _monitor(session: Session, first_step: int) -> Monitor:
    config = session.config
    return Monitor(
        Path(config.run_dir),
        config.train.max_steps,
        config.train.log_every_steps,
        config.train.precision,
        session.place.device,
        getattr(session.task, "flops_per_sample", None),
        first_step,
    )


def _describe_run(session: Session) -> None:
    """Keeps configuration and versions with the run (rank 0)."""
    if session.place.rank != 0:
        return
    run_dir = Path(session.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(session.config), encoding="utf-8")
    for name, value in (("deepspeed.json", session.ds_config), ("versions.json", versions())):
        (run_dir / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
