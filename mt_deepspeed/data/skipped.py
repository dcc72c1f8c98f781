"""What training skips because it cannot be read: said aloud, listed, counted, and only up to a limit."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mt_deepspeed.data.shards import ShardReadError

log = logging.getLogger(__name__)

JUDGED_FROM = 10_000
"""Samples: a share of fewer is taken of this many."""


@dataclass(frozen=True)
class Skipped:
    """A pair, or an image that does not match, that could not be read.

    Attributes:
        position: Stream position.
        pair: Its number in the corpus.
        instead: Number of the pair that took its place, drawn from the same data set by the position.
        fault: Names file, row and reason.
    """

    position: int
    pair: int
    instead: int
    fault: str


class SkippedList:
    """Counts, lists and logs what one rank skips.

    Args:
        file: Where to list it, a JSON object per line; made when there is something to list.
        max_share: Largest share of the samples that may be skipped, counted from the start of this process.
    """

    def __init__(self, file: Path, max_share: float) -> None:
        self._file, self._max_share = file, max_share
        self.num_skipped = 0
        self._num_samples = 0

    def add(self, num_samples: int, skipped: Sequence[Skipped]) -> None:
        """Takes in a micro-batch.

        Raises:
            ShardReadError: More than the share is skipped.
        """
        self._num_samples += num_samples
        if not skipped:
            return
        self.num_skipped += len(skipped)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in skipped)
        for one in skipped:
            log.warning("skipped: %s (position %d takes pair %d)", one.fault, one.position, one.instead)
        if self.num_skipped > self._max_share * max(self._num_samples, JUDGED_FROM):
            raise ShardReadError(
                f"{self.num_skipped} of {self._num_samples} samples could not be read, more than "
                f"data.max_skipped_share {self._max_share} allows; {self._file} lists them, the last is: "
                f"{skipped[-1].fault}"
            )
