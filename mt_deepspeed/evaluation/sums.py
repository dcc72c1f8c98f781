"""Every metric is a pair (sum, count): pairs add up over batches and ranks, and are divided once, at the end."""

import torch
from torch import Tensor

Report = dict[str, Tensor]
"""Metric name -> float64 tensor [2]: sum, count."""

SAMPLES = "samples"
"""The one entry of an evaluation report that is no pair: a row of numbers for each sample, of all of which at once
the task makes its `figures`."""


def pair(total: Tensor | float, count: Tensor | float) -> Tensor:
    """(sum, count) as a detached float64 tensor [2] on the device of `total`."""
    total = torch.as_tensor(total).detach().double()
    # Filled on the device: a number copied there would make the host wait for it.
    counted = count.detach().to(total) if isinstance(count, Tensor) else torch.full_like(total, count)
    return torch.stack([total, counted])
