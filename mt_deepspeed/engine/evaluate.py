"""Evaluation: runs the task over batches on all ranks and brings their reports together once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.protocols import SAMPLES, Batch, Report, Task
from mt_deepspeed.engine.runner import TaskRunner, add_reports, to_device


class EvaluationInterrupted(Exception):
    """Some rank asked to stop in the middle of an evaluation; raised on all ranks."""


def evaluate(
    model: Any,
    batches: Iterable[Batch],
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Metrics over all ranks' batches; call on all ranks.

    Ranks may have different numbers of batches, or none: who runs out repeats a batch without counting
    it, because under ZeRO-3 every forward pass is a collective of all ranks.

    Args:
        model: DeepSpeed engine around a `TaskRunner`, or a `TaskRunner` alone; left in its mode.
        batches: This rank's share, CPU tensors; batches without samples are not counted.
        device: Device of the model.
        interrupted: Asked before every batch: whether this rank wants to stop.

    Returns:
        Report name -> sum / count, and the task's `figures`. Names whose count is 0 are left out.

    Raises:
        EvaluationInterrupted: Some rank's `interrupted` said so.
    """
    runner = getattr(model, "module", model)
    was_training = bool(runner.training)
    model.eval()
    tally = Tally(runner.task)
    try:
        with torch.no_grad():
            for batch, counts in _in_lockstep(iter(batches), device, interrupted):
                tally.add(model("eval", to_device(batch, device)), counts)
    finally:
        model.train(was_training)
    return tally.reduce(device)


class Tally:
    """What the reports of one rank's evaluation batches come to, with those of all other ranks."""

    def __init__(self, task: Task) -> None:
        self._figures: Callable[[Tensor], dict[str, float]] | None = getattr(task, "figures", None)
        self._total: Report = {}
        self._samples: list[Tensor] = []

    def add(self, report: Report, counts: bool = True) -> None:
        """Takes the report of a batch; one that does not count leaves its names only."""
        pairs = {name: pair for name, pair in report.items() if name != SAMPLES}
        if not counts:
            pairs = {name: torch.zeros_like(pair) for name, pair in pairs.items()}
        elif SAMPLES in report:
            self._samples.append(report[SAMPLES].detach())
        add_reports(self._total, pairs)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Metrics of all ranks' batches; a collective."""
        metrics = reduce_report(self._total, device)
        if self._figures is None:
            return metrics
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, torch.cat(self._samples).cpu() if self._samples else None)
        samples = [rows for rows in found if rows is not None]
        return metrics | (self._figures(torch.cat(samples)) if samples else {})


def evaluate_task(task: Task, batches: Iterable[Batch], place: Place, precision: str) -> dict[str, float]:
    """Metrics of a task outside of training; every rank holds the whole task."""
    runner = TaskRunner(task, precision, place.device).to(place.device)
    return evaluate(runner, batches, place.device)


def reduce_report(report: Report, device: torch.device) -> dict[str, float]:
    """Adds up all ranks' (sum, count) pairs in one collective; returns sum / count."""
    names = _agreed_names(sorted(report))
    if not names:
        return {}
    empty = torch.zeros(2, dtype=torch.float64, device=device)
    table = torch.stack([report.get(name, empty).to(device=device, dtype=torch.float64) for name in names])
    dist.all_reduce(table)
    return {
        name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count > 0
    }


def _agreed_names(names: list[str]) -> list[str]:
    """The names any rank has, in one order."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    return sorted(set().union(*found))


def _in_lockstep(
    batches: Iterator[Batch], device: torch.device, interrupted: Callable[[], bool]
) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it counts), the same number of times on every rank."""
    spare: Batch | None = None
    while True:
        batch = next((one for one in batches if len(one["sample_ids"])), None)
        flags = torch.zeros(dist.get_world_size() + 1, device=device)
        flags[dist.get_rank()] = float(batch is not None)
        flags[-1] = float(interrupted())
        dist.all_reduce(flags)
        *have, stop = flags.tolist()
        if stop:
            raise EvaluationInterrupted
        if not any(have):
            return
        if batch is not None:
            spare = batch
        # All ranks learn here whether some rank never had a batch, and agree on who hands out one.
        missing = torch.tensor(float(spare is None), device=device)
        dist.all_reduce(missing)
        if missing.item():
            source = have.index(1.0)
            handed = [batch if dist.get_rank() == source else None]
            dist.broadcast_object_list(handed, src=source)
            spare = spare if spare is not None else handed[0]
        assert spare is not None
        yield spare, batch is not None
