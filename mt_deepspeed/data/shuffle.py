"""Shuffling in blocks: nearly as good as a uniform shuffle, but files are read in large pieces.

A pass over the data goes like this, per data set:

    pairs, turned by a random amount  |  cut into blocks of consecutive pairs (some MiB of file)
    blocks in random order            |  WINDOW_BLOCKS of them at a time, of all data sets, form a window
    pairs of a window in random order |  the stream

Data sets that fit into one window are shuffled uniformly. All of it is arithmetic on keyed permutations: no
table, no state, and the place of one pair is found without looking at any other.

Letters: K places asked for, D data sets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mt_deepspeed.data.keyed import Purpose, keyed_bits, permute, round_keys

BLOCK_BYTES = 4 << 20
"""Read in one piece. Large against what a request to a file server or disk costs."""
WINDOW_BLOCKS = 1024
"""Blocks mixed at a time: 4 GiB, which the page cache of a node has to hold between two uses of a block."""

BAND_BLOCKS = 64
"""Blocks of a data set among which a pair's neighbour is drawn; they are read by the same ranks."""

_WINDOW, _BLOCKS, _TURN, _NEIGHBOUR = range(4)  # what round keys are for
_Int64 = NDArray[np.int64]


def pairs_per_block(num_pairs: int, num_bytes: int) -> int:
    """Consecutive pairs that take about `BLOCK_BYTES` of file; at least one, at most all."""
    return max(1, min(num_pairs, num_pairs * BLOCK_BYTES // max(1, num_bytes)))


@dataclass(frozen=True)
class Found:
    """Pairs at K places.

    Attributes:
        dataset: [K] number of the data set.
        index: [K] pair inside the data set.
        start: [K] first pair of the block it lies in; a block may go over the data set's end to its begin.
        depth: [K] from 0 to 1: where the block lies in the data set's part of the window. Pairs of like depth
            lie in the same blocks.
        neighbour: [K] a random pair of the data set that lies in blocks of about the same depth; possibly the
            pair itself.
    """

    dataset: _Int64
    index: _Int64
    start: _Int64
    depth: NDArray[np.float64]
    neighbour: _Int64

    @classmethod
    def empty(cls, count: int) -> "Found":
        """Room for K pairs."""
        dataset, index, start, neighbour = np.empty((4, count), dtype=np.int64)
        return cls(dataset, index, start, np.empty(count), neighbour)

    def put(self, here: NDArray[np.bool_], part: "Found") -> None:
        """Copies the pairs of `part` to where `here` is True."""
        for field in fields(self):
            getattr(self, field.name)[here] = getattr(part, field.name)


class BlockShuffle:
    """Passes over some data sets, each holding every pair once, in an order of its own.

    Args:
        sizes: [D] pairs per data set.
        blocks: [D] consecutive pairs that stay together in a block, 1 to the data set's size.
        key: Names the order.
    """

    def __init__(self, sizes: Sequence[int], blocks: Sequence[int], key: bytes) -> None:
        self._sizes = np.array(sizes, dtype=np.int64)
        self._blocks = np.array(blocks, dtype=np.int64)
        self._full = self._sizes // self._blocks  # blocks of full size; the rest of the pairs comes last
        self._key = key
        self.num_pairs = int(self._sizes.sum())
        self.num_windows = max(1, round(int(self._full.sum()) / WINDOW_BLOCKS))

    def locate(self, epoch: int, places_K: _Int64) -> Found:
        """The pairs at places [K] (0 to `num_pairs` - 1) of a pass."""
        found = Found.empty(len(places_K))
        seed = int(round_keys(self._key, _NEIGHBOUR, epoch)[0])
        for here, window, starts_D, counts_D in self._windows_of(places_K):
            places, size = places_K[here], int(counts_D.sum())
            keys = round_keys(self._key, _WINDOW, epoch, window)
            shuffled = permute(places - int(starts_D.sum()), size, keys)
            ends_D = np.cumsum(counts_D)
            dataset = np.searchsorted(ends_D, shuffled, side="right")
            inside, counts = shuffled - (ends_D - counts_D)[dataset], counts_D[dataset]
            bands = np.maximum(1, counts // (self._blocks[dataset] * BAND_BLOCKS))
            low, high = (-(-(inside * bands // counts + i) * counts // bands) for i in (0, 1))
            bits = keyed_bits(seed, places, Purpose.NEGATIVE)
            near = low + (bits % (high - low).astype(np.uint64)).astype(np.int64)
            index, start = self._pairs(epoch, dataset, starts_D[dataset] + inside)
            neighbour, _ = self._pairs(epoch, dataset, starts_D[dataset] + near)
            found.put(here, Found(dataset, index, start, inside / counts, neighbour))
        return found

    def _starts(self, window_K: _Int64) -> _Int64:
        """Pairs of each data set in the windows before window [K]: [K, D]."""
        starts_KD = window_K[:, None] * self._full // self.num_windows * self._blocks
        return np.where(window_K[:, None] == self.num_windows, self._sizes, starts_KD)

    def _windows_of(self, places_K: _Int64) -> Iterator[tuple[NDArray[np.bool_], int, _Int64, _Int64]]:
        """(which places, window, its first pair and number of pairs of each data set [D])."""
        low_K = np.zeros(len(places_K), dtype=np.int64)
        high_K = np.full(len(places_K), self.num_windows)
        while (high_K - low_K > 1).any():
            middle_K = (low_K + high_K) // 2
            left_K = self._starts(middle_K).sum(axis=1) > places_K
            low_K, high_K = np.where(left_K, low_K, middle_K), np.where(left_K, middle_K, high_K)
        for window in np.unique(low_K).tolist():
            starts_D, ends_D = self._starts(np.array([window, window + 1]))
            yield low_K == window, window, starts_D, ends_D - starts_D

    def _pairs(self, epoch: int, dataset_K: _Int64, drawn_K: _Int64) -> tuple[_Int64, _Int64]:
        """Pairs that come as number `drawn_K` among the shuffled blocks, and the first pairs of their blocks."""
        index_K, start_K = np.empty((2, len(drawn_K)), dtype=np.int64)
        for dataset in np.unique(dataset_K).tolist():
            here = dataset_K == dataset
            size, block, full = (int(values[dataset]) for values in (self._sizes, self._blocks, self._full))
            slot, offset = np.divmod(drawn_K[here], block)
            whole = slot < full
            slot[whole] = permute(slot[whole], full, round_keys(self._key, _BLOCKS, epoch, dataset))
            # Turned by another amount in each pass, so that blocks are cut, and the rest falls, elsewhere.
            turn = int(round_keys(self._key, _TURN, epoch, dataset)[0]) % size
            start_K[here] = (slot * block + turn) % size
            index_K[here] = (slot * block + offset + turn) % size
        return index_K, start_K
