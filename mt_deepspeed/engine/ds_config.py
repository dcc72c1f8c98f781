"""DeepSpeed configuration: the user's JSON holds memory and communication keys, the run config the rest."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch

from mt_deepspeed.config import RunConfig

OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size x ranks)",
    "managed_gradient_accumulation": "no key: the engine counts micro-batches",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "checkpoint": "checkpoint",
    "tensorboard": "no key: TensorBoard files are always written to the run folder",
    "csv_monitor": "no key: metrics.jsonl is always written to the run folder",
    "wandb": "no key: use the TensorBoard files",
    "steps_per_print": "train.log_every_steps",
    "elasticity": "no key: any rank count that divides the global batch resumes a run",
}
"""Keys a DeepSpeed file may not hold -> the run configuration key that decides instead."""

ALLOWED_KEYS = (
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)

REFUSED_ZERO_KEYS = {
    "elastic_checkpoint": "it breaks resuming; checkpoints here fit any rank count and stage without it",
    "load_from_fp32_weights": "checkpoints are read by mt_deepspeed, not by DeepSpeed",
    "zero_quantized_weights": "gradients and weights are communicated unquantized",
    "zero_quantized_gradients": "gradients and weights are communicated unquantized",
    "zero_hpz_partition_size": "secondary partitions are not supported",
    "zenflow": "asynchronous updates are not supported",
    "leaf_module": "a tower returns a list of hidden states, which DeepSpeed's leaf modules cannot handle",
}

REFUSED_ACTIVATION_KEYS = ("partition_activations", "contiguous_memory_optimization")


class DsConfigError(ValueError):
    """A DeepSpeed configuration, or its combination with the run configuration, that cannot be used."""


@dataclass(frozen=True)
class BatchSplit:
    """global batch = micro batch x accumulation x ranks."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def load_ds_config(path: str | Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file; `${NAME}` in it stands for an environment variable.

    Args:
        path: The file.
        environment: Values of variables; None: the process's environment.

    Raises:
        DsConfigError: Unreadable file, broken JSON (with line and column), unset variable, or a refused key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DsConfigError(f"--deepspeed_config {path}: cannot be read ({error.strerror})") from error
    try:
        text = Template(text).substitute(os.environ if environment is None else environment)
    except KeyError as error:
        raise DsConfigError(
            f"{path} uses ${{{error.args[0]}}}: export {error.args[0]}=... before the start"
        ) from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DsConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise DsConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    check_ds_config(values, str(path))
    return values


def check_ds_config(values: dict[str, Any], where: str) -> None:
    """Refuses every key that the run configuration owns, that is unknown, or that is known to do harm.

    Raises:
        DsConfigError: Names the file, the key and what to use instead.
    """
    for key in values:
        if key in OWNED_KEYS:
            raise DsConfigError(
                f"{where}: key `{key}` belongs to the run configuration ({OWNED_KEYS[key]}); remove it here. "
                "DeepSpeed files hold memory and communication keys only"
            )
        if key not in ALLOWED_KEYS:
            near = difflib.get_close_matches(key, ALLOWED_KEYS, n=1, cutoff=0.5)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            raise DsConfigError(f"{where}: unknown key `{key}`{hint}; allowed: {', '.join(ALLOWED_KEYS)}")
    zero = values.get("zero_optimization", {})
    for key, reason in REFUSED_ZERO_KEYS.items():
        if zero.get(key) and not (key == "zero_hpz_partition_size" and zero[key] == 1):
            raise DsConfigError(f"{where}: zero_optimization.{key} is refused: {reason}; remove it")
    for key in REFUSED_ACTIVATION_KEYS:
        if values.get("activation_checkpointing", {}).get(key):
            raise DsConfigError(f"{where}: activation_checkpointing.{key} needs model parallelism; remove it")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise DsConfigError(f"{where}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    if stage < 3 and "offload_param" in zero:
        raise DsConfigError(f"{where}: zero_optimization.offload_param needs stage 3, found stage {stage}")
    if stage == 0 and "offload_optimizer" in zero:
        raise DsConfigError(f"{where}: zero_optimization.offload_optimizer needs stage 1, 2 or 3")
    if float(zero.get("offload_optimizer", {}).get("ratio", 1.0)) != 1.0:
        raise DsConfigError(f"{where}: zero_optimization.offload_optimizer.ratio must be 1 (all or nothing)")


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage, 0 to 3."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def offload_device(ds_config: dict[str, Any]) -> str:
    """Where optimizer states live: `none` (the accelerator), `cpu` or `nvme`."""
    return str(ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none"))


def split_batch(global_batch: int, micro_batch: int, world_size: int) -> BatchSplit:
    """Checks global = micro x accumulation x ranks.

    Raises:
        DsConfigError: Lists the micro-batch sizes that fit this rank count, and rank counts that fit
            this micro-batch size.
    """
    if global_batch < 1 or micro_batch < 1:
        raise DsConfigError(
            f"train.global_batch_size={global_batch} and train.micro_batch_size={micro_batch} must be positive"
        )
    accumulation, rest = divmod(global_batch, micro_batch * world_size)
    if rest == 0 and accumulation > 0:
        return BatchSplit(global_batch, micro_batch, accumulation, world_size)
    if global_batch % world_size:
        fits_ranks = "none: the global batch is not a multiple of the rank count"
    else:
        share = global_batch // world_size
        sizes = [size for size in _divisors(share) if size <= max(4 * micro_batch, 1)][-8:]
        fits_ranks = ", ".join(f"{size} (accumulation {share // size})" for size in sizes)
    ranks = _divisors(global_batch // micro_batch) if global_batch % micro_batch == 0 else []
    raise DsConfigError(
        f"train.global_batch_size={global_batch} cannot be split as micro-batch {micro_batch} x accumulation "
        f"x {world_size} ranks. Valid train.micro_batch_size with {world_size} ranks: {fits_ranks}. "
        f"Valid rank counts with micro-batch {micro_batch}: {', '.join(map(str, ranks)) or 'none'}"
    )


def check_precision(precision: str, device: torch.device, ds_config: dict[str, Any]) -> None:
    """Refuses precisions that the device or the offload target cannot do.

    Raises:
        DsConfigError: fp16 on a CPU, or fp16 with optimizer states on NVMe.
    """
    if precision == "fp16" and device.type == "cpu":
        raise DsConfigError(
            "train.precision=fp16 needs a GPU: CPUs have no fp16 arithmetic; use bf16 or fp32"
        )
    if precision == "fp16" and offload_device(ds_config) == "nvme":
        raise DsConfigError(
            "train.precision=fp16 does not work with optimizer states on NVMe; use bf16, which needs no loss scale"
        )


def merge(
    ds_config: dict[str, Any], config: RunConfig, split: BatchSplit, device: torch.device
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    DeepSpeed always works on fp32 weights: mixed precision is torch autocast around the forward pass
    (`precision.py`), the same at every ZeRO stage.
    """
    check_ds_config(ds_config, "DeepSpeed configuration")
    merged = json.loads(json.dumps(ds_config))
    merged.update(
        train_batch_size=split.global_batch,
        train_micro_batch_size_per_gpu=split.micro_batch,
        gradient_accumulation_steps=split.accumulation,
        gradient_clipping=config.optim.max_grad_norm,  # DeepSpeed's own default is 1.0, not "off"
        zero_allow_untested_optimizer=True,
        steps_per_print=10**9,
    )
    merged.setdefault("zero_optimization", {"stage": 0})
    if device.type == "cpu" and merged.get("activation_checkpointing", {}).get("cpu_checkpointing"):
        # They are there already, and DeepSpeed would empty them without having made a copy.
        merged["activation_checkpointing"]["cpu_checkpointing"] = False
    return merged


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
