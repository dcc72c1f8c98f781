"""Finds steps whose loss or gradient norm jumps, and keeps the samples that led there.

RUN/spikes.jsonl    {"step", "what", "value", "median", "z", "sample_ids": {step: [ids of all ranks]}}
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from pathlib import Path

import torch.distributed as dist

from mt_deepspeed.engine import records

log = logging.getLogger(__name__)

WINDOW, NEEDED = 128, 32
"""Steps that a value is compared with, and how many there must be."""
KEPT_STEPS = 5
"""Steps whose samples are written: the jump's own and those before it."""


def robust_z(value: float, history: list[float]) -> tuple[float, float]:
    """(z, median): how many robust standard deviations (1.4826 x MAD) `value` lies above the median of `history`.

    Deviations below a thousandth of the median count as that: a loss that stands still has none of its own.
    """
    median = statistics.median(history)
    deviation = 1.4826 * statistics.median(abs(one - median) for one in history)
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-12), median


class SpikeDetector:
    """Compares every step with those before it; all ranks see the same values and decide alike.

    Args:
        run_dir: Folder of the run.
        threshold: Robust z-score from which a value is a spike; 0: never.
    """

    def __init__(self, run_dir: Path, threshold: float) -> None:
        self.file, self.threshold = run_dir / "spikes.jsonl", threshold
        self.history: dict[str, deque[float]] = {
            "loss": deque(maxlen=WINDOW),
            "grad_norm": deque(maxlen=WINDOW),
        }
        self.samples: deque[tuple[int, list[int]]] = deque(maxlen=KEPT_STEPS)

    def add(self, step: int, loss: float, grad_norm: float, sample_ids: list[int]) -> None:
        """Takes in one step that was applied; call on all ranks.

        Args:
            step: Optimizer step, counted from 0.
            loss: Of the global batch.
            grad_norm: Of the global batch.
            sample_ids: This rank's.
        """
        self.samples.append((step, sample_ids))
        found = []
        for what, value in (("loss", loss), ("grad_norm", grad_norm)):
            history = self.history[what]
            if self.threshold > 0 and len(history) >= NEEDED and math.isfinite(value):
                z, median = robust_z(value, list(history))
                if z >= self.threshold:
                    found.append({"what": what, "value": value, "median": median, "z": round(z, 2)})
            history.append(value)
        if found:
            self._write(step, found)

    def _write(self, step: int, found: list[dict[str, object]]) -> None:
        gathered: list[list[tuple[int, list[int]]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(self.samples))
        if dist.get_rank() != 0:
            return
        ids: dict[int, list[int]] = {}
        for rank_samples in gathered:
            for one, some in rank_samples:
                ids.setdefault(one, []).extend(some)
        for spike in found:
            log.warning(
                "step %d: %s jumped to %.4g (median %.4g, z %.1f); samples of the last %d steps in %s",
                *(step, spike["what"], spike["value"], spike["median"], spike["z"], len(ids), self.file.name),
            )
            records.append(self.file, {"step": step, **spike, "sample_ids": ids})
