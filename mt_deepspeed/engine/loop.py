"""The training loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mt_deepspeed.config import RunConfig, to_yaml
from mt_deepspeed.engine.agreement import any_of, together
from mt_deepspeed.engine.build import Session, build
from mt_deepspeed.engine.checkpoint import versions
from mt_deepspeed.engine.evaluate import EvaluationInterrupted, evaluate
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.goodput import Goodput
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.monitor import Monitor
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.optim import lr_factor, set_learning_rates
from mt_deepspeed.engine.protocols import Batch, SampleStream, Task
from mt_deepspeed.engine.resuming import Progress, Resume
from mt_deepspeed.engine.saving import Saver
from mt_deepspeed.engine.spikes import SpikeDetector
from mt_deepspeed.engine.step import StepResult
from mt_deepspeed.engine.stopping import SAVE, Stop, StopRequests, begin
from mt_deepspeed.engine.stragglers import Stragglers
from mt_deepspeed.engine.watchdog import Watchdog

log = logging.getLogger(__name__)

INTERVAL, WRITING = "interval", "writing"
"""Requests of the loop itself: a save by the clock; some rank still writes the one before."""

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
    watchdog: Watchdog,
    initialise: Callable[[], object] | None = None,
) -> TrainResult:
    """Trains until `train.max_steps`, or continues the run in `run_dir`; call on all ranks after `launch.init`.

    Args:
        ds_config: As `ds_config.load_ds_config` returns it.
        task: Built, on the CPU or the device.
        stream: This rank's samples; closed at the end.
        eval_batches: Makes this rank's finite evaluation batches; None: no evaluation.
        watchdog: Is told how this rank gets on.
        initialise: Fills `task` with its starting weights; not called when a checkpoint is continued.

    Raises:
        NoProgressError: Restarted too often without a new checkpoint.
        RanksFailedError: Some rank could not read its samples.
        CheckpointError: A save failed, or there is none to continue.
    """
    identity = {**stream.identity, "global_batch_size": config.train.global_batch_size}
    lead = place.rank == 0
    goodput = together(lambda: Goodput(Path(config.run_dir), lead, psutil.Process().create_time()), "goodput")
    resume = Resume.find(config, identity)
    stops = begin(config, lead, int(resume.state["step"]) if resume else 0)
    if resume:
        resume.prepare(task, config)
    elif initialise is not None:
        initialise()
    session = build(config, ds_config, task, place)
    policy = NonFinitePolicy(config.train.max_skipped_steps, Path(config.run_dir))
    progress = resume.restore(session, policy) if resume else Progress()
    goodput.resume(progress.step, progress.productive_s)
    _describe_run(session)
    run = _Run(
        session,
        eval_batches,
        _monitor(session, progress.step),
        policy,
        Saver(session, policy, identity, progress.step if resume else -1),
        stops,
        watchdog,
        goodput,
        Stragglers(Path(config.run_dir), place.device),
        SpikeDetector(Path(config.run_dir), config.train.spike_threshold),
    )
    try:
        exit_code = run.train(stream, progress)
    finally:
        run.saver.close()
        stream.close()
        run.monitor.close()
    return TrainResult(progress.step, run.monitor.latest, exit_code)


@dataclass(frozen=True)
class _Run:
    session: Session
    eval_batches: EvalBatches | None
    monitor: Monitor
    policy: NonFinitePolicy
    saver: Saver
    stops: StopRequests
    watchdog: Watchdog
    goodput: Goodput
    stragglers: Stragglers
    spikes: SpikeDetector

    def train(self, stream: SampleStream, progress: Progress) -> Exit:
        """Steps from `progress` on, updating it, until the last step or an agreed stop."""
        config = self.session.config.train
        batches = stream.steps(progress.step)
        self.session.engine.train()
        stop = self._evaluate(progress) if progress.evaluation_due else None
        self.goodput.switch("productive")
        first, step_s = progress.step, 0.0
        while progress.step < config.max_steps and stop is None:
            result, rates, step_s = self._step(batches, progress, step_s, patient=progress.step == first)
            stop = self.stops.granted(result.requests)
            if stop or self.monitor.due(progress.step):
                self._report(progress.step, rates, stream.counters)
            if self.eval_batches and evaluation_due(progress.step, config.eval_every_steps, config.max_steps):
                progress.evaluation_due = True
                stop = stop or self._evaluate(progress)
            if not result.requests[WRITING]:
                self.saver.collect()
            if stop or self.saver.due(progress.step, result.requests[INTERVAL] or result.requests[SAVE]):
                self._save(progress, wait=stop is not None or result.requests[SAVE])
            if result.requests[SAVE]:
                self.stops.saved()
        self.saver.collect()
        return self._end(progress, stop)

    def _step(
        self, batches: Iterator[list[Batch]], progress: Progress, last_s: float, patient: bool
    ) -> tuple[StepResult, dict[str, float], float]:
        """One step: its result, learning rates and seconds."""
        session = self.session
        started = time.perf_counter()
        self.watchdog.beat("reading samples", progress.step, patient)
        with self.goodput.time("data_wait"):
            micro_batches = self._read(batches, patient)
        waited = time.perf_counter() - started
        rates = set_learning_rates(
            session.optimizer, lr_factor(progress.step, session.config.optim, session.config.train.max_steps)
        )
        requests = {
            INTERVAL: self.saver.time_is_over(),
            WRITING: self.saver.writing(),
            **self._wishes(last_s),
        }
        result = session.stepper.step(
            progress.step, micro_batches, requests, lambda doing: self.watchdog.beat(doing, patient=patient)
        )
        self.policy.check(progress.step, result, session.loss_scale.value)
        if result.applied:
            ids = [int(one) for batch in micro_batches for one in batch["sample_ids"]]
            self.spikes.add(progress.step, result.loss, result.grad_norm, ids)
        progress.step += 1
        progress.adam_steps += result.applied
        step_s = time.perf_counter() - started
        self.monitor.add(result, waited, step_s)
        self.stragglers.add(step_s=step_s, data_wait_s=waited, forward_s=result.forward_s)
        return result, rates, step_s

    def _read(self, batches: Iterator[list[Batch]], patient: bool) -> list[Batch]:
        """This rank's micro-batches; a rank that cannot read stops all of them, with one message."""
        found: list[Batch] = []
        error: Exception | None = None
        try:
            found = next(batches)
        except (OSError, RuntimeError, ValueError) as caught:
            error = caught
        self.watchdog.beat("waiting for the others' samples", patient=patient)
        if any_of({"failed": error is not None}, self.session.place.device)["failed"]:
            together(lambda: _raise(error), "reading samples")
        return found

    def _save(self, progress: Progress, best: dict[str, float] | None = None, wait: bool = False) -> None:
        self.watchdog.beat("saving", patient=True)
        with self.goodput.time("checkpoint"):
            progress.productive_s = self.goodput.seconds["productive"]
            self.saver.save(progress, best, wait)

    def _end(self, progress: Progress, stop: Stop | None) -> Exit:
        """Leaves word of a stop, unless nothing is left to do."""
        done = progress.step >= self.session.config.train.max_steps and not progress.evaluation_due
        exit_code = Exit.FINISHED if stop is None or done else stop.exit_code
        if stop is not None and not done:
            self.stops.leave(stop, progress.step)
        self.goodput.write(progress.step, ended=exit_code == Exit.FINISHED)
        log.info(
            "%s, over %d starts, %d steps lost",
            self.goodput.line(),
            self.goodput.starts,
            self.goodput.lost_steps,
        )
        return exit_code

    def _wishes(self, step_s: float) -> dict[str, bool]:
        return self.stops.wishes(self.saver.write_s, step_s)

    def _report(self, step: int, rates: dict[str, float], counters: dict[str, float]) -> None:
        shares = {f"goodput/{name}": share for name, share in self.goodput.shares().items()}
        figures = self._counters() | self.stragglers.report(step) | shares
        self.monitor.write_step(step, rates, figures, counters, self.goodput.line())
        self.goodput.write(step)

    def _evaluate(self, progress: Progress) -> Stop | None:
        """Evaluates, and saves if it was the best so far; returns the stop that came in its middle, if any."""
        device = self.session.place.device

        def stop_wished() -> bool:
            self.watchdog.beat("evaluating")
            return any(wish for name, wish in self._wishes(0.0).items() if name != SAVE)

        assert self.eval_batches is not None
        self.watchdog.beat("evaluating", patient=True)
        with self.goodput.time("evaluation"):
            try:
                found = evaluate(self.session.engine, self.eval_batches(), device, stop_wished)
            except EvaluationInterrupted:
                return self.stops.granted(any_of(self._wishes(0.0), device))
            self.watchdog.beat("evaluated", patient=True)
            progress.evaluation_due = False
            found["score"] = self.session.task.score(found)
            metrics = {f"eval/{name}": value for name, value in found.items()}
            self.monitor.write(progress.step, metrics)
            self.monitor.write_pictures(progress.step, self.session.engine("heatmaps"))
        shown = " ".join(f"{name} {value:.4g}" for name, value in found.items())
        log.info("step %d evaluation: %s", progress.step, shown)
        if self.saver.is_best(metrics):
            self._save(progress, metrics)
        return None

    def _counters(self) -> dict[str, float]:
        counters = {
            "steps/skipped": float(self.policy.skipped),
            "speed/last_save_s": self.saver.write_s,
            "speed/save_stall_s": self.saver.stall_s,
        }
        if self.session.loss_scale.dynamic:
            counters["steps/overflows"] = float(self.policy.overflows)
            counters["train/loss_scale"] = self.session.loss_scale.value
        return counters


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


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
