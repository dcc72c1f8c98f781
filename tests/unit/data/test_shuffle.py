"""Block shuffling: every pair once, little of the files at a time, and close to a uniform shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_deepspeed.data import shuffle
from mt_deepspeed.data.shuffle import BlockShuffle, Found, pairs_per_block

KEY = b"key"


def whole_pass(order: BlockShuffle, epoch: int = 0) -> Found:
    return order.locate(epoch, np.arange(order.num_pairs))


@settings(max_examples=60)
@given(
    parts=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 60)), min_size=1, max_size=4),
    window=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_a_pass_holds_every_pair_once(parts: list[tuple[int, int]], window: int, epoch: int) -> None:
    sizes, blocks = [size for size, _ in parts], [min(block, size) for size, block in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "WINDOW_BLOCKS", window)
        order = BlockShuffle(sizes, blocks, KEY)
        found = whole_pass(order, epoch)
    pairs = sorted(zip(found.dataset.tolist(), found.index.tolist(), strict=True))
    assert pairs == [(number, i) for number, size in enumerate(sizes) for i in range(size)]
    assert ((found.depth >= 0) & (found.depth < 1)).all()


def test_little_of_the_data_is_read_at_a_time() -> None:
    """What a node reads in a stretch of the stream lies in few blocks, each taken up completely."""
    size, block = 4 * 1024 * 10, 10
    order = BlockShuffle([size], [block], KEY)
    assert order.num_windows == 4
    for window in range(4):
        found = order.locate(0, np.arange(window * size // 4, (window + 1) * size // 4))
        starts, counts = np.unique(found.start, return_counts=True)
        assert len(starts) == 1024
        assert (counts == block).all()
        assert np.isin(found.index, (starts[:, None] + np.arange(block)) % size).all()
        near = order.locate(0, np.arange(window * size // 4, window * size // 4 + 500))
        assert np.isin(near.neighbour, found.index).all()
        neighbours = order.locate(0, np.arange(order.num_pairs))
        depth = dict(zip(neighbours.index.tolist(), neighbours.depth.tolist(), strict=True))
        gaps = [abs(depth[n] - d) for n, d in zip(near.neighbour.tolist(), near.depth.tolist(), strict=True)]
        assert max(gaps) < 1 / 15


def test_data_sets_mix_in_proportion_all_the_time() -> None:
    sizes, blocks = [60_000, 20_000, 300], [20, 5, 20]
    order = BlockShuffle(sizes, blocks, KEY)
    assert order.num_windows > 5
    found = whole_pass(order)
    for part in np.array_split(found.dataset, order.num_windows):
        assert abs((part == 0).mean() - 60 / 80.3) < 0.03
    thirds = [int((part == 2).sum()) for part in np.array_split(found.dataset, 3)]
    assert min(thirds) >= 60


def test_passes_differ_and_cut_blocks_elsewhere() -> None:
    order = BlockShuffle([5000], [50], KEY)
    one, other = whole_pass(order, 0).index, whole_pass(order, 1).index
    assert (one == other).mean() < 0.01


def serial_correlation(index: np.ndarray) -> float:
    return float(abs(np.corrcoef(index[:-1], index[1:])[0, 1]))


def test_a_data_set_of_one_window_is_shuffled_uniformly() -> None:
    size = 20_000
    order = BlockShuffle([size], [100], KEY)
    assert order.num_windows == 1
    index = whole_pass(order).index
    assert serial_correlation(index) < 4 / np.sqrt(size)
    # Batches of 100 show as many of the 200 blocks as uniform draws would: 200 * (1 - (1 - 1 / 200) ** 100).
    seen = [len(np.unique(batch // 100)) for batch in index.reshape(-1, 100)]
    assert abs(np.mean(seen) - 200 * (1 - (1 - 1 / 200) ** 100)) < 1.5


def test_batches_of_many_windows_are_nearly_as_varied_as_uniform_ones() -> None:
    """Share of pairs of one batch that lie in one block: uniform 1 / blocks, here 1 / WINDOW_BLOCKS at most."""
    blocks, block = 8 * 1024, 40
    order = BlockShuffle([blocks * block], [block], KEY)
    batch = order.locate(0, np.arange(100_000, 100_000 + 4096)).index // block
    _, counts = np.unique(batch, return_counts=True)
    same = (counts * (counts - 1)).sum() / (len(batch) * (len(batch) - 1))
    assert same < 1.3 / shuffle.WINDOW_BLOCKS


def test_blocks_hold_about_the_bytes_they_should() -> None:
    assert pairs_per_block(1000, 1000 * 100_000) == 41
    assert pairs_per_block(10, 10 * 100_000) == 10
    assert pairs_per_block(5, 5 << 30) == 1
    assert pairs_per_block(1, 0) == 1
