"""Where the wall-clock time of a run goes, over all its starts.

RUN/goodput.json    {"seconds": {category: seconds}, "step", "starts", "lost_steps", "time", "ended"}, by rank 0
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mt_deepspeed.engine import durable

log = logging.getLogger(__name__)

CATEGORIES = {
    "productive": "steps that count",
    "data_wait": "data",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "restart": "starting",
    "lost": "lost",
}
"""Category -> its name in the progress line. Each second belongs to one:

`restart` holds the time from a start to its first step, and from the last record before a requeued or broken start
to the next one, waiting in the queue included; `lost` the productive time of steps that a restart makes again.
"""


class Goodput:
    """Keeps the account of one rank; rank 0's is the run's.

    Args:
        run_dir: Folder of the run.
        lead: Whether this rank reads and writes the file.
        started: Unix time this process began.
    """

    def __init__(self, run_dir: Path, lead: bool, started: float) -> None:
        self.file, self.lead = run_dir / "goodput.json", lead
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.starts, self.lost_steps, self.step = 1, 0, 0
        self.category = "restart"
        self.since = time.time()
        self.seconds["restart"] = max(0.0, self.since - started)
        before = self._read() if lead else None
        if before:
            gap = 0.0 if before["ended"] else max(0.0, started - before["time"])
            self.seconds = {name: before["seconds"][name] + self.seconds[name] for name in CATEGORIES}
            self.seconds["restart"] += gap
            self.starts, self.lost_steps = before["starts"] + 1, before["lost_steps"]
            self.step = before["step"]

    def resume(self, step: int, productive_s: float) -> None:
        """The run continues at a checkpoint: what was done after it is lost.

        Args:
            step: Step of the checkpoint, 0 without one.
            productive_s: Productive seconds when it was taken.
        """
        lost_s = min(max(0.0, self.seconds["productive"] - productive_s), self.seconds["productive"])
        self.seconds["productive"] -= lost_s
        self.seconds["lost"] += lost_s
        self.lost_steps += max(0, self.step - step)
        self.step = step

    @contextmanager
    def time(self, category: str) -> Iterator[None]:
        """Time inside belongs to `category`, and to the one before afterwards."""
        before = self.switch(category)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, category: str) -> str:
        """From now on time belongs to `category`; returns the one before."""
        now, before = time.time(), self.category
        self.seconds[before] += max(0.0, now - self.since)
        self.since, self.category = now, category
        return before

    def shares(self) -> dict[str, float]:
        """Category -> share of the wall-clock time so far."""
        self.switch(self.category)
        total = sum(self.seconds.values())
        return {name: seconds / max(total, 1e-9) for name, seconds in self.seconds.items()}

    def write(self, step: int, ended: bool = False) -> None:
        """Keeps the account; an account that cannot be written must not end a run."""
        self.step = step
        self.switch(self.category)
        if not self.lead:
            return
        record = {
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "step": step,
            "starts": self.starts,
            "lost_steps": self.lost_steps,
            "time": round(time.time(), 3),
            "ended": ended,
        }
        try:
            durable.replace_text(self.file, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.file, error)

    def line(self) -> str:
        """`goodput 93 % (data 2, checkpoints 1, ...)`."""
        shares = self.shares()
        rest = ", ".join(
            f"{CATEGORIES[name]} {100 * share:.0f}" for name, share in shares.items() if name != "productive"
        )
        return f"goodput {100 * shares['productive']:.0f}% ({rest})"

    def _read(self) -> dict[str, Any] | None:
        try:
            before: dict[str, Any] = json.loads(self.file.read_text("utf-8"))
            return before if set(before["seconds"]) == set(CATEGORIES) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): goodput is counted from this start on", self.file, error)
            return None
