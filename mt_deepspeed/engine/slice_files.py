"""Reads the slices of a checkpoint: whole tensors, or any range of one, from whichever files hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mt_deepspeed.engine.store import CheckpointError, read_state


def slice_key(name: str, start: int) -> str:
    """Key of the slice of parameter `name` that begins at flat element `start`."""
    return f"{name}@{start}"


class SliceFiles:
    """The slices of one checkpoint folder.

    Files are memory-mapped; only what is asked for is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parameters: dict[str, list[int]] = read_state(folder)["parameters"]
        self.trained = {name: tuple(shape) for name, shape in parameters.items()}
        self.handles: dict[Path, Any] = {}
        self.weights = self._index("weights-*.safetensors")
        self.moments = self._index("moments-*.safetensors")
        frozen = folder / "frozen.safetensors"
        self.frozen = self._open(frozen)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the checkpoint."""
        frozen = {name: tuple(self.frozen.get_slice(name).get_shape()) for name in self.frozen.keys()}  # noqa: SIM118
        return {**self.trained, **frozen}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all trained parameters (fp32), then of frozen ones and buffers."""
        for name, shape in self.trained.items():
            yield name, self.read(name, 0, math.prod(shape)).view(shape)
        for name in self.frozen.keys():  # noqa: SIM118
            yield name, self.frozen.get_tensor(name)

    def read(self, name: str, start: int, numel: int, moment: str = "") -> Tensor:
        """Elements [start, start + numel) of a parameter's weights, or of one of its Adam moments [numel].

        Raises:
            CheckpointError: The files do not cover the range.
        """
        found = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for first, size, file, key in (self.moments if moment else self.weights).get((name, moment), []):
            low, high = max(first, start), min(first + size, start + numel)
            if low < high:
                found[low - start : high - start] = self.handles[file].get_slice(key)[
                    low - first : high - first
                ]
                filled += high - low
        if filled != numel:
            what = f"{moment} of {name}" if moment else name
            raise CheckpointError(f"{self.folder}: files hold {filled} of {numel} elements of {what}")
        return found

    def _index(self, pattern: str) -> dict[tuple[str, str], list[tuple[int, int, Path, str]]]:
        """(parameter, moment or "") -> its slices as (first element, size, file, key)."""
        index: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for file in sorted(self.folder.glob(pattern)):
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118
                name, _, rest = key.rpartition("@")
                first, _, moment = rest.partition("/")
                size = handle.get_slice(key).get_shape()[0]
                index.setdefault((name, moment), []).append((int(first), size, file, key))
        return index

    def _open(self, file: Path) -> Any:
        try:
            self.handles[file] = safe_open(str(file), framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
        return self.handles[file]
