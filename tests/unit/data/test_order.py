"""The sample order: bijective, exact, keyed, and a pure function of its inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.data import shuffle
from mt_deepspeed.data.keyed import Purpose, keyed_bits
from mt_deepspeed.data.order import LANE_SAMPLES, PERIOD, Located, SampleOrder, micro_batches, period_counts

SEEDS = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows in little data."""
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", 5)


def order_of(
    sizes: list[int] | tuple[int, ...],
    weights: list[float] | tuple[float, ...] | None,
    seed: int = 0,
    digest: str = "digest",
    block: int = 7,
) -> SampleOrder:
    return SampleOrder(sizes, [min(block, size) for size in sizes], weights, digest, seed)


def pairs_of(order: SampleOrder, located: Located) -> np.ndarray:
    pairs: np.ndarray = order.offsets[located.found.dataset] + located.found.index
    return pairs


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    seed=SEEDS,
    epoch=st.integers(0, 10**6),
    block=st.integers(1, 30),
)
def test_each_epoch_holds_every_pair_once(sizes: list[int], seed: int, epoch: int, block: int) -> None:
    order = order_of(sizes, None, seed, block=block)
    located = order.locate(np.arange(order.num_pairs) + epoch * order.num_pairs)
    assert np.array_equal(np.sort(pairs_of(order, located)), np.arange(sum(sizes)))
    assert (located.epoch == epoch).all()
    assert (located.found.index < np.asarray(sizes)[located.found.dataset]).all()


@settings(max_examples=30)
@given(
    parts=st.lists(st.tuples(st.integers(1, 700), st.floats(0.05, 1.0)), min_size=1, max_size=4),
    seed=SEEDS,
    period=st.integers(0, 10**6),
)
def test_weights_hold_exactly_in_every_period(parts: list[tuple[int, float]], seed: int, period: int) -> None:
    sizes, weights = zip(*parts, strict=True)
    order = order_of(sizes, weights, seed)
    located = order.locate(np.arange(PERIOD) + period * PERIOD)
    counts = np.bincount(located.found.dataset, minlength=len(sizes))
    assert tuple(counts) == order.counts
    assert np.abs(counts / PERIOD - np.asarray(weights) / sum(weights)).max() < 1 / PERIOD


@settings(max_examples=20)
@given(seed=SEEDS)
def test_each_pass_over_a_weighted_data_set_holds_every_pair_once(seed: int) -> None:
    sizes = [130, 370]
    order = order_of(sizes, [1.0, 3.0], seed)
    located = order.locate(np.arange(6 * PERIOD))
    for dataset, size in enumerate(sizes):
        of_this = located.found.dataset == dataset
        full_passes = of_this.sum() // size
        assert full_passes >= 2
        for epoch in range(full_passes):
            seen = located.found.index[of_this & (located.epoch == epoch)]
            assert np.array_equal(np.sort(seen), np.arange(size))


@settings(max_examples=30)
@given(seed=SEEDS, start=st.integers(0, 10**9), weighted=st.booleans())
def test_order_does_not_depend_on_how_it_is_asked(seed: int, start: int, weighted: bool) -> None:
    order = order_of([50, 77, 5], [0.2, 0.5, 0.3] if weighted else None, seed)
    positions = start + np.arange(60)
    together = order.locate(positions)
    for i in (0, 17, 59):
        alone = order.locate(positions[i : i + 1])
        assert alone.epoch[0] == together.epoch[i]
        for name, values in vars(alone.found).items():
            assert values[0] == getattr(together.found, name)[i], name


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_seed_epoch_digest_and_weights_change_the_order(weights: list[float] | None) -> None:
    def first(order: SampleOrder, start: int = 0) -> list[int]:
        return pairs_of(order, order.locate(start + np.arange(100))).tolist()

    order = order_of([500, 500], weights, 1, "digest")
    assert first(order) == first(order_of([500, 500], weights, 1, "digest"))
    assert first(order) != first(order_of([500, 500], weights, 2, "digest"))
    assert first(order) != first(order_of([500, 500], weights, 1, "other"))
    assert first(order) != first(order_of([500, 500], [1.0, 2.0], 1, "digest"))
    assert first(order) != first(order, start=1000)
    assert first(order) != first(order_of([500, 500], weights, 1, block=8))


def test_order_of_a_fixed_key_never_changes() -> None:
    """A change here breaks every resumed run: the code is wrong then, not the numbers."""
    order = order_of([1000, 3000], None, 7)
    located = order.locate(np.array([0, 1, 2, 4000, 10**12]))
    assert pairs_of(order, located).tolist() == [2227, 2230, 3361, 267, 400]
    order = order_of([1000, 3000], [0.5, 0.5], 7)
    located = order.locate(np.array([0, 1, 2, 4000, 10**12]))
    assert pairs_of(order, located).tolist() == [473, 1600, 1524, 589, 453]
    coins = keyed_bits(7, np.arange(8), Purpose.MATCH) >> np.uint64(63)
    assert coins.tolist() == [1, 1, 0, 1, 0, 1, 1, 0]


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
        SampleOrder([3, 0], [1, 1], None, "digest", 0)


@settings(max_examples=30)
@given(seed=SEEDS, start=st.integers(0, 10**9), weighted=st.booleans())
def test_neighbours_are_read_at_about_the_same_time(seed: int, start: int, weighted: bool) -> None:
    sizes = [900, 400, 5]
    order = order_of(sizes, [0.2, 0.5, 0.3] if weighted else None, seed)
    located = order.locate(start + np.arange(300))
    found = located.found
    assert (found.neighbour >= 0).all()
    assert (found.neighbour < np.asarray(sizes)[found.dataset]).all()
    around = order.locate(np.arange(max(0, start - 9000), start + 9000))
    for dataset in (0, 1):
        here = found.dataset == dataset
        passes = np.isin(around.epoch, located.epoch[here])
        near = around.found.index[(around.found.dataset == dataset) & passes]
        assert np.isin(found.neighbour[here], near).all()
    assert len(np.unique(found.neighbour)) > 50


@given(
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 60),
    world_size=st.sampled_from([1, 2, 4]),
    seed=SEEDS,
    by_length=st.booleans(),
)
def test_dealing_splits_the_global_batch_alike_for_every_world_size(
    micro: int, accumulation: int, world_size: int, seed: int, by_length: bool
) -> None:
    size = micro * accumulation * world_size
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 9, size=size) if by_length else None
    depths = generator.random(size)
    alone = micro_batches(depths, lengths, micro, 0, 1)
    dealt = [micro_batches(depths, lengths, micro, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(alone, np.concatenate(dealt))
    assert np.array_equal(np.sort(alone.ravel()), np.arange(size))
    if lengths is not None and size < 2 * LANE_SAMPLES:
        assert (np.diff(lengths[alone.ravel()]) >= 0).all()


def test_a_rank_takes_what_lies_together() -> None:
    generator = np.random.default_rng(0)
    depths, lengths = generator.random(2048), generator.integers(5, 40, size=2048)
    for rank in range(8):
        dealt = micro_batches(depths, lengths, 8, rank, 8)
        own = depths[dealt.ravel()]
        assert abs(own.mean() - (rank + 0.5) / 8) < 0.05
        assert np.ptp(own) < 0.25
        spread = np.ptp(lengths[dealt], axis=1).mean()
        assert spread < 0.4 * np.ptp(lengths)
