"""The training loop."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mt_deepspeed.config import RunConfig, to_yaml
from mt_deepspeed.engine.agreement import any_of, together
from mt_deepspeed.engine.build import Session, build
from mt_deepspeed.engine.checkpoint import versions
from mt_deepspeed.engine.evaluate import EvaluationInterrupted, evaluate
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.monitor import Monitor
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.optim import lr_factor, set_learning_rates
from mt_deepspeed.engine.protocols import Batch, SampleStream, Task
from mt_deepspeed.engine.saving import Progress, Resume, Saver
from mt_deepspeed.engine.stopping import SAVE, Stop, StopRequests, check_progress, deadline, note_start

log = logging.getLogger(__name__)

EvalBatches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    """Optimizer steps made, over all starts of the run."""
    metrics: dict[str, float]
    """The latest value of everything that was logged."""
    exit_code: Exit
    """What the process should end with."""


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

    Raises:
        NoProgressError: Restarted too often without a new checkpoint.
    """
    identity = {**stream.identity, "global_batch_size": config.train.global_batch_size}
    resume = Resume.find(config, identity)
    stops = _begin(config, place, int(resume.state["step"]) if resume else 0)
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
        Saver(session, policy, identity, progress.step if resume else -1),
        stops,
    )
    try:
        exit_code = run.train(stream, progress)
    finally:
        stream.close()
        run.monitor.close()
    return TrainResult(progress.step, run.monitor.latest, exit_code)


def _begin(config: RunConfig, place: Place, step: int) -> StopRequests:
    """Counts this start from `step`, and watches for what may end the run early; call on all ranks."""
    run_dir, settings = Path(config.run_dir), config.resilience
    lead = place.rank == 0
    end = together(lambda: deadline(os.environ), "reading the job's end")
    restarts = [together(lambda: note_start(run_dir, step, config) if lead else 0, "noting the start")]
    dist.broadcast_object_list(restarts, src=0)
    if step < config.train.max_steps:
        check_progress(restarts[0], settings.max_idle_restarts, run_dir, step)
    return StopRequests(run_dir, lead, end, settings.deadline_margin_s)


@dataclass(frozen=True)
class _Run:
    session: Session
    eval_batches: EvalBatches | None
    monitor: Monitor
    policy: NonFinitePolicy
    saver: Saver
    stops: StopRequests

    def train(self, stream: SampleStream, progress: Progress) -> Exit:
        """Steps from `progress` on, updating it, until the last step or an agreed stop."""
        session, config = self.session, self.session.config.train
        batches = stream.steps(progress.step)
        session.engine.train()
        stop = self._evaluate(progress) if progress.evaluation_due else None
        step_s = 0.0
        while progress.step < config.max_steps and stop is None:
            started = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - started
            rates = set_learning_rates(
                session.optimizer, lr_factor(progress.step, session.config.optim, config.max_steps)
            )
            requests = {"interval": self.saver.minutes_are_over(), **self._wishes(step_s)}
            result = session.stepper.step(progress.step, micro_batches, requests)
            self.policy.check(progress.step, result, session.loss_scale.value)
            progress.step += 1
            progress.adam_steps += result.applied
            step_s = time.perf_counter() - started
            self.monitor.add(result, waited, step_s)
            stop = self.stops.granted(result.requests)
            if stop or self.monitor.due(progress.step):
                self.monitor.write_step(progress.step, rates, self._counters())
            if self.eval_batches and evaluation_due(progress.step, config.eval_every_steps, config.max_steps):
                progress.evaluation_due = True
                stop = stop or self._evaluate(progress)
            if stop or self.saver.due(progress.step, result.requests["interval"] or result.requests[SAVE]):
                self.saver.save(progress)
            if result.requests[SAVE]:
                self.stops.saved()
        return self._end(progress, stop)

    def _end(self, progress: Progress, stop: Stop | None) -> Exit:
        """Leaves word of a stop, unless nothing is left to do."""
        if stop is None or (
            progress.step >= self.session.config.train.max_steps and not progress.evaluation_due
        ):
            return Exit.FINISHED
        self.stops.leave(stop, progress.step)
        return stop.exit_code

    def _wishes(self, step_s: float) -> dict[str, bool]:
        return self.stops.wishes(self.saver.last_save_s, step_s)

    def _evaluate(self, progress: Progress) -> Stop | None:
        """Evaluates, and saves if it was the best so far; returns the stop that came in its middle, if any."""
        device = self.session.place.device

        def stop_wished() -> bool:
            return any(wish for name, wish in self._wishes(0.0).items() if name != SAVE)

        assert self.eval_batches is not None
        try:
            found = evaluate(self.session.engine, self.eval_batches(), device, stop_wished)
        except EvaluationInterrupted:
            return self.stops.granted(any_of(self._wishes(0.0), device))
        progress.evaluation_due = False
        step = progress.step
        found["score"] = self.session.task.score(found)
        metrics = {f"eval/{name}": value for name, value in found.items()}
        self.monitor.write(step, metrics)
        self.monitor.write_pictures(step, self.session.engine("heatmaps"))
        log.info(
            "step %d evaluation: %s", step, " ".join(f"{name} {value:.4g}" for name, value in found.items())
        )
        if self.saver.is_best(metrics):
            self.saver.save(progress, metrics)
        return None

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
