"""The list of links that failed, in the order of the table; it survives being stopped at any moment."""

import json
import os
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.files import publish, temporary_path

_MAX_DETAIL = 200


class FailureListError(ValueError):
    """A list of failures that cannot be read."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One link that failed.

    Attributes:
        row: Number of its row in the table, from 0.
        url: The link.
        reason: Key of `request.REASONS`.
        detail: More about it.
    """

    row: int
    url: str
    reason: str
    detail: str

    def line(self) -> str:
        """One line of JSON."""
        short = {**asdict(self), "detail": self.detail[:_MAX_DETAIL]}
        return json.dumps(short, sort_keys=True) + "\n"


class FailureList:
    """The list of one table while it is gone through once more.

    What a stopped run has written is joined with the list of the run before it, so that nothing is forgotten.
    Only a few entries are in memory at a time.

    Args:
        path: The list; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        if self._partial.exists():
            self._join()
        self._before = read_failures(path)
        self._next = next(self._before, None)
        self._file = self._partial.open("w", encoding="ascii")

    def _join(self) -> None:
        with temporary_path(self._path).open("w", encoding="ascii") as file:
            last = -1
            for failure in read_failures(self._partial, may_be_cut=True):
                file.write(failure.line())
                last = failure.row
            for failure in read_failures(self._path):
                if failure.row > last:
                    file.write(failure.line())
        publish(self._path)
        self._partial.unlink()

    def before(self, row: int, url: str) -> Failure | None:
        """How this link failed before; rows must be asked for in ascending order."""
        while self._next is not None and self._next.row < row:
            self._next = next(self._before, None)
        found = self._next
        return found if found is not None and (found.row, found.url) == (row, url) else None

    def add(self, failure: Failure) -> None:
        """Appends a failure; rows must ascend."""
        self._file.write(failure.line())
        self._file.flush()

    def finish(self) -> None:
        """Gives the list its name once the table has been gone through to its end."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        os.replace(self._partial, self._path)

    def close(self) -> None:
        """Ends before the end of the table: the next run goes on."""
        self._file.close()
        self._before.close()


def read_failures(path: Path, may_be_cut: bool = False) -> Generator[Failure, None, None]:
    """The failures of a list; none if there is no list.

    Args:
        path: The list.
        may_be_cut: Whether a last line without an end is passed over.

    Raises:
        FailureListError: A line is no entry.
    """
    if not path.exists():
        return
    with path.open(encoding="ascii") as file:
        for number, line in enumerate(file, 1):
            if may_be_cut and not line.endswith("\n"):
                return
            try:
                yield Failure(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise FailureListError(
                    f"{path}: line {number}: no entry: {error}; remove the file"
                ) from error
