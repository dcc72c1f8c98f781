"""Weights of a run, for one process and without DeepSpeed: export, prediction, starting weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mt_deepspeed.engine import store
from mt_deepspeed.engine.slice_files import SliceFiles
from mt_deepspeed.engine.store import CheckpointError


def choose_weights(run: str | Path) -> Path:
    """The checkpoint of a run to use: the best one, else the newest valid one.

    Args:
        run: Run folder, its `checkpoints` folder, or one checkpoint folder (which is then returned).

    Raises:
        CheckpointError: There is no valid checkpoint.
    """
    folder = Path(run)
    if (folder / store.STATE).is_file():
        wrong = store.faults(folder)
        if wrong:
            raise CheckpointError(f"{folder} cannot be used: {'; '.join(wrong[:3])}")
        return folder
    root = folder if folder.name == "checkpoints" else folder / "checkpoints"
    best = store.read_best(root)
    if best is not None and not store.faults(root / store.folder_name(best["step"])):
        return root / store.folder_name(best["step"])
    newest = store.newest_valid(root)
    if newest is None:
        raise CheckpointError(
            f"{root} holds no valid checkpoint; expected folders such as {store.folder_name(1000)}"
        )
    return newest


def read_weights(checkpoint: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters (fp32) and buffers of a checkpoint folder, one at a time."""
    yield from SliceFiles(Path(checkpoint)).tensors()
