"""Ranks of the toy task that a test signals, kills or starves while they run."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.launch import Place
from tests.helpers.ranks import PRELOAD, SERVER_ENV, free_port, rank_environment
from tests.helpers.runs import GLOBAL_BATCH, Case
from tests.helpers.toy import Batch, ToyStream, make_batch, make_task

EVAL_BATCHES = 40


@dataclass(frozen=True)
class ToyRun:
    """A run as the train command makes it, of the toy task."""

    run_dir: Path
    case: Case
    step_s: float = 0.0
    """Seconds each step takes at least: time for the test to act."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Section of the configuration -> changed keys."""
    eval_batch_s: float | None = None
    """Seconds an evaluation batch takes; None: no evaluation."""
    fail_at: tuple[int, int] | None = None
    """(rank, step) whose samples cannot be read."""
    hang_at: tuple[int, int] | None = None
    """(rank, step) at which the stream waits for ever."""
    too_large_at: tuple[int, int] | None = None
    """(rank, step) whose forward pass asks for more memory than there is."""

    def config(self) -> RunConfig:
        """The configuration; checkpoints are written at the end and on request only, unless set."""
        config = self.case.run_config(str(self.run_dir))
        config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0, every_minutes=0.0))
        for section, changes in self.settings.items():
            config = replace(config, **{section: replace(getattr(config, section), **changes)})
        return config

    def __call__(self, place: Place) -> int:
        """Trains; returns the exit code."""
        from mt_deepspeed.engine.loop import train
        from mt_deepspeed.engine.stopping import NoProgressError
        from mt_deepspeed.engine.watchdog import Watchdog

        stream = SlowStream(GLOBAL_BATCH, self.case.micro, place.rank, place.world_size)
        stream.step_s, stream.fail_at, stream.hang_at = self.step_s, self.fail_at, self.hang_at
        stream.too_large_at = self.too_large_at
        task = make_task(self.case.dropout)
        evaluation = None if self.eval_batch_s is None else self.eval_batches
        config = self.config()
        try:
            with Watchdog(config, place.rank, place.world_size) as watchdog:
                return train(
                    config, self.case.ds_config(), task, stream, evaluation, place, watchdog
                ).exit_code
        except NoProgressError as error:
            print(error)
            return Exit.NO_PROGRESS

    def eval_batches(self) -> Iterator[Batch]:
        for position in range(EVAL_BATCHES):
            time.sleep(self.eval_batch_s or 0.0)
            yield make_batch([position])


class SlowStream(ToyStream):
    step_s = 0.0
    fail_at: tuple[int, int] | None = None
    hang_at: tuple[int, int] | None = None
    too_large_at: tuple[int, int] | None = None

    def batch(self, step: int, positions: list[int]) -> Batch:
        if (self.rank, step) == self.fail_at:
            raise OSError("the disk is gone")
        if (self.rank, step) == self.hang_at:
            wait_for_ever()
        time.sleep(self.step_s)
        batch = super().batch(step, positions)
        if (self.rank, step) == self.too_large_at:
            batch["too_large"] = torch.ones(len(positions))
        return batch


class Ranks:
    """Processes that run `function(place)` and end with the exit code it returns; their output goes to files.

    Use as a context: no process outlives it.
    """

    def __init__(
        self, world_size: int, function: Callable[[Place], int], outputs: Path, **environment: str
    ) -> None:
        os.environ.update(SERVER_ENV)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        outputs.mkdir(parents=True, exist_ok=True)
        self.files = [outputs / f"rank-{rank}.log" for rank in range(world_size)]
        port = free_port()
        self.processes = [
            context.Process(
                target=_work, args=(rank, world_size, port, str(self.files[rank]), function, environment)
            )
            for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def exit_codes(self, timeout_s: float = 150.0) -> list[int | None]:
        """Waits for all ranks to end; None for one that does not. Negative: killed by that signal."""
        end = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        return self.files[rank].read_text() if self.files[rank].exists() else ""

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 150.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "\n".join(map(self.output, range(len(self.files))))
            assert all(process.is_alive() for process in self.processes), self.output(0)
            time.sleep(0.01)


def wait_for_ever() -> None:
    """Found by its name in the stack."""
    while True:
        time.sleep(1)


def last_step(run_dir: Path) -> int:
    """The newest step in `metrics.jsonl`, 0 without one."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def _work(
    rank: int,
    world_size: int,
    port: int,
    output: str,
    function: Callable[[Place], int],
    environment: dict[str, str],
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(rank_environment(rank, world_size, port), **environment)
    from mt_deepspeed.engine import launch, signals

    signals.install()
    torch.set_num_threads(1)
    code = function(launch.init(timeout_s=120))
    launch.shutdown()
    sys.exit(int(code))
