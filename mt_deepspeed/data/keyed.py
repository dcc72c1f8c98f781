"""Randomness without state: numbers and permutations that depend on their keys only.

The same key gives the same numbers in every process, at any number of ranks and workers and after a restart.
"""

import enum
import hashlib
import math
import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 18  # fewer leave the permutations of half a dozen items visibly uneven
_WORD = (1 << 64) - 1
_Int64 = NDArray[np.int64]
_UInt64 = NDArray[np.uint64]


class Purpose(enum.IntEnum):
    """What a random number is for: two purposes never share any."""

    MATCH = 0
    NEGATIVE = 1
    MASK = 2
    IMAGE = 3
    FALSE_IMAGE = 4
    SECOND_IMAGE = 5
    FALSE_TEXT = 6
    SPARE = 7
    FALSE_SPARE = 8
    EVALUATION = 9


def keyed_generator(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """A generator whose numbers depend on its arguments only (Philox; 2^64 draws before keys could meet)."""
    key = np.array([seed & _WORD, purpose], dtype=np.uint64)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def keyed_bits(seed: int, positions_K: _Int64, purpose: Purpose) -> _UInt64:
    """64 random bits per position: as `keyed_generator`, for many positions at once."""
    key = np.frombuffer(hashlib.sha256(struct.pack("<QQ", seed & _WORD, purpose)).digest()[:8], np.uint64)
    return _mix(_mix(positions_K.astype(np.uint64)) ^ key)


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
def round_keys(key: bytes, *parts: int) -> _UInt64:
    """Keys for `permute`, derived from a key and some integers."""
    digest = hashlib.shake_128(key + struct.pack(f"<{len(parts)}q", *parts)).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype=np.uint64)


def _mix(x: _UInt64) -> _UInt64:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
