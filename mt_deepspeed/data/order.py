"""Sample order: which (image, text) pair stands at which position of the training stream.

Everything here is a pure function of (data digest, sizes, weights, seed): world size, ranks, workers,
micro-batch and accumulation do not enter, nothing is stored, and memory does not grow with the data.
The position of a sample is one integer, the number of samples consumed before it.

Letters: K positions asked for, G global batch, A accumulation steps.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mt_deepspeed.data.keyed import Purpose, keyed_bits, permute, round_keys
from mt_deepspeed.data.shuffle import BlockShuffle, Found

PERIOD = 1000
"""Positions over which mixing weights hold exactly; shares are rounded to 1 / PERIOD."""
LANE_SAMPLES = 64
"""Samples of a global batch that are dealt together because they lie near each other on disk."""

_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Located:
    """Where K positions lie.

    Attributes:
        found: The pairs.
        epoch: [K] pass over the data set (without weights: over all of them), from 0.
    """

    found: Found
    epoch: _Int64


class SampleOrder:
    """The order of an endless stream over several data sets.

    Without weights an epoch is one shuffle of all pairs. With weights every `PERIOD` consecutive positions
    hold exactly `counts` pairs of each data set, in keyed order, and each data set is walked through by its
    own shuffles, one per pass.

    Args:
        sizes: Pairs per data set.
        blocks: Consecutive pairs of each data set that are read together (see `shuffle.pairs_per_block`).
        weights: Relative share of each data set in the stream; None: by size.
        digest: Names the content of the data sets; another digest gives another order.
        seed: Names the order.

    Raises:
        ValueError: An empty data set, or a weight that is not positive or too small to be kept.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        blocks: Sequence[int],
        weights: Sequence[float] | None,
        digest: str,
        seed: int,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"data set sizes {list(sizes)}: every data set needs at least one pair")
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.counts = None if weights is None else period_counts(weights)
        self._key = hashlib.sha256(f"{digest} {self.counts} {seed}".encode()).digest()
        if self.counts is None:
            self._shuffles = [BlockShuffle(sizes, blocks, self._key)]
        else:
            self._shuffles = [
                BlockShuffle([size], [block], hashlib.sha256(self._key + bytes([number])).digest())
                for number, (size, block) in enumerate(zip(sizes, blocks, strict=True))
            ]

    @property
    def num_pairs(self) -> int:
        """Pairs of all data sets together."""
        return int(self.offsets[-1])

    def locate(self, positions_K: _Int64) -> Located:
        """Finds the pairs at stream positions [K]."""
        located = Located(Found.empty(len(positions_K)), np.empty(len(positions_K), dtype=np.int64))
        for here, number, epoch, places in self._passes(positions_K):
            found = self._shuffles[number].locate(epoch, places)
            found.dataset[:] += number  # 0 where one shuffle goes over all data sets
            located.found.put(here, found)
            located.epoch[here] = epoch
        return located

    def _passes(self, positions_K: _Int64) -> Iterator[tuple[NDArray[np.bool_], int, int, _Int64]]:
        """(which positions, number of the shuffle, its pass, places in the pass)."""
        positions_K = np.asarray(positions_K, dtype=np.int64)
        if self.counts is None:
            stream_K, drawn_K = np.zeros_like(positions_K), positions_K
        else:
            stream_K, drawn_K = self._by_weight(positions_K, np.asarray(self.counts))
        for number in np.unique(stream_K).tolist():
            epoch_K, place_K = np.divmod(drawn_K, self._shuffles[number].num_pairs)
            for epoch in np.unique(epoch_K[stream_K == number]).tolist():
                here = (stream_K == number) & (epoch_K == epoch)
                yield here, number, epoch, place_K[here]

    def _by_weight(self, positions_K: _Int64, counts: _Int64) -> tuple[_Int64, _Int64]:
        """Data set of each position, and how many of its pairs are drawn before."""
        starts = np.concatenate([[0], np.cumsum(counts)])
        period_K, within_K = np.divmod(positions_K, PERIOD)
        # A slot of the shuffled period belongs to the data set whose share it falls in, and its place in the
        # share tells how many pairs of that data set came before: no counting, so no state.
        slot_K = np.empty_like(within_K)
        for period in np.unique(period_K).tolist():
            here = period_K == period
            slot_K[here] = permute(within_K[here], PERIOD, round_keys(self._key, period))
        dataset_K = np.searchsorted(starts, slot_K, side="right") - 1
        return dataset_K, period_K * counts[dataset_K] + slot_K - starts[dataset_K]


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


def evaluated_pairs(positions_K: _Int64, num_pairs: int, count: int, seed: int) -> _Int64:
    """The pairs `[K]` at these positions of an evaluation: one drawn from each of `count` equal stretches of the data.

    Drawn, since a fixed stride would meet one kind of pair only where kinds take turns (three hypotheses a picture).
    """
    first_K = positions_K * num_pairs // count
    sizes_K = (positions_K + 1) * num_pairs // count - first_K
    bits_K = keyed_bits(seed, positions_K, Purpose.EVALUATION)
    return first_K + (bits_K % sizes_K.astype(np.uint64)).astype(np.int64)


def micro_batches(
    depth_G: NDArray[np.float64],
    lengths_G: _Int64 | None,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> _Int64:
    """Deals the samples of one global batch to (rank, accumulation step).

    The batch is ordered by the place on disk in steps of about `LANE_SAMPLES` samples, then by length of the
    text, and cut into micro-batches; consecutive ones go to the same rank. So a node reads most of a block
    that it reads any of, texts of like length meet, and which samples meet in a micro-batch depends on its
    size only.

    Args:
        depth_G: [G] place on disk, 0 to 1 (see `shuffle.Found`); G is a multiple of
            `micro_batch_size * world_size`.
        lengths_G: [G] text length, ties in stream order; None: does not matter.
        micro_batch_size: Samples per rank and accumulation step.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        [A, micro_batch_size] offsets into the global batch.
    """
    lanes_G = (depth_G * max(1, len(depth_G) // LANE_SAMPLES)).astype(np.int64)
    order_G = np.lexsort((np.zeros_like(lanes_G) if lengths_G is None else lengths_G, lanes_G))
    return order_G.reshape(world_size, -1, micro_batch_size)[rank]
