"""Every metric is a pair (sum, count): pairs add up over batches and ranks, and are divided once, at the end."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Report = dict[str, Tensor]
"""Metric name -> float64 tensor [2]: sum, count."""


def pair(total: Tensor | float, count: Tensor | float) -> Tensor:
    """(sum, count) as a detached float64 tensor [2] on the device of `total`."""
    total = torch.as_tensor(total).detach()
    count = torch.as_tensor(count, device=total.device).detach()
    return torch.stack([total.double(), count.double()])


def add(sums: Report, report: Mapping[str, Tensor]) -> None:
    """Adds `report` to `sums` in place."""
    for name, value in report.items():
        sums[name] = sums[name] + value if name in sums else value


def averages(sums: Mapping[str, Tensor], reduce: Callable[[Tensor], None] | None = None) -> dict[str, float]:
    """Sum over count of every metric.

    Args:
        sums: What `add` gathered; every rank holds the same names.
        reduce: Sums a tensor over all ranks in place; None for one process.

    Returns:
        Averages by name, in alphabetical order; `nan` where nothing was counted.
    """
    names = sorted(sums)
    if not names:
        return {}
    table = torch.stack([sums[name] for name in names])  # [metrics, 2]
    if reduce is not None:
        reduce(table)
    return {
        name: (total / count if count else float("nan"))
        for name, (total, count) in zip(names, table.tolist(), strict=True)
    }
