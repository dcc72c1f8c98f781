"""Tower states of many items, written once and read often: in memory, or in a file that is mapped into it."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class StateCache:
    """Items of different lengths, each `[length, N, D]`, packed end to end.

    Args:
        lengths: Tokens of each item.
        shape: N and D.
        dtype: Of the states.
        folder: Where to put the file; None: keep the states in memory. The file has no name, so that
            nothing is left of it however the process ends.

    Raises:
        ValueError: The disk has no room for the file.
    """

    def __init__(
        self, lengths: Sequence[int], shape: tuple[int, int], dtype: torch.dtype, folder: Path | None
    ) -> None:
        self.lengths = list(lengths)
        self._starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        size = (self._starts[-1], *shape)
        self._states = torch.empty(size, dtype=dtype) if folder is None else _mapped(size, dtype, folder)

    @staticmethod
    def bytes_needed(lengths: Sequence[int], shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that these items take."""
        return sum(lengths) * shape[0] * shape[1] * dtype.itemsize

    def put(self, item: int, states: Tensor) -> None:
        """Keeps the states `[length, N, D]` of an item, in the cache's dtype."""
        self._states[self._starts[item] : self._starts[item + 1]] = states.to(self._states.dtype)

    def get(self, item: int) -> Tensor:
        """The states `[length, N, D]` of an item; do not write to them."""
        return self._states[self._starts[item] : self._starts[item + 1]]

    def padded(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States `[B, longest, N, D]`, 0 where an item has ended, and a mask `[B, longest]` of 1 and 0."""
        lengths = torch.tensor([self.lengths[item] for item in items])
        states = torch.nn.utils.rnn.pad_sequence([self.get(item) for item in items], batch_first=True)
        return states, (torch.arange(states.shape[1]) < lengths[:, None]).long()


def _mapped(size: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    count = 1
    for one in size:
        count *= one
    num_bytes = count * dtype.itemsize
    descriptor, name = tempfile.mkstemp(prefix="states-", dir=folder)
    try:
        if num_bytes:  # reserved now: a full disk would otherwise kill the process at a later write
            os.posix_fallocate(descriptor, 0, num_bytes)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(size)
    except OSError as error:
        raise ValueError(f"{folder}: no room for {num_bytes / 2**30:.1f} GiB of states: {error}") from error
    finally:
        os.close(descriptor)
        os.unlink(name)
