"""Puts a plan together: memory at every ZeRO stage, batch split, speed, data rate, disk, time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.ds_config import DsConfigError, split_batch, zero_stage
from mt_deepspeed.engine.gpus import GPUS, Gpu
from mt_deepspeed.planning.activations import ActivationBytes, activation_bytes
from mt_deepspeed.planning.states import (
    ModelSize,
    StateBytes,
    checkpoint_bytes,
    model_size,
    state_bytes,
    task_figures,
)

GIB = 2**30
RESERVED_GIB = 2.0
"""CUDA context, NCCL buffers and cuBLAS workspace, which PyTorch does not count."""
USABLE_SHARE = 0.95
"""The rest is lost to the fragments between PyTorch's blocks."""
SHIPPED_ZERO = {"overlap_comm": True, "reduce_bucket_size": 50_000_000}
"""What the files in ds_configs/ say; used when no file is given."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs a run would get."""

    nodes: int
    gpus_per_node: int
    gpu: str
    """Key of `GPUS`."""

    @property
    def ranks(self) -> int:
        """One per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def kind(self) -> Gpu:
        """Memory and speed of one GPU."""
        return GPUS[self.gpu]

    @property
    def usable_bytes(self) -> int:
        """GPU memory that a run may plan with."""
        return int((self.kind.memory_gib - RESERVED_GIB) * USABLE_SHARE * GIB)


@dataclass(frozen=True)
class StagePlan:
    """Memory of one GPU at one ZeRO stage."""

    stage: int
    micro_batch: int
    """Samples per GPU and forward pass that the bytes below are for."""
    states: StateBytes
    activations: int
    total: int
    fits: bool
    largest: dict[int, int]
    """Activation checkpointing (0 none, 1 every layer, or the configured value) -> largest micro-batch; 0: none."""


@dataclass(frozen=True)
class Plan:
    """Everything there is to know before a run is submitted; times and rates are predictions."""

    parameters: int
    trained_parameters: int
    precision: str
    text_tokens: int
    cluster: Cluster
    usable_bytes: int
    stages: list[StagePlan]
    recommended_stage: int | None
    """None: not even one sample fits at any stage."""
    checkpointing: int
    """Of the recommendation."""
    micro_batch: int
    accumulation: int
    splits: dict[int, int]
    """Micro-batch -> accumulation, all that fit at the recommended stage."""
    flops_per_sample: float
    mfu: float
    samples_per_s: float
    decodes_per_s_per_node: float
    checkpoint_bytes: int
    disk_bytes: int
    """Of all checkpoints that a run keeps, and the one being written."""
    hours: float
    gpu_hours: float


def make_plan(config: RunConfig, ds_config: dict[str, Any] | None, cluster: Cluster, mfu: float) -> Plan:
    """Plans a run.

    Args:
        config: The run. Its micro-batch is a wish; the recommendation may differ.
        ds_config: The user's DeepSpeed file; None: the shipped ones.
        cluster: Where it would run.
        mfu: Share of the GPU's half-precision peak that the model's arithmetic is expected to reach.

    Raises:
        DsConfigError: The global batch cannot be split over the ranks, or the GPU lacks the precision.
    """
    if config.train.precision == "bf16" and not cluster.kind.has_bf16:
        raise DsConfigError(f"train.precision=bf16: {cluster.gpu} has no bf16 arithmetic; use fp16 or fp32")
    share, rest = divmod(config.train.global_batch_size, cluster.ranks)
    if rest or share == 0:
        split_batch(config.train.global_batch_size, 1, cluster.ranks)  # its message lists what would fit
    text_len = config.data.max_text_len
    size = model_size(config)
    choices = sorted({0, 1, config.train.activation_checkpointing})
    activations = {every: activation_bytes(config, every, text_len, cluster.ranks) for every in choices}
    wanted = min(config.train.micro_batch_size, share)
    wanted = wanted if share % wanted == 0 else max(d for d in divisors(share) if d <= wanted)
    stages = [
        _stage(size, activations, ds_config, stage, cluster, config, share, wanted) for stage in range(4)
    ]
    best, every = _recommend(stages, config, None if ds_config is None else zero_stage(ds_config), wanted)
    largest = best.largest[every] if best else 0
    micro = wanted if 0 < wanted <= largest else largest
    flops, images = task_figures(config, text_len)
    recomputed = 1.0 + (1.0 / (3.0 * every) if every else 0.0)  # a forward pass is a third of a step
    speed = cluster.ranks * cluster.kind.tflops * 1e12 * mfu / (flops * recomputed)
    hours = config.train.max_steps * config.train.global_batch_size / speed / 3600
    checkpoint = checkpoint_bytes(size)
    kept = max(1, config.checkpoint.keep_last) + bool(config.checkpoint.best_metric)
    return Plan(
        parameters=size.total,
        trained_parameters=size.trained,
        precision=config.train.precision,
        text_tokens=text_len,
        cluster=cluster,
        usable_bytes=cluster.usable_bytes,
        stages=stages,
        recommended_stage=best.stage if best else None,
        checkpointing=every,
        micro_batch=micro,
        accumulation=share // micro if micro else 0,
        splits={d: share // d for d in divisors(share) if d <= largest},
        flops_per_sample=flops,
        mfu=mfu,
        samples_per_s=speed,
        decodes_per_s_per_node=speed * images / cluster.nodes,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (kept + 1),
        hours=hours,
        gpu_hours=hours * cluster.ranks,
    )


def as_json(plan: Plan) -> str:
    """The plan as one JSON object; bytes, seconds and counts as plain numbers."""
    return json.dumps(asdict(plan), indent=1)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def at_stage(ds_config: dict[str, Any] | None, stage: int) -> dict[str, Any]:
    """The user's DeepSpeed configuration moved to another stage, or the shipped one of that stage."""
    if ds_config is None:
        return {"zero_optimization": {**SHIPPED_ZERO, "stage": stage}}
    zero = {**ds_config.get("zero_optimization", {}), "stage": stage}
    if stage != zero_stage(ds_config):
        zero.pop("offload_param", None) if stage < 3 else None
        zero.pop("offload_optimizer", None) if stage == 0 else None
    return {**ds_config, "zero_optimization": zero}


def _stage(
    size: ModelSize,
    activations: dict[int, ActivationBytes],
    ds_config: dict[str, Any] | None,
    stage: int,
    cluster: Cluster,
    config: RunConfig,
    share: int,
    wanted: int,
) -> StagePlan:
    complete = at_stage(ds_config, stage)

    def states(micro: int) -> StateBytes:
        return state_bytes(size, complete, cluster.ranks, share // micro)

    largest = {
        every: max(
            (d for d in divisors(share) if states(d).gpu + line.at(d) <= cluster.usable_bytes), default=0
        )
        for every, line in activations.items()
    }
    own = activations[config.train.activation_checkpointing].at(wanted)
    total = states(wanted).gpu + own
    return StagePlan(stage, wanted, states(wanted), own, total, total <= cluster.usable_bytes, largest)


def _recommend(
    stages: list[StagePlan], config: RunConfig, given: int | None, wanted: int
) -> tuple[StagePlan | None, int]:
    """The lowest stage (1 first: it costs no more communication than 0) at which the wanted micro-batch fits.

    Tried in this order: as configured, with every layer recomputed; then the same with any micro-batch.

    Returns:
        The stage and the activation checkpointing to use.
    """
    order = [stages[given]] if given is not None else [stages[1], stages[2], stages[3]]
    every = config.train.activation_checkpointing
    for least in (wanted, 1):
        for choice in dict.fromkeys([every, 1]):
            for one in order:
                if one.largest[choice] >= least:
                    return one, choice
    return None, every
