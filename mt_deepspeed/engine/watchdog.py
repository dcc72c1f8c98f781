"""Ends a run that hangs: says which ranks are late, prints what they do, and exits, so that it can be started again.

RUN/heartbeats/rank-00000.json    host, pid, step, what the rank does, beats so far, when it was written
RUN/hangs/rank-00000.txt          report and stacks of a rank that ended itself

A rank beats at fixed points: before reading, before every micro-batch, before the ranks agree on a step, and
around saving and evaluating. All ranks pass the same points, so the ranks with the fewest beats are late.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.exit_codes import Exit

POLL_S = 1.0
SILENT_S = 5.0
"""A heartbeat file this much older than one's own belongs to a process that no longer runs."""
LAST_WORDS_S = 3.0
"""Between a rank's report and its end: time for the others to report too."""


@dataclass(frozen=True)
class Beat:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    step: int = 0
    doing: str = "starting"
    beats: int = 0
    idle_s: float = 0.0
    """Seconds since the last beat, when this was written."""
    time: float = 0.0
    """Unix time at which it was written."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid}): step {self.step}, {self.doing}"


class Watchdog:
    """Watches this rank, from entering to leaving the context.

    Args:
        config: `run_dir` and the limits in `resilience` are read.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        self.run_dir, self.world_size = Path(config.run_dir), world_size
        self.step_timeout_s = config.resilience.step_timeout_s
        self.first_step_timeout_s = config.resilience.first_step_timeout_s
        self.position = Beat(rank, platform.node(), os.getpid())
        self.limit_s = self.first_step_timeout_s
        self.last = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str, step: int | None = None, patient: bool = False) -> None:
        """This rank gets on.

        Args:
            doing: What it does next, in a word or two.
            step: Optimizer step, if it changed.
            patient: Much may be done until the next beat: `first_step_timeout_s` counts.
        """
        before = self.position
        now_at = before.step if step is None else step
        self.limit_s = self.first_step_timeout_s if patient else self.step_timeout_s
        self.position = replace(before, step=now_at, doing=doing, beats=before.beats + 1)
        self.last = time.monotonic()

    def _watch(self) -> None:
        poll_s = min(POLL_S, self.step_timeout_s / 4)
        while not self.ended.wait(poll_s):
            limit_s, idle_s = self.limit_s, time.monotonic() - self.last
            self._write(idle_s)
            # Python threads stand still while native code holds the interpreter's lock: then this timer ends it.
            with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # no standard error
                faulthandler.dump_traceback_later(limit_s + 10 * poll_s + LAST_WORDS_S, exit=True)
            if idle_s > limit_s:
                self._end(idle_s, limit_s)

    def _write(self, idle_s: float) -> None:
        beat = replace(self.position, idle_s=round(idle_s, 3), time=round(time.time(), 3))
        with contextlib.suppress(OSError):  # a full disk must not end the watch
            file = heartbeat_file(self.run_dir, beat.rank)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")  # a rank may stop in the middle of writing
            temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            os.replace(temporary, file)

    def _end(self, idle_s: float, limit_s: float) -> None:
        setting = "step_timeout_s" if limit_s == self.step_timeout_s else "first_step_timeout_s"
        text = (
            f"{self.position}: no progress for {idle_s:.0f} s (resilience.{setting}={limit_s:g}): ending this rank\n"
            f"{late_ranks(self.run_dir, self.world_size, self.position)}\n"
        )
        _report(sys.stderr, text)
        with contextlib.suppress(OSError):
            file = self.run_dir / "hangs" / f"rank-{self.position.rank:05d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8") as stream:
                _report(stream, text)
        time.sleep(LAST_WORDS_S)
        os._exit(Exit.HUNG)


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's heartbeat is written."""
    return run_dir / "heartbeats" / f"rank-{rank:05d}.json"


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """A rank's heartbeat; None if it has left none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Beat(**json.loads(heartbeat_file(run_dir, rank).read_text("utf-8")))
    return None


def late_ranks(run_dir: Path, world_size: int, own: Beat) -> str:
    """Names the ranks that the others wait for, a line each."""
    found = {rank: read_beat(run_dir, rank) for rank in range(world_size)}
    newest = max((beat.time for beat in found.values() if beat), default=0.0)
    lines = [f"rank {rank}: no heartbeat in {run_dir}" for rank, beat in found.items() if beat is None]
    beats = [beat for beat in found.values() if beat]
    silent = [beat for beat in beats if newest - beat.time > SILENT_S]
    lines += [
        f"{beat}, silent for {newest - beat.time:.0f} s: stopped, dead, or its node gone" for beat in silent
    ]
    if not lines:
        fewest = min(beat.beats for beat in beats)
        behind = [beat for beat in beats if beat.beats == fewest]
        if len(behind) == len(beats) > 1:
            return f"all ranks are at the same point: {own.doing}; their stacks say where"
        lines = [f"{beat} for {beat.idle_s:.0f} s" for beat in behind]
    return "late: " + "\nlate: ".join(lines)


def _report(stream: IO[str], text: str) -> None:
    stream.write(text)
    stream.flush()
    faulthandler.dump_traceback(stream, all_threads=True)
