"""What a run tells: one progress line, `metrics.jsonl`, TensorBoard. Rank 0 writes, all ranks reduce."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.engine import records
from mt_deepspeed.engine.evaluate import reduce_report
from mt_deepspeed.engine.gpus import peak_tflops
from mt_deepspeed.engine.protocols import Report
from mt_deepspeed.engine.runner import add_reports
from mt_deepspeed.engine.step import StepResult

log = logging.getLogger(__name__)

CELL = 16
"""Pixels a side of one number in a heatmap."""


def throughput(
    samples_per_s: float,
    flops_per_sample: float | None,
    precision: str,
    device: torch.device,
    num_devices: int,
) -> dict[str, float]:
    """TFLOP/s per device and MFU (share of the half-precision peak; not for fp32 nor on CPUs)."""
    if flops_per_sample is None:
        return {}
    achieved = samples_per_s * flops_per_sample / num_devices / 1e12
    found = {"speed/tflops_per_device": achieved}
    if device.type == "cuda" and precision != "fp32":
        peak = peak_tflops(torch.cuda.get_device_name(device))
        if peak:
            found["speed/mfu"] = achieved / peak
    return found


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Monitor:
    """Collects steps and writes a record every `log_every` steps.

    Args:
        run_dir: Folder of the run; rank 0 writes `metrics.jsonl` and `tensorboard/` there.
        flops_per_sample: Gives the model FLOPs of a sample, forward and backward; None: no FLOP rates.
        first_step: Step the run continues from: TensorBoard forgets what was written after it.
    """

    def __init__(
        self,
        run_dir: Path,
        max_steps: int,
        log_every: int,
        precision: str,
        device: torch.device,
        flops_per_sample: Callable[[], float] | None,
        first_step: int = 0,
    ) -> None:
        self.max_steps, self.log_every = max_steps, max(1, log_every)
        self.precision, self.device, self.flops_per_sample = precision, device, flops_per_sample
        self.lead = dist.get_rank() == 0
        self.file = run_dir / "metrics.jsonl"
        self.board: Any = None
        if self.lead:
            from torch.utils.tensorboard import SummaryWriter

            run_dir.mkdir(parents=True, exist_ok=True)
            purge = first_step + 1 if first_step else None
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self.latest: dict[str, float] = {}
        self._restart()

    def _restart(self) -> None:
        self.report: Report = {}
        self.samples, self.steps, self.skipped, self.norms = 0, 0, 0, 0.0
        self.wait_s, self.busy_s = 0.0, 0.0

    def add(self, result: StepResult, wait_s: float, step_s: float) -> None:
        """Takes in one step: its result, seconds waited for data, and seconds altogether."""
        self.steps += 1
        self.samples += result.num_samples
        self.wait_s += wait_s
        self.busy_s += step_s
        if result.applied:
            add_reports(self.report, result.report)
            self.norms += result.grad_norm
        else:
            self.skipped += 1

    def due(self, step: int) -> bool:
        """Whether the steps up to `step` (1-based) are to be written now."""
        return step % self.log_every == 0 or step >= self.max_steps

    def write_step(
        self,
        step: int,
        rates: dict[str, float],
        extra: dict[str, float],
        counters: dict[str, float],
        note: str,
    ) -> None:
        """Writes the window that ends with step `step` (1-based); call on all ranks.

        Args:
            rates: Learning rates.
            extra: Further values, equal on all ranks.
            counters: Values that are added up over the ranks.
            note: What stands at the end of the progress line.
        """
        if self.steps == 0:
            return
        values = {f"train/{name}": value for name, value in reduce_report(self.report, self.device).items()}
        own = [self.samples, self.wait_s, self.busy_s, *counters.values()]
        sums = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        samples, wait_s, busy_s, *counted = sums.tolist()
        ranks = dist.get_world_size()
        samples_per_s = samples / max(busy_s / ranks, 1e-9)
        peak = torch.tensor(memory_gib(self.device), dtype=torch.float64, device=self.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        applied = self.steps - self.skipped
        values["train/grad_norm"] = self.norms / applied if applied else float("nan")
        values |= {f"lr/{label}": rate for label, rate in rates.items()}
        values |= {
            "speed/samples_per_s": samples_per_s,
            "speed/data_wait_share": wait_s / max(busy_s, 1e-9),
            "speed/step_s": busy_s / ranks / self.steps,
            "memory/peak_gib": peak.item(),
        }
        flops = self.flops_per_sample() if self.flops_per_sample else None
        values |= throughput(samples_per_s, flops, self.precision, self.device, ranks)
        values |= extra | dict(zip(counters, counted, strict=True))
        self.write(step, values)
        if self.lead:
            log.info("%s | %s", self.progress_line(step, values), note)
        self._restart()

    def progress_line(self, step: int, values: dict[str, float]) -> str:
        """The line a user watches: step, losses and accuracies, speed, time left."""
        shown = [
            f"{name.removeprefix('train/').removeprefix('loss/')} {value:.4g}"
            for name, value in values.items()
            if name.startswith("train/")
        ]
        left = (self.max_steps - step) * values["speed/step_s"]
        mfu = f", MFU {values['speed/mfu']:.1%}" if "speed/mfu" in values else ""
        lr = max((value for name, value in values.items() if name.startswith("lr/")), default=0.0)
        return (
            f"step {step}/{self.max_steps} | {' '.join(shown)} | lr {lr:.2e} | "
            f"{values['speed/samples_per_s']:.1f} samples/s, data wait {values['speed/data_wait_share']:.0%}{mfu} | "
            f"{values['memory/peak_gib']:.2f} GiB | {clock(left)} left"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one record to `metrics.jsonl` and TensorBoard (rank 0)."""
        self.latest |= values
        if not self.lead:
            return
        records.append(self.file, {"step": step, "time": round(time.time(), 3), **values})
        for name, value in values.items():
            self._draw(self.board.add_scalar, name, value, step)

    def write_pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Pictures `[H, W, 3]` uint8, and matrices as heat maps (rank 0).

        A heat map has one cell per entry, dark to bright from the matrix's minimum to its maximum.
        """
        if self.lead:
            for name, picture in pictures.items():
                shown = heatmap(picture) if picture.dim() == 2 else picture
                self._draw(self.board.add_image, name, shown, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the TensorBoard files."""
        if self.board is not None:
            self._draw(self.board.close)

    def _draw(self, draw: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """TensorBoard's thread passes its errors, such as a full disk, to the next call: no reason to stop a run."""
        try:
            draw(*args, **kwargs)
        except OSError as error:
            log.warning("TensorBoard: a record is lost: %s", error)


def heatmap(matrix: Tensor) -> Tensor:
    """A matrix [R, C] as a picture [R * CELL, C * CELL, 3] uint8 in a dark-to-yellow scale."""
    values = matrix.detach().float().cpu()
    low, high = values.min(), values.max()
    level = (values - low) / (high - low).clamp(min=1e-12)
    level = level.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    colours = torch.stack([level.sqrt(), level**2, 0.35 + 0.3 * level - 0.6 * level**3], dim=-1)
    return (colours.clamp(0, 1) * 255).to(torch.uint8)


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    whole = int(max(0.0, seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
