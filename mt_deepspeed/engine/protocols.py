"""What the engine asks of a task and of a data stream; nothing else about them is known here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
"""One micro-batch; `sample_ids [B] i64` is the only key the engine reads."""

Report: TypeAlias = dict[str, Tensor]
"""name -> tensor [2] (sum, count), detached; the engine adds them up and logs sum / count."""

SAMPLES = "samples"
"""The one entry of an evaluation report that is no pair: `[B, k]`, a row of numbers for each sample. The engine brings
the rows of all ranks together, and the task makes its `figures` of them."""


class SampleStream(Protocol):
    """This rank's endless share of the global sample stream."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the sample order follows from, fit for JSON: a checkpoint continues only on an equal one."""
        ...

    @property
    def counters(self) -> dict[str, float]:
        """What this rank has met since its start, the same names on all ranks; logged as sums over ranks."""
        ...

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """Yields, for optimizer step `first_step` and all later ones, the rank's accumulation micro-batches."""
        ...

    def close(self) -> None:
        """Stops workers and closes files."""
        ...


class Task(Protocol):
    """An `nn.Module` that owns model, heads and losses.

    A task may also offer `flops_per_sample() -> float` (model FLOPs of one sample, forward and
    backward; enables TFLOP/s and MFU), `checkpointable_layers() -> list[nn.Module]` (the repeated layers,
    in order, that activation checkpointing and compilation may wrap),
    `fake_batch(samples: int, text_len: int) -> Batch` (noise with the shapes of a real batch; enables dry runs) and
    `figures(samples: Tensor) -> dict[str, float]` (metrics that are no mean over samples, of the `SAMPLES` rows).
    """

    loss_weights: dict[str, float]
    """Loss name -> weight in the total."""

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], Report]:
        """Losses (scalar means over this micro-batch, by name) and report.

        Every trainable parameter takes part in every micro-batch: a loss that averages over no
        element is 0 and still attached to the graph.
        """
        ...

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Loss name -> number of elements (0-dim) that loss averages over in this micro-batch."""
        ...

    def eval_step(self, batch: Batch) -> Report:
        """Report of one evaluation batch."""
        ...

    def score(self, metrics: dict[str, float]) -> float:
        """One number, higher is better, from evaluation metrics: it chooses the best checkpoint."""
        ...

    def heatmaps(self) -> dict[str, Tensor]:
        """Matrices worth a picture, such as the managers' weights [cross-modal layer, expert]; pictures [H, W, 3]."""
        ...

    def parameter_role(self, name: str) -> str:
        """`tower`, `cross_modal` or `head`: chooses the learning-rate multiplier of a parameter."""
        ...


def repeated_layers(task: Task, wish: str) -> list[nn.Module]:
    """The layers that a task offers to be wrapped.

    Raises:
        ValueError: None are offered although `wish`, a setting, needs them.
    """
    offer: Callable[[], list[nn.Module]] | None = getattr(task, "checkpointable_layers", None)
    if offer is None:
        raise ValueError(f"{wish}, but {type(task).__name__} offers no checkpointable_layers()")
    return offer()


def as_module(task: Task) -> nn.Module:
    """The task seen as the `nn.Module` it has to be.

    Raises:
        TypeError: The task is no `nn.Module`.
    """
    if not isinstance(task, nn.Module):
        raise TypeError(f"the task is a {type(task).__name__}, expected a torch.nn.Module")
    return task
