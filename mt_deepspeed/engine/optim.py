"""Parameter groups, learning-rate schedule and the choice of the Adam implementation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from mt_deepspeed.config import OptimConfig
from mt_deepspeed.engine.ds_config import offload_device

log = logging.getLogger(__name__)

ROLES = ("tower", "cross_modal", "head")

# The published code compares these with substrings of a parameter's full name. They miss CLIP's
# `ln_1.weight` and the managers' `LayerNorm.0.weight`, which therefore decay.
REFERENCE_NO_DECAY = (
    "bias",
    "LayerNorm.bias",
    "LayerNorm.weight",
    "norm.bias",
    "norm.weight",
    "norm1.bias",
    "norm1.weight",
    "norm2.bias",
    "norm2.weight",
)
MIXING_WEIGHTS = ("layer_scores",)


class OptimError(ValueError):
    """Parameters that cannot be put into groups or optimized."""


def reference_decays(name: str) -> bool:
    """Whether the published code applies weight decay to the parameter of this (reference) name."""
    return not any(part in name for part in REFERENCE_NO_DECAY)


def vectors_never_decay(name: str, shape: tuple[int, ...]) -> bool:
    """Whether rule `norms_and_biases` decays a parameter: matrices, kernels and embedding tables only.

    Biases, norm gains, scalars (any shape with a single axis longer than 1) and mixing weights do not.
    """
    long_axes = sum(size > 1 for size in shape)
    return long_axes > 1 and not any(part in name for part in MIXING_WEIGHTS)


@dataclass(frozen=True)
class GroupKey:
    """What the parameters of one optimizer group share."""

    role: str
    decays: bool

    @property
    def label(self) -> str:
        """Short name for logs, such as `head/no_decay`."""
        return f"{self.role}/{'decay' if self.decays else 'no_decay'}"


def assign_groups(
    shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str], rule: str
) -> dict[GroupKey, list[str]]:
    """Sorts parameter names into groups; groups in the order tower, cross_modal, head, decayed first.

    Args:
        shapes: Parameter name -> full shape, trainable parameters only, in model order.
        roles: Parameter name -> `tower`, `cross_modal` or `head`.
        rule: `reference` or `norms_and_biases` (see `OptimConfig.no_decay`).

    Raises:
        OptimError: A 0-dim parameter (DeepSpeed cannot flatten those), or an unknown role.
    """
    groups: dict[GroupKey, list[str]] = {
        GroupKey(role, decays): [] for role in ROLES for decays in (True, False)
    }
    for name, shape in shapes.items():
        if not shape:
            raise OptimError(
                f"parameter {name} has no dimension, which DeepSpeed cannot handle: give it shape [1]"
            )
        if roles[name] not in ROLES:
            raise OptimError(f"parameter {name} has role {roles[name]!r}, expected one of {', '.join(ROLES)}")
        decays = reference_decays(name) if rule == "reference" else vectors_never_decay(name, shape)
        groups[GroupKey(roles[name], decays)].append(name)
    return {key: names for key, names in groups.items() if names}


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], roles: Mapping[str, str], config: OptimConfig
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters.

    Each holds `params`, `lr` (the peak), `peak_lr`, `weight_decay`, `label` and `names`. Shapes are
    those before ZeRO-3 partitioning.
    """
    parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    multiplier = {
        "tower": 1.0,
        "cross_modal": config.cross_modal_lr_multiplier,
        "head": config.head_lr_multiplier,
    }
    return [
        {
            "params": [parameters[name] for name in names],
            "lr": config.lr * multiplier[key.role],
            "peak_lr": config.lr * multiplier[key.role],
            "weight_decay": config.weight_decay if key.decays else 0.0,
            "label": key.label,
            "names": names,
        }
        for key, names in assign_groups(shapes, roles, config.no_decay).items()
    ]


def warmup_steps(config: OptimConfig, max_steps: int) -> int:
    """Warm-up in optimizer steps: a share of `max_steps` (truncated) below 1, else the number itself."""
    return int(config.warmup * max_steps) if config.warmup < 1 else int(config.warmup)


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Factor on every group's peak learning rate for optimizer step `step` (counted from 0).

    Linear from 0 to 1 over the warm-up, so that with a warm-up the first step has learning rate 0
    (as the published code does); then 1 -> `end_lr_ratio` by polynomial or cosine decay, reached at
    `max_steps`; constant afterwards. A pure function: a resumed run needs no scheduler state.
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return step / warmup
    if config.schedule == "constant":
        return 1.0
    if step >= max_steps:
        return config.end_lr_ratio
    left = (max_steps - step) / max(1, max_steps - warmup)
    if config.schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    else:
        shape = left**config.decay_power
    return config.end_lr_ratio + (1.0 - config.end_lr_ratio) * shape


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Writes `peak_lr * factor` into every group; returns label -> learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["label"]: group["lr"] for group in optimizer.param_groups}


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, ds_config: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW (decoupled weight decay) in the fastest implementation this machine has; logs which.

    Offloaded states: DeepSpeedCPUAdam, unless `zero_force_ds_cpu_optimizer` is false in the DeepSpeed
    file (torch then; slower, but nothing is compiled). On a GPU: apex, DeepSpeed's fused kernel, torch
    fused. On a CPU: torch fused, which passes over weights and moments once and compiles nothing.

    The published code used the AdamW of an old transformers release, which adds `eps` before the bias
    correction and decays after the update; with eps 1e-8 the difference is below 1e-6 of a step once
    gradients exceed 1e-5.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if offload_device(ds_config) != "none":
        if ds_config.get("zero_force_ds_cpu_optimizer", True):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            log.info("optimizer: DeepSpeedCPUAdam (states offloaded to %s)", offload_device(ds_config))
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        log.info("optimizer: torch AdamW on the CPU (zero_force_ds_cpu_optimizer is false)")
        return torch.optim.AdamW(groups, **options)
    if get_accelerator().device_name() != "cuda":
        log.info("optimizer: torch AdamW, fused")
        return torch.optim.AdamW(groups, fused=True, **options)
    return _cuda_optimizer(groups, options)


def _cuda_optimizer(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam as ApexFusedAdam

        optimizer = ApexFusedAdam(groups, adam_w_mode=True, **options)
        log.info("optimizer: apex FusedAdam")
        return optimizer
    except (ImportError, RuntimeError) as error:
        log.info("optimizer: no apex (%s)", _first_line(error))
    try:
        from deepspeed.ops.adam import FusedAdam

        optimizer = FusedAdam(groups, adam_w_mode=True, **options)
        log.info("optimizer: DeepSpeed FusedAdam")
        return optimizer
    except Exception as error:  # whatever a failing compiler raises; the reason is logged
        log.info("optimizer: torch AdamW, fused (DeepSpeed FusedAdam: %s)", _first_line(error))
    return torch.optim.AdamW(groups, fused=True, **options)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
