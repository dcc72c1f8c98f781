"""Bytes of weights, gradients and optimizer states on one rank at each ZeRO stage, from the model's parameters.

Follows what DeepSpeed does with float32 weights, the only kind this package gives it (mixed precision is autocast):

- Stage 0: everything whole on every rank.
- Stages 1 and 2: each optimizer group is one flat buffer, padded to a multiple of 2 x ranks; the weights are views of
  it. A rank owns an equal part and keeps a second float32 copy of it, which Adam updates.
- Stage 3: each parameter is cut into equal parts; a rank keeps its parts and a second copy of them, which Adam updates.
  Parameters of at most `stage3_param_persistence_threshold` elements stay whole as well.

Adam's step counters (4 bytes per tensor, in CPU memory) are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.ds_config import offload_device, zero_stage
from mt_deepspeed.engine.optim import parameter_groups
from mt_deepspeed.tasks import build_task

FP32 = 4
ALIGNMENT = 2  # elements x ranks: DeepSpeed's nccl_start_alignment_factor
STAGE0_BUCKET = 500_000_000  # elements; DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, not configurable
DEFAULTS = {  # of DeepSpeed, for keys of `zero_optimization` that a file leaves out; elements
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a task's tensors, in elements."""

    groups: list[list[int]]
    """Trainable parameters by optimizer group."""
    frozen: list[int]
    """Parameters that are not trained."""
    buffer_bytes: int
    """All buffers (bytes)."""
    saved_buffer_bytes: int
    """Those that a checkpoint holds."""

    @property
    def trained(self) -> int:
        """Elements of the trainable parameters."""
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return self.trained + sum(self.frozen)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank (the fullest one), on the GPU unless said otherwise."""

    weights: int
    master: int
    """The second float32 copy of a rank's part (stages 1 to 3)."""
    moments: int
    gradients: int
    buffers: int
    """Communication buckets, gathered parameters, the model's own buffers."""
    host: int = 0
    """In the node's memory, per rank (offload)."""
    nvme: int = 0

    @property
    def gpu(self) -> int:
        """All of it on the GPU."""
        return self.weights + self.master + self.moments + self.gradients + self.buffers


def model_size(config: RunConfig) -> ModelSize:
    """Sizes of the real task, built on the meta device."""
    with torch.device("meta"):
        task = build_task(config)
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    roles = {name: task.parameter_role(name) for name in trained}
    groups = parameter_groups(trained.items(), roles, config.optim)
    saved = set(task.state_dict())
    buffers = {name: b.numel() * b.element_size() for name, b in task.named_buffers()}
    return ModelSize(
        groups=[[p.numel() for p in group["params"]] for group in groups],
        frozen=[p.numel() for p in task.parameters() if not p.requires_grad],
        buffer_bytes=sum(buffers.values()),
        saved_buffer_bytes=sum(size for name, size in buffers.items() if name in saved),
    )


def task_figures(config: RunConfig, text_len: int) -> tuple[float, float]:
    """FLOPs of a sample, forward and backward, and images that are decoded for it."""
    with torch.device("meta"):
        task = build_task(config)
        images = len(task.fake_batch(2, text_len).get("pixels", ())) / 2
    return task.flops_per_sample(text_len), images


def state_bytes(size: ModelSize, ds_config: dict[str, Any], ranks: int, accumulation: int) -> StateBytes:
    """Bytes of a rank's state.

    Args:
        size: Of the task.
        ds_config: The user's DeepSpeed file.
        ranks: World size.
        accumulation: Micro-batches per step.
    """
    stage = zero_stage(ds_config)
    zero = {**DEFAULTS, **ds_config.get("zero_optimization", {})}
    if stage == 0:
        return StateBytes(
            weights=FP32 * size.total,
            master=0,
            moments=2 * FP32 * size.trained,
            gradients=FP32 * size.trained,
            buffers=size.buffer_bytes + (FP32 * min(size.trained, STAGE0_BUCKET) if ranks > 1 else 0),
        )
    if stage < 3:
        return _offloaded(_flat(size, zero, ranks, accumulation, stage), size, ds_config, zero)
    return _offloaded(_partitioned(size, zero, ranks), size, ds_config, zero)


def padded(numbers: list[int], ranks: int) -> int:
    """Elements of the flat buffer of one group at stages 1 and 2."""
    step = ALIGNMENT * ranks
    return math.ceil(sum(numbers) / step) * step


def touched(numbers: list[int], ranks: int) -> list[int]:
    """Per rank: elements of the parameters of which it owns a part (stages 1 and 2).

    DeepSpeed keeps whole gradients of those, so an embedding table that spans many ranks' parts is on all of them.
    """
    part = padded(numbers, ranks) // ranks
    found = [0] * ranks
    start = 0
    for number in numbers:
        for rank in range(start // part, (start + number - 1) // part + 1):
            found[rank] += number
        start += number
    return found


def checkpoint_bytes(size: ModelSize) -> int:
    """Tensors of one checkpoint: weights and two moments in float32, what is frozen, buffers; all ranks together."""
    return FP32 * (3 * size.trained + sum(size.frozen)) + size.saved_buffer_bytes


def _flat(size: ModelSize, zero: dict[str, Any], ranks: int, accumulation: int, stage: int) -> StateBytes:
    whole = sum(padded(group, ranks) for group in size.groups)
    part = whole // ranks
    owned = FP32 * max(map(sum, zip(*(touched(group, ranks) for group in size.groups), strict=True)))
    if accumulation == 1:
        gradients = owned  # everything else is handed on to its owner during the backward pass
    elif stage == 1:
        gradients = owned + FP32 * size.trained  # summed up whole until the last micro-batch
    else:
        gradients = 2 * owned  # the sum so far, and that of the micro-batch at hand
    buckets = 2 if zero.get("overlap_comm", False) else 1
    bucket = zero["reduce_bucket_size"] if zero.get("contiguous_gradients", True) else 0
    return StateBytes(
        weights=FP32 * (whole + sum(size.frozen)),
        master=FP32 * part,
        moments=2 * FP32 * part,
        gradients=gradients,
        buffers=size.buffer_bytes + FP32 * buckets * bucket,
    )


def _partitioned(size: ModelSize, zero: dict[str, Any], ranks: int) -> StateBytes:
    numbers = [number for group in size.groups for number in group]
    part = sum(math.ceil(number / ranks) for number in numbers)
    frozen = sum(math.ceil(number / ranks) for number in size.frozen)
    threshold = zero["stage3_param_persistence_threshold"]
    small = [number for number in [*numbers, *size.frozen] if number <= threshold]
    persistent = sum(math.ceil(number / ranks) * ranks for number in small) if ranks > 1 else 0
    # A gathered parameter stays until the next use if that is near enough: with models below the reuse distance,
    # all of them stay from the forward pass to the backward pass.
    reach = zero["stage3_max_reuse_distance"] + zero["stage3_prefetch_bucket_size"]
    gathered = min(size.total - persistent, zero["stage3_max_live_parameters"], reach)
    bucket = zero["reduce_bucket_size"] if zero.get("contiguous_gradients", True) else 0
    return StateBytes(
        weights=FP32 * (part + frozen + persistent),
        master=FP32 * part,
        moments=2 * FP32 * part,
        gradients=FP32 * part,
        buffers=size.buffer_bytes + FP32 * (bucket + (gathered if ranks > 1 else 0)),
    )


def _offloaded(
    states: StateBytes, size: ModelSize, ds_config: dict[str, Any], zero: dict[str, Any]
) -> StateBytes:
    """Moves what `offload_optimizer` and `offload_param` move."""
    device = offload_device(ds_config)
    if device != "none":
        largest = max(number for group in size.groups for number in group)
        away = states.master + states.moments
        states = replace(
            states,
            master=0,
            moments=0,
            gradients=0,
            buffers=states.buffers + FP32 * largest,
            host=2 * states.gradients + (away if device == "cpu" else 0),
            nvme=away if device == "nvme" else 0,
        )
    if zero.get("offload_param", {}).get("device", "none") != "none":
        states = replace(states, host=states.host + states.weights, weights=0)
    return states
