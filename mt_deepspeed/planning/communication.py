"""Bytes that a step exchanges between ranks at each ZeRO stage, and the time that takes.

With P trainable parameters (4 bytes each: gradients and weights travel in float32), N ranks and A micro-batches:

| stage | all-reduce | all-gather | reduce-scatter |
|---|---|---|---|
| 0 | 4 P | | |
| 1 | 4 P | 4 P' | |
| 2 | 4 P A | 4 P' | |
| 3 | | 4 P'' A k | 4 P'' A |

P' is P padded per optimizer group to a multiple of 2 N, P'' per parameter to one of N; k is 1 when gathered weights
stay until the backward pass (models below `stage3_max_live_parameters`), else 2. DeepSpeed's stages 1 and 2 reduce
their buckets by all-reduce, not by reduce-scatter. A ring sends 2 (N - 1) / N of an all-reduced tensor through each
rank's link, and (N - 1) / N of a gathered or scattered one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mt_deepspeed.engine.ds_config import zero_stage
from mt_deepspeed.planning.states import DEFAULTS, FP32, ModelSize, padded


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors that one step's collectives work on."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def wire_bytes(self, ranks: int) -> float:
        """What passes through each rank's link, in one direction."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (ranks - 1) / ranks


def step_traffic(size: ModelSize, ds_config: dict[str, Any], ranks: int, accumulation: int) -> Traffic:
    """Traffic of one optimizer step; see the module docstring."""
    stage = zero_stage(ds_config)
    gradients = FP32 * size.trained
    if stage == 0:
        return Traffic(all_reduce=gradients)
    if stage < 3:
        weights = FP32 * sum(padded(group, ranks) for group in size.groups)
        return Traffic(all_reduce=gradients * (accumulation if stage == 2 else 1), all_gather=weights)
    zero = {**DEFAULTS, **ds_config.get("zero_optimization", {})}
    numbers = [number for group in size.groups for number in group]
    threshold = zero["stage3_param_persistence_threshold"]
    whole = FP32 * sum(math.ceil(number / ranks) * ranks for number in numbers)
    persistent = FP32 * sum(math.ceil(n / ranks) * ranks for n in numbers if n <= threshold)
    stay = size.total <= min(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"])
    passes = accumulation * (1 if stay else 2)
    return Traffic(all_gather=(whole - persistent) * passes + persistent, reduce_scatter=whole * accumulation)


@dataclass(frozen=True)
class Network:
    """What collectives can move, each way, in GB/s."""

    inside_gb_per_s: float
    """Between the GPUs of a node."""
    between_gb_per_s: float
    """Between two nodes, over all network cards of a node together: NCCL runs one ring per card."""
    latency_s: float = 20e-6
    """Of one collective, per doubling of the number of ranks."""

    def seconds(self, wire_bytes: float, ranks: int, gpus_per_node: int, collectives: int) -> float:
        """Time of a step's collectives if nothing else happened meanwhile."""
        if ranks == 1:
            return 0.0
        inside = ranks <= gpus_per_node
        speed = self.inside_gb_per_s if inside else min(self.inside_gb_per_s, self.between_gb_per_s)
        return wire_bytes / (speed * 1e9) + collectives * self.latency_s * math.log2(ranks)
