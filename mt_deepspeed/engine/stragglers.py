"""Which rank the others wait for: step, data-wait and forward times of every rank, with its host.

RUN/ranks.jsonl    per log line: {"step", "ranks": [{"rank", "host", "step_s/p50", "step_s/p95", ...}]}
"""

from __future__ import annotations

import logging
import platform
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mt_deepspeed.engine import records

log = logging.getLogger(__name__)

KINDS = ("step_s", "data_wait_s", "forward_s")
"""Ranks that wait for each other have equal step times: `data_wait_s` and `forward_s` are a rank's own."""
PERCENTILES = (50, 95)
SLOW = 1.5
"""A rank is named when its own time is this many times the median of all ranks', and ..."""
NOTICEABLE = 0.1
"""... the difference is this share of a step, and ..."""
NEEDED = 5
"""... so many steps were looked at."""


class Stragglers:
    """Collects this rank's times and compares them with those of the others; construct on all ranks."""

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        self.file, self.device = run_dir / "ranks.jsonl", device
        self.hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, platform.node())
        self.times: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def add(self, **seconds: float) -> None:
        """One step's times, by the names in `KINDS`."""
        for kind in KINDS:
            self.times[kind].append(seconds[kind])

    def report(self, step: int) -> dict[str, float]:
        """Compares the steps since the last report; call on all ranks.

        Returns:
            The slowest rank's percentiles, by tag.
        """
        own = [float(value) for kind in KINDS for value in np.percentile(self.times[kind], PERCENTILES)]
        steps = len(self.times["step_s"])
        self.times = {kind: [] for kind in KINDS}
        rows = [torch.zeros(len(own), device=self.device) for _ in self.hosts]
        dist.all_gather(rows, torch.tensor(own, device=self.device))
        columns = [f"{kind}/p{percentile}" for kind in KINDS for percentile in PERCENTILES]
        table = [dict(zip(columns, row.tolist(), strict=True)) for row in rows]
        if dist.get_rank() == 0:
            self._write(step, table)
            for line in slow_ranks(table, self.hosts) if steps >= NEEDED else []:
                log.warning("step %d: %s", step, line)
        return {f"ranks/{column}_max": max(row[column] for row in table) for column in columns}

    def _write(self, step: int, table: list[dict[str, float]]) -> None:
        ranks = [
            {"rank": rank, "host": host, **{name: round(value, 5) for name, value in row.items()}}
            for rank, (host, row) in enumerate(zip(self.hosts, table, strict=True))
        ]
        records.append(self.file, {"step": step, "ranks": ranks})


def slow_ranks(table: list[dict[str, float]], hosts: list[str]) -> list[str]:
    """A line for every rank whose median data wait or forward time stands out."""
    lines = []
    step_s = statistics.median(row["step_s/p50"] for row in table)
    for kind, what in (("data_wait_s", "waits for data"), ("forward_s", "computes forward")):
        usual = statistics.median_low([row[f"{kind}/p50"] for row in table])
        for rank, row in enumerate(table):
            found = row[f"{kind}/p50"]
            if found > SLOW * usual and found - usual > NOTICEABLE * step_s:
                lines.append(
                    f"rank {rank} on {hosts[rank]} is slow: {what} {found:.3g} s a step (p95 "
                    f"{row[f'{kind}/p95']:.3g}), the median rank {usual:.3g} s"
                )
    return lines
