"""The module DeepSpeed wraps: every use of the task goes through one forward, so ZeRO-3 can gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mt_deepspeed.engine.precision import autocast
from mt_deepspeed.engine.protocols import Batch, Report, Task, as_module


class TaskRunner(nn.Module):
    """Runs a task in one of its phases, under autocast."""

    def __init__(self, task: Task, precision: str, device: torch.device) -> None:
        super().__init__()
        self.task = as_module(task)
        self.precision = precision
        self.device = device

    def forward(self, phase: str, batch: Batch | None = None) -> Any:
        """`train`: (losses, report); `eval`: report; `heatmaps`: dict of matrices (no batch)."""
        task: Any = self.task
        with autocast(self.precision, self.device):
            if phase == "train":
                losses, report = task(batch)
                return {name: loss.float() for name, loss in losses.items()}, report
            with torch.no_grad():
                return task.eval_step(batch) if phase == "eval" else task.heatmaps()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; asynchronous when its tensors are pinned."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def add_reports(total: Report, report: Report) -> None:
    """Adds the (sum, count) pairs of `report` to `total` in place, in float64 where the device has it."""
    for name, pair in report.items():
        value = pair.detach().to(torch.float64)
        total[name] = total[name] + value if name in total else value
