"""What happens when a loss or a gradient is not finite: say it, write it down, stop when it goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from mt_deepspeed.engine import records
from mt_deepspeed.engine.step import Fault, StepResult

log = logging.getLogger(__name__)

SHOWN_IDS = 16


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class NonFinitePolicy:
    """Counts skipped steps and fp16 overflows; stops the run after `max_in_row` skips without a good step.

    Args:
        run_dir: Rank 0 appends every skipped step to `nonfinite.jsonl` there.
    """

    def __init__(self, max_in_row: int, run_dir: Path) -> None:
        self.max_in_row = max_in_row
        self.file = run_dir / "nonfinite.jsonl"
        self.skipped = 0
        self.in_row = 0
        self.overflows = 0

    def state(self) -> dict[str, int]:
        """Counters to keep in a checkpoint."""
        return {"skipped": self.skipped, "in_row": self.in_row, "overflows": self.overflows}

    def load(self, state: dict[str, int]) -> None:
        """Takes counters back from a checkpoint."""
        self.skipped, self.in_row, self.overflows = state["skipped"], state["in_row"], state["overflows"]

    def check(self, step: int, result: StepResult, loss_scale: float) -> None:
        """Looks at one step; call on all ranks.

        Args:
            step: Optimizer step, counted from 0.

        Raises:
            NonFiniteError: `max_in_row` steps in a row were skipped.
        """
        if result.applied:
            self.in_row = 0
            return
        if result.overflow:
            self.overflows += 1
            log.info(
                "step %d: fp16 overflow, loss scale now %g (%d so far)", step, loss_scale, self.overflows
            )
            return
        self.skipped += 1
        self.in_row += 1
        faults: list[Fault | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, result.fault)
        if dist.get_rank() == 0:
            self._tell(step, [fault for fault in faults if fault is not None], result.grad_norm)
        if self.in_row >= self.max_in_row:
            raise NonFiniteError(
                f"stopped at step {step}: {self.in_row} steps in a row had a loss or gradient that is not finite "
                f"(train.max_skipped_steps={self.max_in_row}); samples and parameters are in {self.file}. "
                "Lower optim.lr, set optim.max_grad_norm, use train.precision=bf16 or fp32, or look at the samples"
            )

    def _tell(self, step: int, faults: list[Fault], grad_norm: float) -> None:
        bad_ranks = [
            fault for fault in faults if any(not _finite(fault.losses[name]) for name in fault.losses)
        ]
        where = bad_ranks or faults
        ids = [one for fault in where for one in fault.sample_ids]
        names = sorted({name for fault in faults for name in fault.parameters})
        losses = sorted(
            {name for fault in bad_ranks for name in fault.losses if not _finite(fault.losses[name])}
        )
        what = f"loss {', '.join(losses)}" if losses else "the gradient"
        some = "" if len(ids) <= SHOWN_IDS else f" and {len(ids) - SHOWN_IDS} more"
        log.warning(
            "step %d skipped on all ranks (%d in a row): %s is not finite; samples %s%s; parameters %s; see %s",
            step,
            self.in_row,
            what,
            ids[:SHOWN_IDS],
            some,
            ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "unknown",
            self.file.name,
        )
        record = {
            "step": step,
            "in_row": self.in_row,
            "grad_norm": grad_norm,
            "losses": [fault.losses for fault in faults],
            "sample_ids": ids,
            "parameters": names,
        }
        records.append(self.file, record)


def _finite(values: list[float]) -> bool:
    return all(value - value == 0.0 for value in values)
