"""Sample order: which (image, text) pair stands at which position of the training stream.

Everything here is a pure function of (data digest, sizes, weights, seed): world size, ranks, workers,
micro-batch and accumulation do not enter, nothing is stored, and memory does not grow with the data.
The position of a sample is one integer, the number of samples consumed before it.

Letters: K positions asked for, G global batch, A accumulation steps.
"""

import enum
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PERIOD = 1000
"""Positions over which mixing weights hold exactly; shares are rounded to 1 / PERIOD."""

_ROUNDS = 18  # fewer leave the permutations of half a dozen items visibly uneven
_WORD = (1 << 64) - 1
_Int64 = NDArray[np.int64]
_UInt64 = NDArray[np.uint64]


class Purpose(enum.IntEnum):
    """What a keyed generator is for: two purposes never share random numbers."""

    MATCH = 0
    NEGATIVE = 1
    MASK = 2
    IMAGE = 3
    FALSE_IMAGE = 4
    SECOND_IMAGE = 5
    FALSE_TEXT = 6


def keyed_generator(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """A generator whose numbers depend on its arguments only (Philox; 2^64 draws before keys could meet)."""
    key = np.array([seed & _WORD, purpose], dtype=np.uint64)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def keyed_coins(seed: int, positions_K: _Int64, purpose: Purpose) -> NDArray[np.bool_]:
    """One fair coin per position: as `keyed_generator`, for many positions at once."""
    key = np.frombuffer(hashlib.sha256(struct.pack("<QQ", seed & _WORD, purpose)).digest()[:8], np.uint64)
    return (_mix(_mix(positions_K.astype(np.uint64)) ^ key) >> np.uint64(63)).astype(np.bool_)


@dataclass(frozen=True)
class Located:
    """Where K positions lie.

    Attributes:
        dataset: [K] number of the data set.
        index: [K] pair inside the data set.
        epoch: [K] pass over that data set (without weights: over all of them), from 0.
    """

    dataset: _Int64
    index: _Int64
    epoch: _Int64


class SampleOrder:
    """The order of an endless stream over several data sets.

    Without weights an epoch is one keyed permutation of all pairs. With weights every `PERIOD` consecutive
    positions hold exactly `counts` pairs of each data set, in keyed order, and each data set is walked
    through by its own permutations, one per pass.

    Args:
        sizes: Pairs per data set.
        weights: Relative share of each data set in the stream; None: by size.
        digest: Names the content of the data sets; another digest gives another order.
        seed: Names the order.

    Raises:
        ValueError: An empty data set, or a weight that is not positive or too small to be kept.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, digest: str, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"data set sizes {list(sizes)}: every data set needs at least one pair")
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.counts = None if weights is None else period_counts(weights)
        self._sizes = [int(size) for size in sizes]
        self._key = hashlib.sha256(f"{digest} {self.counts} {seed}".encode()).digest()

    @property
    def num_pairs(self) -> int:
        """Pairs of all data sets together."""
        return int(self.offsets[-1])

    def locate(self, positions_K: _Int64) -> Located:
        """Finds the pairs at stream positions [K]."""
        positions_K = np.asarray(positions_K, dtype=np.int64)
        return self._by_size(positions_K) if self.counts is None else self._by_weight(positions_K)

    def _by_size(self, positions_K: _Int64) -> Located:
        epoch_K, within_K = np.divmod(positions_K, self.num_pairs)
        pair_K = np.empty_like(within_K)
        for epoch in np.unique(epoch_K).tolist():
            here = epoch_K == epoch
            pair_K[here] = self._permute(within_K[here], self.num_pairs, -1, epoch)
        dataset_K = np.searchsorted(self.offsets, pair_K, side="right") - 1
        return Located(dataset_K, pair_K - self.offsets[dataset_K], epoch_K)

    def _by_weight(self, positions_K: _Int64) -> Located:
        assert self.counts is not None
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        period_K, within_K = np.divmod(positions_K, PERIOD)
        # A slot of the shuffled period belongs to the data set whose block it falls in, and its place in the
        # block tells how many pairs of that data set came before: no counting, so no state.
        slot_K = np.empty_like(within_K)
        for period in np.unique(period_K).tolist():
            here = period_K == period
            slot_K[here] = self._permute(within_K[here], PERIOD, -2, period)
        dataset_K = np.searchsorted(starts, slot_K, side="right") - 1
        drawn_K = period_K * np.asarray(self.counts)[dataset_K] + slot_K - starts[dataset_K]
        epoch_K, index_K = np.divmod(drawn_K, np.asarray(self._sizes)[dataset_K])
        for dataset, epoch in np.unique(np.stack([dataset_K, epoch_K]), axis=1).T.tolist():
            here = (dataset_K == dataset) & (epoch_K == epoch)
            index_K[here] = self._permute(index_K[here], self._sizes[dataset], dataset, epoch)
        return Located(dataset_K, index_K, epoch_K)

    def _permute(self, index_K: _Int64, size: int, stream: int, epoch: int) -> _Int64:
        return permute(index_K, size, _round_keys(self._key, stream, epoch))


def period_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each data set in a period: `PERIOD` shared out by weight (largest remainders).

    Raises:
        ValueError: A weight is not positive, or its share is below half of 1 / PERIOD.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"data set weights {list(weights)}: every weight must be a positive number")
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
    counts = np.floor(exact + 1e-9).astype(int)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: PERIOD - counts.sum()]] += 1
    if counts.min() < 1:
        raise ValueError(
            f"data set weights {list(weights)}: the share of {min(weights)} is below 1/{PERIOD} and would "
            "never be drawn; give it more or leave the data set out"
        )
    return tuple(counts.tolist())


def micro_batches(
    lengths_G: _Int64 | None, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> _Int64:
    """Deals the samples of one global batch to (accumulation step, rank).

    Micro-batches are contiguous cuts of the (sorted) global batch. Consecutive ones go to different ranks,
    so ranks work on texts of like length at the same time, and which samples meet in a micro-batch depends on
    its size only.

    Args:
        lengths_G: [G] sort key (text length), ties in stream order; None: stream order.
        global_batch_size: G, a multiple of `micro_batch_size * world_size`.
        micro_batch_size: Samples per rank and accumulation step.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        [A, micro_batch_size] offsets into the global batch.
    """
    order_G = np.arange(global_batch_size) if lengths_G is None else np.argsort(lengths_G, kind="stable")
    return order_G.reshape(-1, world_size, micro_batch_size)[:, rank]


def permute(index_K: _Int64, size: int, round_keys: _UInt64) -> _Int64:
    """The images of `index_K` under a keyed permutation of `range(size)`.

    A Feistel network over pairs (left, right) in [a] x [b] with size <= a * b < size + b; indices that leave
    the range walk on along their cycle until they are back (Black and Rogaway, Ciphers with arbitrary finite
    domains, 2002), which on this tight a domain is rare.
    """
    b = np.uint64(math.isqrt(size - 1) + 1)
    a = np.uint64(-(-size // int(b)))
    result_K = index_K.astype(np.uint64)
    outside = np.arange(len(result_K))
    while len(outside):
        left, right = np.divmod(result_K[outside], b)
        for i, key in enumerate(round_keys):
            if i % 2:
                right = (right + _mix(left ^ key) % b) % b
            else:
                left = (left + _mix(right ^ key) % a) % a
        result_K[outside] = left * b + right
        outside = outside[result_K[outside] >= size]
    return result_K.astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(key: bytes, stream: int, epoch: int) -> _UInt64:
    digest = hashlib.shake_128(key + struct.pack("<qq", stream, epoch)).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype=np.uint64)


def _mix(x: _UInt64) -> _UInt64:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
