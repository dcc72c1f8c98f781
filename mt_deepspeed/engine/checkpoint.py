"""Saving and loading of training state, independent of rank count, ZeRO stage and precision."""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mt_deepspeed.engine import durable, store
from mt_deepspeed.engine.agreement import RanksFailedError, together
from mt_deepspeed.engine.build import Session
from mt_deepspeed.engine.protocols import Task, as_module
from mt_deepspeed.engine.slice_files import SliceFiles, slice_key
from mt_deepspeed.engine.slices import MOMENTS, adam_moments, full_weight, set_adam_state
from mt_deepspeed.engine.store import CheckpointError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Snapshot:
    """A copy of this rank's share of the training state, on the CPU: training may go on while it is written."""

    state: dict[str, Any]
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """File name -> tensors."""

    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())


def take_snapshot(session: Session, state: dict[str, Any]) -> Snapshot:
    """Copies what this rank owns; call on all ranks."""
    own = session.ownership
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for slices in own.groups():
        for one in slices:
            key = slice_key(one.name, one.start)
            weights[key] = _copy(one.of(one.holder))
            for moment, value in adam_moments(session.optimizer, one).items():
                moments[f"{key}/{moment}"] = _copy(value)
    part = f"{own.rank:05d}-of-{own.world_size:05d}.safetensors"
    snapshot = Snapshot(state, {f"weights-{part}": weights, f"moments-{part}": moments})
    frozen = _frozen(as_module(session.task))
    if own.rank == 0:
        snapshot.files["frozen.safetensors"] = frozen
    return snapshot


def write_snapshot(snapshot: Snapshot, root: Path, group: Any = None) -> Path:
    """Writes a checkpoint of all ranks' snapshots; call on all ranks. Atomic: all of it appears, or nothing.

    Args:
        group: Process group of its collectives; one of its own lets training go on meanwhile.

    Raises:
        CheckpointError: On all ranks, when one could not write, or the disk has no room.
    """
    rank = dist.get_rank()
    step = snapshot.state["step"]
    final = root / store.folder_name(step)
    temporary = root / f".writing-{final.name}"
    _together(lambda: _prepare(root, temporary) if rank == 0 else None, "preparing a checkpoint", group)
    _check_space(root, snapshot, group)
    written = _together(lambda: _write_files(temporary, snapshot), f"writing checkpoint {final.name}", group)
    entries: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(entries, written, group=group)
    _together(
        lambda: _finish(temporary, final, snapshot, entries) if rank == 0 else None,
        f"publishing {final.name}",
        group,
    )
    return final


def find(root: Path) -> Path | None:
    """The newest valid checkpoint, on all ranks; they share the work of hashing the files."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def check(folder: Path) -> list[str]:
        found: list[list[str]] = [[] for _ in range(ranks)]
        dist.all_gather_object(found, store.faults(folder, lambda index: index % ranks == rank))
        return list(dict.fromkeys(fault for faults in found for fault in faults))

    # A folder list read on each rank could differ while a file system catches up: rank 0's counts.
    steps: list[Any] = [store.list_steps(root)]
    dist.broadcast_object_list(steps, src=0)
    for step in reversed(steps[0]):
        folder = root / store.folder_name(step)
        wrong = check(folder)
        if not wrong:
            return folder
        if rank == 0:
            log.warning("checkpoint %s cannot be used, going back: %s", folder, "; ".join(wrong[:3]))
    return None


def load_weights(task: Task, folder: Path) -> None:
    """Copies a checkpoint's weights and buffers into a task that DeepSpeed does not hold yet.

    Raises:
        CheckpointError: The checkpoint is of another model; names the tensors.
    """
    module = as_module(task)
    targets: dict[str, Tensor] = {**dict(module.named_parameters()), **_buffers(module)}
    shapes = {name: tuple(getattr(target, "ds_shape", target.shape)) for name, target in targets.items()}
    files = SliceFiles(folder)
    found = files.shapes()
    missing, unexpected = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    differing = [
        f"{n} {list(found[n])} for {list(shapes[n])}"
        for n in sorted(shapes)
        if n in found and found[n] != shapes[n]
    ]
    if missing or unexpected or differing:
        raise CheckpointError(
            f"{folder} is a checkpoint of another model: missing {missing[:3]} ({len(missing)}), "
            f"unexpected {unexpected[:3]} ({len(unexpected)}), other shapes {differing[:3]} ({len(differing)}). "
            "Restore the model configuration, or choose another run_dir"
        )
    with torch.no_grad():
        for name, value in files.tensors():
            _assign(targets[name], value)


def load_moments(session: Session, folder: Path, adam_steps: int) -> None:
    """Restores this rank's Adam moments after DeepSpeed has been initialized."""
    files = SliceFiles(folder)
    if adam_steps == 0:
        return
    for slices in session.ownership.groups(everything=True, write_back=True):
        moments: dict[int, dict[str, Tensor]] = {}
        for one in slices:
            if id(one.holder) not in moments:
                moments[id(one.holder)] = set_adam_state(session.optimizer, one.holder, adam_steps)
            for key in MOMENTS:
                one.of(moments[id(one.holder)][key]).copy_(files.read(one.name, one.start, one.numel, key))


@cache  # looking packages up takes 20 ms, in which a save would stop training
def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in (
        "mt-deepspeed",
        "torch",
        "deepspeed",
        "transformers",
        "open_clip_torch",
        "torchdata",
        "numpy",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _prepare(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    store.clean(root)
    temporary.mkdir()


def _check_space(root: Path, snapshot: Snapshot, group: Any) -> None:
    """Refuses a save that cannot fit, while the older checkpoints are untouched."""
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, snapshot.num_bytes(), group=group)
    needed = int(sum(sizes) * 1.02) + (1 << 20)
    lead = dist.get_rank() == 0
    free: list[Any] = [
        _together(lambda: shutil.disk_usage(root).free if lead else None, "asking for free space", group)
    ]
    dist.broadcast_object_list(free, src=0, group=group)
    if free[0] < needed:
        raise CheckpointError(
            f"{root}: a checkpoint needs {needed / 2**30:.2f} GiB, {free[0] / 2**30:.2f} GiB are free. "
            "Free space or lower checkpoint.keep_last; the checkpoints that exist are intact"
        )


def _write_files(temporary: Path, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    return {
        name: durable.write_tensors(temporary / name, tensors) for name, tensors in snapshot.files.items()
    }


def _finish(
    temporary: Path, final: Path, snapshot: Snapshot, entries: list[dict[str, dict[str, Any]]]
) -> None:
    files = {name: entry for found in entries for name, entry in found.items()}
    files[store.STATE] = durable.write_json(temporary / store.STATE, snapshot.state)
    durable.write_json(temporary / store.HASHES, {"files": files})
    store.publish(temporary, final)


def _together(work: Callable[[], T], what: str, group: Any) -> T:
    try:
        return together(work, what, group)
    except RanksFailedError as error:
        raise CheckpointError(f"{error}. Older checkpoints are intact") from error


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    tensors = {name: full_weight(parameter) for name, parameter in frozen.items()}
    return tensors | {name: _copy(buffer) for name, buffer in _buffers(module).items()}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers."""
    persistent = set(module.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _assign(target: Tensor, value: Tensor) -> None:
    import deepspeed

    if not hasattr(target, "ds_id"):
        target.copy_(value)
        return
    with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
        if dist.get_rank() == 0:
            target.copy_(value)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def base_state(session: Session, step: int, adam_steps: int) -> dict[str, Any]:
    """The part of `state.json` that says what was saved."""
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for p, name in session.ownership.names.items()}
    return {
        "format_version": store.FORMAT_VERSION,
        "step": step,
        "samples": step * session.split.global_batch,
        "adam_steps": adam_steps,
        "global_batch_size": session.split.global_batch,
        "world_size": session.split.world_size,
        "zero_stage": session.ownership.stage,
        "precision": session.config.train.precision,
        "loss_scale": {"value": session.loss_scale.value, "clean_steps": session.loss_scale.clean_steps},
        "parameters": shapes,
        "versions": versions(),
        "time": round(time.time(), 3),
    }
