"""Random draws that are the same on every platform and in every process."""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of draws that depends on its key alone.

    Only `random.Random.random` is used, the one method whose sequence Python promises never to change.

    Args:
        key: Anything with a stable `str`, such as `(seed, "coco", index)`.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode("utf-8")).digest()
        self._uniform = random.Random(int.from_bytes(digest, "big")).random

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return int(self._uniform() * limit)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._uniform() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, each equally likely."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different entries in random order (Fisher-Yates)."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]
