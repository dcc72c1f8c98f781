"""Scores of finished blocks on disk, so that an interrupted evaluation goes on where it stopped."""

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IDENTITY = "identity.json"


class KeptScores:
    """A folder with `identity.json` and one `.npy` file for each finished block.

    All ranks may open the same folder, and any number of ranks may continue it.

    Args:
        folder: Created if missing.
        identity: What the scores follow from.

    Raises:
        ValueError: The folder holds scores of something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str | int]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / IDENTITY
        if not path.exists():
            if any(folder.glob("block-*.npy")):
                raise ValueError(
                    f"{folder}: found blocks of scores but no {IDENTITY}; choose an empty folder"
                )
            _write(path, (json.dumps(dict(identity), indent=1) + "\n").encode())
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read: {error}; delete the folder") from error
        for name in identity:
            if found.get(name) != identity[name]:
                raise ValueError(
                    f"{folder}: holds scores of another evaluation: its {name} is {found.get(name)}, here "
                    f"{identity[name]}; name another folder, or delete it to start anew"
                )

    def finished(self) -> list[int]:
        """Numbers of the finished blocks, in order."""
        return sorted(int(path.stem.removeprefix("block-")) for path in self.folder.glob("block-*.npy"))

    def load(self, block: int, shape: tuple[int, int]) -> Tensor:
        """Scores of a finished block.

        Raises:
            ValueError: The file is damaged.
        """
        path = self._path(block)
        try:
            scores = torch.from_numpy(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; delete it") from error
        if tuple(scores.shape) != shape or scores.dtype != torch.float32:
            raise ValueError(
                f"{path}: found {scores.dtype} {tuple(scores.shape)}, expected {shape}; delete it"
            )
        return scores

    def keep(self, block: int, scores: Tensor) -> None:
        """Writes the scores of a finished block; the file appears whole or not at all."""
        content = io.BytesIO()
        np.save(content, scores.numpy())
        _write(self._path(block), content.getbuffer())

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.npy"


def _write(path: Path, content: bytes | memoryview) -> None:
    # Not named by the process: ranks of two nodes may have the same number.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
