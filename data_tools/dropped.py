"""The rows that were left out whole: a list of them for people, and how many there may be.

The list, `dropped.jsonl` beside the manifest, names the first `MAX_LISTED` rows of each split and reason in the
order of the source; the manifest counts them all. Like the shards it depends on the rows alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.files import write_atomically
from data_tools.images import REASONS
from data_tools.options import BadOption

LIST_NAME = "dropped.jsonl"
MAX_LISTED = 1000
MISSING = "missing_file"
HARMLESS = ("no_text", "no_split")
"""Reasons for leaving out a row that say nothing against its picture."""

_BAD = (*(reason for reason in REASONS if reason != MISSING), "unsafe_path")
_MAX_CHARACTERS = 300
_ADDRESS = re.compile("0x[0-9a-f]{6,}")  # of an object in memory: another one in each run


class DroppedListError(ValueError):
    """A list of dropped rows that cannot be read."""


@dataclass(frozen=True)
class DroppedRow:
    """One row that was left out.

    Attributes:
        split: Its split.
        row: Its number among the source rows of the split, from 0.
        id: Name of the picture in its data set.
        reason: Why it was left out.
        detail: More about it, such as the file (below the raw folder where it lies there).
    """

    split: str
    row: int
    id: str
    reason: str
    detail: str

    @classmethod
    def of(cls, split: str, row: int, id: str, reason: str, detail: str, raw: Path) -> "DroppedRow":
        """An entry whose texts are short and the same in every run."""
        text = _ADDRESS.sub("0x...", detail.replace(f"{raw}/", ""))
        return cls(split, row, id[:_MAX_CHARACTERS], reason, text[:_MAX_CHARACTERS])


def write_list(folder: Path, rows: Iterable[DroppedRow]) -> None:
    """Writes the list, or removes it where nothing was dropped."""
    listed: Counter[tuple[str, str]] = Counter()
    lines = []
    for row in sorted(rows, key=lambda row: (row.split, row.row)):
        listed[row.split, row.reason] += 1
        if listed[row.split, row.reason] <= MAX_LISTED:
            lines.append(json.dumps(asdict(row), sort_keys=True) + "\n")
    if lines:
        write_atomically(folder / LIST_NAME, "".join(lines).encode("ascii"))
    else:
        (folder / LIST_NAME).unlink(missing_ok=True)


def read_list(folder: Path) -> list[DroppedRow]:
    """The list of a folder; empty where there is none.

    Raises:
        DroppedListError: A line is no entry.
    """
    path = folder / LIST_NAME
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            rows.append(DroppedRow(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise DroppedListError(f"{path}: line {number}: no entry of dropped rows: {error}") from error
    return rows


@dataclass(frozen=True)
class Budget:
    """How much of the data may be dropped.

    Attributes:
        max_dropped_share: Of the pictures that are there, how many may be refused.
        max_missing_share: Of all pictures, how many may not be there.
    """

    max_dropped_share: float = 1.0
    max_missing_share: float = 1.0

    def check(self) -> None:
        """Refuses impossible shares.

        Raises:
            ValueError: A share is not in [0, 1].
        """
        for option, share in (
            ("--max-dropped-share", self.max_dropped_share),
            ("--max-missing-share", self.max_missing_share),
        ):
            if not 0 <= share <= 1:
                raise BadOption(f"{option} {share}: expected a number from 0 to 1")

    def excess(self, rows: int, dropped: Mapping[str, int]) -> str:
        """What exceeds the budget after so many source rows, as a sentence; empty if nothing does."""
        missing = dropped.get(MISSING, 0)
        wanted = rows - sum(dropped.get(reason, 0) for reason in HARMLESS)
        found = {reason: dropped[reason] for reason in sorted(_BAD) if dropped.get(reason)}
        bad, there = sum(found.values()), wanted - missing
        if bad > self.max_dropped_share * there:
            reasons = ", ".join(f"{reason} {number}" for reason, number in found.items())
            return (
                f"{bad} of {there} pictures that are there were refused ({reasons}), which is more than "
                f"--max-dropped-share {self.max_dropped_share:g} allows"
            )
        if missing > self.max_missing_share * wanted:
            share = f"--max-missing-share {self.max_missing_share:g}"
            return f"{missing} of {wanted} pictures are not there, which is more than {share} allows"
        return ""


ALL_ALLOWED = Budget()
NOTHING_ALLOWED = Budget(0, 0)


def is_counted(reason: str) -> bool:
    """Whether a row left out for this reason weighs on the budget."""
    return reason == MISSING or reason in _BAD


def left_out(dropped: Mapping[str, int]) -> int:
    """How many rows were left out whole, given the counts of a manifest, where texts are counted too."""
    return sum(dropped.get(reason, 0) for reason in (MISSING, *HARMLESS, *_BAD))
