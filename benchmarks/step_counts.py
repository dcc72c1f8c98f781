"""What a step of pre-training needs, counted without computing it: operations and memory per sample.

    python -m benchmarks.step_counts --precision fp32 bf16 --checkpointing 0 1 2 [--save]
    python -m benchmarks.step_counts --systems ours plain --set model.vision.image_size=384
    python -m benchmarks.step_counts --profiler

The model runs forward and backward on tensors without values, whose shapes, types and lifetimes are the real ones.
`gflop` are matrix products, convolution and attention, those done again by activation checkpointing included.
`mib` is what the most bytes alive at once grow by with one more sample, with the operators of a GPU
(`mt_deepspeed.planning.activations`); parameters, their gradients and the optimizer are no part of it. `plain` pads
texts to `data.max_text_len`. `--profiler` instead compares our count of a forward pass with that of DeepSpeed's
profiler, which runs it; its rows stand in `step_flops.csv` beside the others'.
"""

import argparse
import itertools
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.batches import make_batch
from benchmarks.plain_step import PlainPretraining, pad_texts
from benchmarks.record import add_save, append
from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.models.flops import forward_flops
from mt_deepspeed.planning.activations import SIZES, peak_bytes, recompute
from mt_deepspeed.tasks import build_task

WITHOUT_FILES = ["model.text.pretrained=null", "model.vision.pretrained=null"]


class PlainTask(nn.Module):
    """`PlainPretraining` in the form of a task."""

    def __init__(self, task: Any, config: RunConfig) -> None:
        super().__init__()
        self.plain = PlainPretraining(task)
        self.padding = config.data.max_text_len, config.model.text.pad_token_id

    def forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses, and an empty report."""
        return self.plain(pad_texts(batch, *self.padding)), {}


def count(system: str, config: RunConfig, text_tokens: int | None = None) -> dict[str, float]:
    """GFLOP and MiB per sample, and the MiB that do not depend on the batch.

    Args:
        system: `ours` (the task of `config`) or `plain`.
        config: The run; precision and activation checkpointing count.
        text_tokens: As in `make_batch`.
    """
    precision, every = config.train.precision, config.train.activation_checkpointing
    peaks = []
    for size in SIZES:
        mode, task, batch = on_fake_tensors(config, size, text_tokens)
        recompute(task.checkpointable_layers(), every, precision)
        with mode:
            peaks.append(peak_bytes(PlainTask(task, config) if system == "plain" else task, batch, precision))
    slope = (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])
    fixed = peaks[0] - slope * SIZES[0]
    flops = _flops(system, config, text_tokens)
    return {"gflop": flops / 1e9, "mib": slope / 2**20, "mib_fixed": fixed / 2**20}


def on_fake_tensors(
    config: RunConfig, size: int, text_tokens: int | None
) -> tuple[FakeTensorMode, Any, dict[str, Tensor]]:
    """The task and a batch of `size` samples without values, and the mode in which they live."""
    mode, real = FakeTensorMode(), make_batch(config, size, 0, text_tokens)
    with mode:
        task: Any = build_task(config).train()
        return mode, task, {key: mode.from_tensor(value) for key, value in real.items()}


def _flops(system: str, config: RunConfig, text_tokens: int | None) -> float:
    """Forward and backward, per sample; a pass of its own, since `peak_bytes` leaves attention out."""
    size = SIZES[0]
    mode, task, batch = on_fake_tensors(config, size, text_tokens)
    every = config.train.activation_checkpointing
    for layer in task.checkpointable_layers()[::every] if every else []:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    module = PlainTask(task, config) if system == "plain" else task
    with mode, FlopCounterMode(display=False) as counter:
        losses, _ = module(batch)
        sum(losses.values()).backward()
    return counter.get_total_flops() / size


def compare_with_profiler(config: RunConfig, text_tokens: int | None) -> dict[str, object]:
    """Our count of a forward pass beside that of DeepSpeed's profiler, which also counts norms and activations."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    task, batch = build_task(config).eval(), make_batch(config, 2, 0, text_tokens)
    profiler = FlopsProfiler(task)
    profiler.start_profile()
    with torch.no_grad():
        task(batch)
    found = profiler.get_total_flops() / 2
    profiler.end_profile()
    tokens, masked = batch["text_mask"].shape[1], len(batch["mlm_positions"]) / 2
    own = forward_flops(config.model, tokens, 2, 1.5, masked, pooled=1)
    return {
        "text_tokens": tokens,
        "own_gflop": f"{own / 1e9:.3f}",
        "profiler_gflop": f"{found / 1e9:.3f}",
        "ratio": f"{own / found:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="managertower-base")
    parser.add_argument("--systems", nargs="+", default=["ours", "plain"], choices=["ours", "plain"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--checkpointing", nargs="+", type=int, default=[0], help="of `ours`")
    parser.add_argument("--text-tokens", type=int, help="length of every text (default: captions of 9 to 16)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the run"
    )
    parser.add_argument("--profiler", action="store_true", help="compare with DeepSpeed's profiler and stop")
    add_save(parser, "step_counts.csv")
    options = parser.parse_args()
    os.environ.setdefault("MT_KERNELS", "reference")  # the operator, as on a GPU
    rows: list[dict[str, object]] = []
    if options.profiler:
        config = load_config(options.preset, [], [*WITHOUT_FILES, *options.set])
        rows.append({"preset": options.preset, **compare_with_profiler(config, options.text_tokens)})
    else:
        for system, precision, every in itertools.product(
            options.systems, options.precision, options.checkpointing
        ):
            if system == "plain" and every:
                continue
            changes = [f"train.precision={precision}", f"train.activation_checkpointing={every}"]
            config = load_config(options.preset, [], [*WITHOUT_FILES, *changes, *options.set])
            found = {key: f"{value:.1f}" for key, value in count(system, config, options.text_tokens).items()}
            named = {"system": system, "precision": precision, "checkpointing": every}
            rows.append({"preset": options.preset, "settings": " ".join(options.set), **named, **found})
    for row in rows:
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        append(options.save.with_name("step_flops.csv") if options.profiler else options.save, rows)


if __name__ == "__main__":
    main()
