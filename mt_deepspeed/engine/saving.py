"""When a run saves, and how: beside training."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch.distributed as dist

from mt_deepspeed.config import CheckpointConfig, to_dict
from mt_deepspeed.engine import store
from mt_deepspeed.engine.background import Background
from mt_deepspeed.engine.build import Session
from mt_deepspeed.engine.checkpoint import Snapshot, base_state, take_snapshot, write_snapshot
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.resuming import Progress, checkpoint_root
from mt_deepspeed.engine.store import CheckpointError

log = logging.getLogger(__name__)


SHORTEST_S, LONGEST_S = 300.0, 1800.0
"""Bounds of the automatic interval between saves."""


class Saver:
    """Saves by step, by minute, at the end, and when evaluation was best.

    Args:
        saved_step: Step of the checkpoint the run continues; -1: none.
    """

    def __init__(
        self, session: Session, policy: NonFinitePolicy, identity: dict[str, Any], saved_step: int
    ) -> None:
        self.background = Background(session.config.resilience.first_step_timeout_s)
        self.session = session
        self.identity = identity
        self.policy = policy
        self.config: CheckpointConfig = session.config.checkpoint
        self.root = checkpoint_root(session.config.run_dir)
        self.saved_step = saved_step
        self.last_save = time.monotonic()
        self.best = store.read_best(self.root)
        self.write_s = 0.0
        self.stall_s = 0.0

    def time_is_over(self) -> bool:
        """Whether this rank's clock asks for a save; only rank 0's clock does."""
        return dist.get_rank() == 0 and time.monotonic() - self.last_save > self.interval_s()

    def interval_s(self) -> float:
        """Seconds between saves by the clock."""
        minutes = self.config.every_minutes
        if minutes is not None:
            return 60.0 * minutes if minutes > 0 else math.inf
        failure_s = 3600.0 * self.config.gpu_hours_per_failure / dist.get_world_size()
        return save_interval_s(self.stall_s, self.write_s, failure_s)

    def due(self, step: int, asked: bool) -> bool:
        """Whether to save after step `step` (1-based).

        Args:
            asked: The agreed answer to `time_is_over`.
        """
        by_step = self.config.every_steps > 0 and step % self.config.every_steps == 0
        return asked or by_step or step == self.session.config.train.max_steps

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether metrics (with their `eval/` prefix) beat the best checkpoint so far.

        Raises:
            CheckpointError: The evaluation does not report `checkpoint.best_metric`.
        """
        name = self.config.best_metric
        if not name:
            return False
        if name not in metrics:
            raise CheckpointError(
                f"checkpoint.best_metric={name}: the evaluation reports {', '.join(sorted(metrics))}"
            )
        if not math.isfinite(metrics[name]):
            return False
        known = self.best is not None and self.best["metric"] == name
        return not known or metrics[name] > self.best["value"]  # type: ignore[index]

    def save(self, progress: Progress, best: dict[str, float] | None = None, wait: bool = False) -> None:
        """Saves now, unless this step is saved already; call on all ranks.

        The state is copied, and written beside training. One save is under way at a time: the next one waits for it.

        Args:
            best: Evaluation metrics of this step if they are the best so far.
            wait: Return when the checkpoint is on disk.

        Raises:
            CheckpointError: This save, if it was waited for, or the one before has failed.
        """
        started = time.monotonic()
        self.collect()
        if best is not None:
            name = self.config.best_metric
            self.best = {"step": progress.step, "metric": name, "value": best[name]}
        snapshot = None
        if self.saved_step != progress.step:
            state = base_state(self.session, progress.step, progress.adam_steps)
            state["nonfinite"] = self.policy.state()
            state["stream"] = self.identity
            state["config"] = to_dict(self.session.config)
            state["evaluation_due"] = progress.evaluation_due
            state["productive_s"] = progress.productive_s
            snapshot = take_snapshot(self.session, state)
            self.saved_step = progress.step
        pointer = self.best if best is not None else None
        self.background.start(lambda: self._write(snapshot, pointer))
        if wait or not self.config.background:
            self.collect()
        self.last_save = time.monotonic()
        self.stall_s = self.last_save - started

    def writing(self) -> bool:
        """Whether this rank still writes a checkpoint; nobody does when no rank says so."""
        return self.background.busy

    def collect(self) -> None:
        """Waits for a save that is under way; call on all ranks at the same step.

        Raises:
            CheckpointError: It has failed.
        """
        self.background.wait()

    def close(self) -> None:
        """Finishes what is under way at the end of a run that may have another error to tell."""
        try:
            self.collect()
        except Exception as error:  # a rank that died breaks the save's collectives too
            log.error("the last save failed: %s", error)

    def _write(self, snapshot: Snapshot | None, best: dict[str, Any] | None) -> None:
        """Writes a checkpoint, points to it if it is the best, and deletes old ones: beside training."""
        if snapshot is not None:
            started = time.monotonic()
            folder = write_snapshot(snapshot, self.root, self.background.group)
            self.write_s = time.monotonic() - started
            log.info("saved %s in %.1f s", folder, self.write_s)
        if dist.get_rank() == 0:
            if best is not None:
                store.write_best(self.root, best["step"], best["metric"], best["value"])
            self._retain()

    def _retain(self) -> None:
        """Deletes what need not stay; a file system that refuses must not end a run that has just saved."""
        try:
            store.retain(self.root, self.config.keep_last)
        except OSError as error:
            log.warning("old checkpoints could not be deleted, trying again after the next save: %s", error)


def save_interval_s(stall_s: float, write_s: float, failure_s: float) -> float:
    """Seconds between saves that lose least, after Young (1974) and Daly (2006): sqrt(2 x cost x time to failure).

    Within `SHORTEST_S` and `LONGEST_S`: failures of the hardware are not what stops most runs, and a mistake that is
    noticed late costs an interval too. Never so often that more than a tenth of the time is spent writing.

    Args:
        stall_s: Seconds a save stops training; 0: none was made yet.
        write_s: Seconds until it is on disk.
        failure_s: Mean seconds between failures of the whole run.
    """
    best = math.sqrt(2.0 * stall_s * failure_s)
    return max(min(max(best, SHORTEST_S), LONGEST_S), 10.0 * write_s)
