"""Puts a run together: optimizer, compilation, activation checkpointing, DeepSpeed engine, guards, in this order."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine.activation_checkpointing import wrap_layers
from mt_deepspeed.engine.compiling import compile_layers
from mt_deepspeed.engine.ds_config import (
    BatchSplit,
    DsConfigError,
    check_precision,
    merge,
    split_batch,
    zero_stage,
)
from mt_deepspeed.engine.gradients import StepGuard
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.optim import build_optimizer, parameter_groups
from mt_deepspeed.engine.precision import LossScale
from mt_deepspeed.engine.protocols import Task, as_module
from mt_deepspeed.engine.runner import TaskRunner
from mt_deepspeed.engine.slices import Ownership
from mt_deepspeed.engine.step import Stepper

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Everything a running training needs; made by `build`."""

    config: RunConfig
    place: Place
    split: BatchSplit
    ds_config: dict[str, Any]
    task: Task
    engine: Any
    optimizer: torch.optim.Optimizer
    ownership: Ownership
    loss_scale: LossScale
    stepper: Stepper


def plan(config: RunConfig, ds_config: dict[str, Any], place: Place) -> tuple[BatchSplit, dict[str, Any]]:
    """All checks that need no model: batch arithmetic, precision, DeepSpeed keys.

    Returns:
        The batch split and the complete DeepSpeed configuration.

    Raises:
        DsConfigError: What is wrong and what would be right.
    """
    split = split_batch(config.train.global_batch_size, config.train.micro_batch_size, place.world_size)
    check_precision(config.train.precision, place.device, ds_config)
    if config.train.compile and zero_stage(ds_config) == 3:
        raise DsConfigError(
            "train.compile=true with ZeRO stage 3: its hooks inside each layer cannot be compiled; use stage 0, 1 or 2"
        )
    return split, merge(ds_config, config, split, place.device)


def build(config: RunConfig, ds_config: dict[str, Any], task: Task, place: Place) -> Session:
    """Wraps `task` for training; call on all ranks. The task's weights must be complete by now."""
    split, complete = plan(config, ds_config, place)
    module = as_module(task)
    names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    roles = {name: task.parameter_role(name) for name in names.values()}
    groups = parameter_groups(module.named_parameters(), roles, config.optim)
    optimizer = build_optimizer(groups, config.optim, complete)
    if config.train.compile:
        log.info("torch.compile: %d layers", compile_layers(task))
    wrapped = wrap_layers(task, config.train.activation_checkpointing, complete)
    if wrapped:
        log.info("activation checkpointing: %d layers", wrapped)
    runner = TaskRunner(task, config.train.precision, place.device)
    engine, *_ = deepspeed.initialize(model=runner, optimizer=optimizer, config=complete)
    if zero_stage(complete) == 0 and place.world_size == 1:
        # Nobody to share gradients with; DeepSpeed would still copy all of them into a buffer and back.
        engine.enable_backward_allreduce = False
    ownership = Ownership(engine, optimizer, names, dist.get_rank(), dist.get_world_size())
    loss_scale = LossScale.for_precision(config.train.precision)
    stepper = Stepper(
        engine, task, ownership, StepGuard(optimizer), loss_scale, config.train.seed, place.device
    )
    numel = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in names)
    log.info(
        "%s parameters, ZeRO stage %d, %s, batch %d = %d x %d x %d ranks",
        f"{numel:,}",
        zero_stage(complete),
        config.train.precision,
        split.global_batch,
        split.micro_batch,
        split.accumulation,
        split.world_size,
    )
    return Session(config, place, split, complete, task, engine, optimizer, ownership, loss_scale, stepper)
