"""When a run saves and stops before its last step, and what it leaves for the next start.

RUN/save, RUN/stop    made by hand (`touch`): save now; save and stop for good
RUN/requeue           made by a run that stopped to be started again, for launchers that lose exit codes; holds
                      the reason, and is removed by the next start
RUN/starts.json       {"step", "restarts", "config"}: how often the run was started from the same step
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mt_deepspeed.config import RunConfig, to_yaml
from mt_deepspeed.engine import durable, signals
from mt_deepspeed.engine.agreement import together
from mt_deepspeed.engine.exit_codes import Exit

log = logging.getLogger(__name__)

SAVE, STOP, REQUEUE, STARTS = "save", "stop", "requeue", "starts.json"
DEADLINES = ("SLURM_JOB_END_TIME", "MT_DEADLINE")


class NoProgressError(RuntimeError):
    """The run was started again and again without a new checkpoint."""


@dataclass(frozen=True)
class Stop:
    """An agreed stop."""

    reason: str
    exit_code: Exit


class StopRequests:
    """What asks this rank to save or to stop.

    Args:
        run_dir: Folder of the run, for its switch files.
        lead: Whether this rank looks for switch files; one does.
        end: Unix time the job will be killed at; None: never.
        margin_s: Seconds before `end` that must be left when a save begins.
    """

    def __init__(self, run_dir: Path, lead: bool, end: float | None, margin_s: float) -> None:
        self.run_dir, self.lead, self.end, self.margin_s = run_dir, lead, end, margin_s

    def wishes(self, save_s: float, step_s: float = 0.0) -> dict[str, bool]:
        """This rank's wishes, for `Stepper.step`: the same keys on all ranks.

        Args:
            save_s: Seconds a save takes.
            step_s: Seconds until the next chance to stop.
        """
        over = self.end is not None and time.time() + self.margin_s + save_s + step_s >= self.end
        return {
            **signals.received(),
            "deadline": over,
            STOP: self.lead and (self.run_dir / STOP).exists(),
            SAVE: self.lead and (self.run_dir / SAVE).exists(),
        }

    def granted(self, requests: Mapping[str, bool]) -> Stop | None:
        """The stop that all ranks agreed on, if any; a stop by hand wins over one that is to be requeued."""
        if requests[STOP]:
            return Stop(f"{self.run_dir / STOP} exists", Exit.FINISHED)
        for name in signals.received():
            if requests[name]:
                return Stop(f"{name} received", Exit.REQUEUE)
        if requests["deadline"]:
            return Stop("the job's time is nearly over", Exit.REQUEUE)
        return None

    def leave(self, stop: Stop, step: int) -> None:
        """Tells the next start and the batch script why the run stopped, after it has saved (lead only)."""
        log.info("stopped after step %d, saved: %s", step, stop.reason)
        if not self.lead:
            return
        if stop.exit_code == Exit.REQUEUE:
            durable.replace_text(self.run_dir / REQUEUE, f"{stop.reason} at step {step}\n")
        else:
            (self.run_dir / STOP).unlink(missing_ok=True)

    def saved(self) -> None:
        """The save that RUN/save asked for is done."""
        if self.lead:
            (self.run_dir / SAVE).unlink(missing_ok=True)


def begin(config: RunConfig, lead: bool, step: int) -> StopRequests:
    """Counts this start from `step`, and watches for what may end the run early; call on all ranks.

    Raises:
        NoProgressError: It follows too many starts in vain.
        RanksFailedError: The job's end cannot be read.
    """
    run_dir, settings = Path(config.run_dir), config.resilience
    end = together(lambda: deadline(os.environ), "reading the job's end")
    restarts = [together(lambda: note_start(run_dir, step, config) if lead else 0, "noting the start")]
    dist.broadcast_object_list(restarts, src=0)
    if step < config.train.max_steps:
        check_progress(restarts[0], settings.max_idle_restarts, run_dir, step)
    return StopRequests(run_dir, lead, end, settings.deadline_margin_s)


def deadline(environment: Mapping[str, str]) -> float | None:
    """Unix time at which the job will be killed, from the first variable of `DEADLINES` that is set.

    Raises:
        ValueError: It is no number.
    """
    name = next((name for name in DEADLINES if environment.get(name)), None)
    if name is None:
        return None
    try:
        return float(environment[name])
    except ValueError:
        raise ValueError(
            f"{name}={environment[name]!r}: expected seconds since 1970, as `date +%s`"
        ) from None


def note_start(run_dir: Path, step: int, config: RunConfig) -> int:
    """Writes down a start, and removes the marker of the stop before it; one rank calls it.

    Args:
        step: Step of the checkpoint the run continues, 0 without one.

    Returns:
        Restarts in a row from this step with this configuration, this one included; 0 for the first.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / REQUEUE).unlink(missing_ok=True)
    start = {"step": step, "config": hashlib.sha256(to_yaml(config).encode()).hexdigest()}
    restarts = 0
    try:
        before = json.loads((run_dir / STARTS).read_text("utf-8"))
        if all(before[key] == value for key, value in start.items()):
            restarts = int(before["restarts"]) + 1
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): restarts are counted anew", run_dir / STARTS, error)
    durable.replace_text(run_dir / STARTS, json.dumps({**start, "restarts": restarts}) + "\n")
    return restarts


def check_progress(restarts: int, limit: int, run_dir: Path, step: int) -> None:
    """Refuses a start that follows too many in vain.

    Raises:
        NoProgressError: More than `limit` restarts from one step.
    """
    if restarts > limit:
        raise NoProgressError(
            f"started {restarts} times again from step {step} without a new checkpoint "
            f"(resilience.max_idle_restarts={limit}): the first error in the earlier logs says why. Once it is "
            f"mended, remove {run_dir / STARTS}, or change the configuration"
        )
