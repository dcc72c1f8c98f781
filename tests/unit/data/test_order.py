"""The sample order: bijective, exact, keyed, and a pure function of its inputs."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.data.order import (
    PERIOD,
    Purpose,
    SampleOrder,
    keyed_coins,
    keyed_generator,
    micro_batches,
    period_counts,
    permute,
)

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**64 - 1)


def round_keys(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2**64, size=18, dtype=np.uint64)


@given(size=SIZES, seed=SEEDS)
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    images = permute(np.arange(size), size, round_keys(seed))
    assert np.array_equal(np.sort(images), np.arange(size))


@given(size=st.integers(1, 2**40), seed=SEEDS)
def test_permutation_of_a_large_range_stays_inside_and_apart(size: int, seed: int) -> None:
    index = np.unique(np.random.default_rng(seed).integers(size, size=200))
    images = permute(index, size, round_keys(seed))
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(index)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_permutation_of_a_few_items_is_equally_likely(size: int) -> None:
    draws = 6000
    seen = Counter(tuple(permute(np.arange(size), size, round_keys(seed))) for seed in range(draws))
    cells = list(permutations(range(size)))
    expected = draws / len(cells)
    chi_square = sum((seen[cell] - expected) ** 2 / expected for cell in cells)
    degrees = len(cells) - 1
    assert chi_square < degrees + 6 * np.sqrt(2 * degrees)


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_each_epoch_holds_every_pair_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = SampleOrder(sizes, None, "digest", seed)
    located = order.locate(np.arange(order.num_pairs) + epoch * order.num_pairs)
    pairs = order.offsets[located.dataset] + located.index
    assert np.array_equal(np.sort(pairs), np.arange(sum(sizes)))
    assert (located.epoch == epoch).all()
    assert (located.index < np.asarray(sizes)[located.dataset]).all()


@settings(max_examples=30)
@given(
    parts=st.lists(st.tuples(st.integers(1, 700), st.floats(0.05, 1.0)), min_size=1, max_size=4),
    seed=SEEDS,
    period=st.integers(0, 10**6),
)
def test_weights_hold_exactly_in_every_period(parts: list[tuple[int, float]], seed: int, period: int) -> None:
    sizes, weights = zip(*parts, strict=True)
    order = SampleOrder(sizes, weights, "digest", seed)
    located = order.locate(np.arange(PERIOD) + period * PERIOD)
    counts = np.bincount(located.dataset, minlength=len(sizes))
    assert tuple(counts) == order.counts
    assert np.abs(counts / PERIOD - np.asarray(weights) / sum(weights)).max() < 1 / PERIOD


@settings(max_examples=20)
@given(seed=SEEDS)
def test_each_pass_over_a_weighted_data_set_holds_every_pair_once(seed: int) -> None:
    sizes = [130, 370]
    order = SampleOrder(sizes, [1.0, 3.0], "digest", seed)
    located = order.locate(np.arange(6 * PERIOD))
    for dataset, size in enumerate(sizes):
        of_this = located.dataset == dataset
        full_passes = of_this.sum() // size
        assert full_passes >= 2
        for epoch in range(full_passes):
            seen = located.index[of_this & (located.epoch == epoch)]
            assert np.array_equal(np.sort(seen), np.arange(size))


@settings(max_examples=30)
@given(seed=SEEDS, start=st.integers(0, 10**9), weighted=st.booleans())
def test_order_does_not_depend_on_how_it_is_asked(seed: int, start: int, weighted: bool) -> None:
    order = SampleOrder([50, 77, 5], [0.2, 0.5, 0.3] if weighted else None, "digest", seed)
    positions = start + np.arange(60)
    together = order.locate(positions)
    for i in (0, 17, 59):
        alone = order.locate(positions[i : i + 1])
        assert (alone.dataset[0], alone.index[0], alone.epoch[0]) == (
            together.dataset[i],
            together.index[i],
            together.epoch[i],
        )


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_seed_epoch_digest_and_weights_change_the_order(weights: list[float] | None) -> None:
    def first(order: SampleOrder, start: int = 0) -> list[int]:
        located = order.locate(start + np.arange(100))
        return (order.offsets[located.dataset] + located.index).tolist()

    order = SampleOrder([500, 500], weights, "digest", 1)
    assert first(order) == first(SampleOrder([500, 500], weights, "digest", 1))
    assert first(order) != first(SampleOrder([500, 500], weights, "digest", 2))
    assert first(order) != first(SampleOrder([500, 500], weights, "other", 1))
    assert first(order) != first(SampleOrder([500, 500], [1.0, 2.0], "digest", 1))
    assert first(order) != first(order, start=1000)


def test_order_of_a_fixed_key_never_changes() -> None:
    """A change here breaks every resumed run: the code is wrong then, not the numbers."""
    order = SampleOrder([1000, 3000], None, "digest", 7)
    located = order.locate(np.array([0, 1, 2, 4000, 10**12]))
    assert (order.offsets[located.dataset] + located.index).tolist() == [674, 2114, 3193, 3189, 343]
    order = SampleOrder([1000, 3000], [0.5, 0.5], "digest", 7)
    located = order.locate(np.array([0, 1, 2, 4000, 10**12]))
    assert (order.offsets[located.dataset] + located.index).tolist() == [2769, 90, 3412, 3282, 2777]
    coins = keyed_coins(7, np.arange(8), Purpose.MATCH)
    assert coins.tolist() == [True, True, False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1, 1], (500, 500)), ([1, 1, 1], (334, 333, 333)), ([0.1, 0.2, 0.7], (100, 200, 700)), ([5], (1000,))],
)
def test_period_counts(weights: list[float], counts: tuple[int, ...]) -> None:
    assert period_counts(weights) == counts


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1e-6]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        period_counts(weights)


def test_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        SampleOrder([3, 0], None, "digest", 0)


@given(
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 4]),
    seed=SEEDS,
    by_length=st.booleans(),
)
def test_dealing_splits_the_global_batch_alike_for_every_world_size(
    micro: int, accumulation: int, world_size: int, seed: int, by_length: bool
) -> None:
    size = micro * accumulation * world_size
    lengths = np.random.default_rng(seed).integers(5, 9, size=size) if by_length else None
    alone = micro_batches(lengths, size, micro, 0, 1)
    dealt = [micro_batches(lengths, size, micro, rank, world_size) for rank in range(world_size)]
    together = np.stack(dealt, axis=1).reshape(-1, micro)
    assert np.array_equal(alone, together)
    assert np.array_equal(np.sort(together.ravel()), np.arange(size))
    if lengths is not None:
        assert (np.diff(lengths[together.ravel()]) >= 0).all()


def test_generators_differ_by_each_part_of_their_key() -> None:
    def numbers(seed: int, position: int, purpose: Purpose) -> tuple[float, ...]:
        return tuple(keyed_generator(seed, position, purpose).random(4))

    keys = [(1, 5, Purpose.MASK), (2, 5, Purpose.MASK), (1, 6, Purpose.MASK), (1, 5, Purpose.IMAGE)]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(*keys[0]) == numbers(*keys[0])


def test_coins_are_fair_and_keyed() -> None:
    coins = keyed_coins(3, np.arange(100_000), Purpose.MATCH)
    assert abs(coins.mean() - 0.5) < 0.01
    assert abs((coins[1:] == coins[:-1]).mean() - 0.5) < 0.01
    assert (coins != keyed_coins(4, np.arange(100_000), Purpose.MATCH)).mean() > 0.49
