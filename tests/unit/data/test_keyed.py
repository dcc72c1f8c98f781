"""Keyed numbers and permutations: bijective, even, and told apart by every part of the key."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_deepspeed.data.keyed import Purpose, keyed_bits, keyed_generator, permute

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


def test_generators_differ_by_each_part_of_their_key() -> None:
    def numbers(seed: int, position: int, purpose: Purpose) -> tuple[float, ...]:
        return tuple(keyed_generator(seed, position, purpose).random(4))

    keys = [(1, 5, Purpose.MASK), (2, 5, Purpose.MASK), (1, 6, Purpose.MASK), (1, 5, Purpose.IMAGE)]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(*keys[0]) == numbers(*keys[0])


def coins_of(seed: int) -> np.ndarray:
    return keyed_bits(seed, np.arange(100_000), Purpose.MATCH) >> np.uint64(63)


def test_bits_are_fair_and_keyed() -> None:
    coins = coins_of(3)
    assert abs(coins.mean() - 0.5) < 0.01
    assert abs((coins[1:] == coins[:-1]).mean() - 0.5) < 0.01
    assert (coins != coins_of(4)).mean() > 0.49
