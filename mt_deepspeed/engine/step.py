"""One optimizer step: micro-batches, loss weighting, agreement of all ranks, update or skip."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.engine.gradients import StepGuard, UnusedParameters, nonfinite_names, sum_of_squares
from mt_deepspeed.engine.precision import LossScale
from mt_deepspeed.engine.protocols import Batch, Report, Task
from mt_deepspeed.engine.runner import add_reports, to_device
from mt_deepspeed.engine.slices import Ownership


@dataclass
class Fault:
    """Why a step was skipped, as far as this rank knows."""

    losses: dict[str, list[float]]
    """Loss name -> values of this rank's micro-batches."""
    sample_ids: list[int]
    """Samples of the micro-batches whose loss was not finite; all of the rank's if only gradients were."""
    parameters: list[str]
    """Parameters whose gradient is not finite, among those this rank owns."""


@dataclass
class StepResult:
    """What one optimizer step did."""

    report: Report
    """(sum, count) of each loss (`loss/<name>`) and of the task's report, this rank only."""
    num_samples: int
    """This rank's samples."""
    grad_norm: float
    """Global L2 norm before clipping, of all ranks; nan or inf on a skipped step."""
    loss: float
    """Weighted loss of the global batch."""
    applied: bool
    forward_s: float = 0.0
    """Seconds of this rank's forward passes: its own speed, as long as they hold no collectives (ZeRO-3 does)."""
    overflow: bool = False
    """fp16: skipped because the loss scale was too high."""
    fault: Fault | None = None
    requests: dict[str, bool] = field(default_factory=dict)
    """The agreed requests (see `Stepper.step`)."""


class Stepper:
    """Runs optimizer steps over a DeepSpeed engine.

    Args:
        engine: DeepSpeed engine around a `TaskRunner`.
        task: The task inside it.
        ownership: Where DeepSpeed keeps this rank's gradients.
        guard: Guard of the Adam instance that DeepSpeed drives.
        seed: Run seed; dropout and noise derive from (seed, step, micro-batch of the step).
    """

    def __init__(
        self,
        engine: Any,
        task: Task,
        ownership: Ownership,
        guard: StepGuard,
        loss_scale: LossScale,
        seed: int,
        device: torch.device,
    ) -> None:
        self.engine = engine
        self.task = task
        self.ownership = ownership
        self.guard = guard
        self.loss_scale = loss_scale
        self.seed = seed
        self.device = device
        self.unused = UnusedParameters(ownership)
        self.weights = dict(sorted(task.loss_weights.items()))
        self.weight_values = torch.tensor(list(self.weights.values()), dtype=torch.float64, device=device)

    def step(
        self,
        step: int,
        batches: list[Batch],
        requests: dict[str, bool],
        alive: Callable[[str], None] = lambda doing: None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; all ranks call it together.

        The step equals that of one large batch, however it is split: each loss counts with the number
        of elements it averages over, relative to all micro-batches of all ranks.

        Args:
            step: Optimizer step, counted from 0.
            batches: The rank's micro-batches, CPU tensors.
            requests: Wishes of this rank, same keys on all ranks; granted when any rank has the wish.
            alive: Called with what comes next: before each micro-batch, and before the ranks agree.
        """
        counts, factors = self._weigh(batches)
        self.unused.before_step()
        report: Report = {}
        values: list[Tensor] = []
        watch = Stopwatch(self.device)
        for micro, batch in enumerate(batches):
            number = self.ownership.rank * len(batches) + micro
            alive(f"micro-batch {micro}")
            torch.manual_seed(derive_seed(self.seed, step, number))
            watch.start()
            losses, found = self._forward(to_device(batch, self.device))
            watch.stop()
            add_reports(report, found)
            values.append(losses.detach())
            for name, loss, count in zip(self.weights, losses.detach().double(), counts[micro], strict=True):
                add_reports(report, {f"loss/{name}": torch.stack([loss * count, count])})
            self.unused.before_backward()
            # DeepSpeed's gradients are averaged over ranks; the factors already hold the rank count.
            self.engine.backward((losses * factors[micro]).sum() * self._own_scale(), scale_wrt_gas=False)
            if micro + 1 < len(batches):
                self.engine.step()  # not a boundary: counts the micro-batch
        self.unused.after_last_backward()
        alive("agreeing on the step")
        result = self._finish(batches, torch.stack(values), factors, report, requests)
        result.forward_s = watch.seconds()
        return result

    def _weigh(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """Elements behind each loss [micro-batch, loss] f64, and the loss factors [micro-batch, loss] f32.

        Factor = weight x elements x ranks / elements of the whole step on all ranks.
        """
        found = [self.task.loss_counts(batch) for batch in batches]
        rows = [[float(one[name]) for name in self.weights] for one in found]
        found_counts = torch.tensor(rows, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        counts = found_counts.to(self.device, non_blocking=True)
        totals = counts.sum(dim=0)
        dist.all_reduce(totals)
        factors = self.weight_values * counts * self.ownership.world_size / totals.clamp(min=1.0)
        return counts, factors.float()

    def _forward(self, batch: Batch) -> tuple[Tensor, Report]:
        """Losses [loss] in the order of `weights`, and the task's report."""
        losses, report = self.engine("train", batch)
        if set(losses) != set(self.weights):
            raise ValueError(
                f"the task returned losses {sorted(losses)}, its loss_weights name {sorted(self.weights)}"
            )
        return torch.stack([losses[name] for name in self.weights]), report

    def _own_scale(self) -> float:
        """ZeRO optimizers multiply the loss and divide the gradients themselves; stage 0 does not."""
        if self.ownership.stage > 0:
            if self.loss_scale.dynamic:
                self.ownership.zero.override_loss_scale(self.loss_scale.value)
            return 1.0
        return self.loss_scale.value

    def _finish(
        self,
        batches: list[Batch],
        values: Tensor,
        factors: Tensor,
        report: Report,
        requests: dict[str, bool],
    ) -> StepResult:
        """Agrees on the step's fate and carries it out; `values` are the losses [micro-batch, loss]."""
        bad_loss, norm, loss, granted = self._agree(values, factors, requests)
        bad_gradient = not norm_is_finite(norm)
        skip = bad_loss or bad_gradient
        overflow = bad_gradient and not bad_loss and self.loss_scale.absorbs_overflow()
        fault = self._fault(batches, values, bad_loss) if skip and not overflow else None
        if self.ownership.stage == 0 and self.loss_scale.value != 1.0:
            for parameter in self.ownership.names:
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale.value)
        self.guard.apply(self.engine, skip, deepspeed_decides=self.ownership.swaps)
        if self.ownership.swaps:  # gradients are on NVMe: DeepSpeed took their norm, and skips by it
            norm = float(self.engine.get_global_grad_norm() or 0.0)
            if not skip and not norm_is_finite(norm):
                skip, fault = True, self._fault(batches, values, bad_loss)
        if not bad_loss:
            self.loss_scale.update(overflow)
        return StepResult(
            report=report,
            num_samples=sum(len(batch["sample_ids"]) for batch in batches),
            grad_norm=norm,
            loss=loss,
            applied=not skip,
            overflow=overflow,
            fault=fault,
            requests=granted,
        )

    def _agree(
        self, values: Tensor, factors: Tensor, requests: dict[str, bool]
    ) -> tuple[bool, float, float, dict[str, bool]]:
        """The one collective of a step: non-finite loss anywhere, global norm and loss, requests of any rank."""
        if self.ownership.swaps:
            squares = torch.zeros((), dtype=torch.float64, device=self.device)
        else:
            squares = sum_of_squares(self.ownership, self.device)
        bad = (~torch.isfinite(values)).any().double()
        wishes = torch.tensor([float(wish) for wish in requests.values()], dtype=torch.float64)
        loss = (values * factors).sum().double() / self.ownership.world_size
        vector = torch.cat([torch.stack([squares, bad, loss]), wishes.to(self.device)])
        dist.all_reduce(vector)
        summed, bad_count, total, *granted = vector.tolist()
        norm = summed**0.5 / self.loss_scale.value
        return (
            bad_count > 0,
            norm,
            total,
            {key: value > 0 for key, value in zip(requests, granted, strict=True)},
        )

    def _fault(self, batches: list[Batch], values: Tensor, bad_loss: bool) -> Fault:
        wrong = (~torch.isfinite(values)).any(dim=1).tolist() if bad_loss else [True] * len(batches)
        ids = [batch["sample_ids"] for batch, is_wrong in zip(batches, wrong, strict=True) if is_wrong]
        names = [] if self.ownership.swaps else nonfinite_names(self.ownership)
        return Fault(
            losses={name: row.tolist() for name, row in zip(self.weights, values.T, strict=True)},
            sample_ids=[int(one) for found in ids for one in found],
            parameters=names,
        )


class Stopwatch:
    """Adds up pieces of a step: on a GPU by events in its stream, which cost no waiting, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def start(self) -> None:
        """A piece begins."""
        self.marks.append(self._mark())

    def stop(self) -> None:
        """It ends."""
        self.marks.append(self._mark())

    def seconds(self) -> float:
        """Length of all pieces; on a GPU only after the stream was waited for."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        if self.cuda:
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000.0
        return float(sum(end - begin for begin, end in pairs))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def norm_is_finite(norm: float) -> bool:
    """False for nan and both infinities."""
    return norm - norm == 0.0


def derive_seed(seed: int, step: int, number: int) -> int:
    """Seed of dropout and noise for micro-batch `number` of a step, counted over ranks and accumulation.

    The same micro-batch gets the same seed at any number of ranks, and resuming needs no stored state.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % (2**63 - 1)
