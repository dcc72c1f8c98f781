"""What a raw layout is: where the pictures go, what is written about them, and in which files.

Both follow from the number of the record, its scenes and its draws alone, and files hold the records in order.
So a smaller world is a prefix of a larger one.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from data_tools.files import publish, temporary_path
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.world import Scene

HELD_OUT = 20
"""Of so many records in order the last few are held out."""

Record = Any  # what `describe` returns: JSON-able


@dataclasses.dataclass(frozen=True)
class Layout:
    """One raw layout.

    Attributes:
        pictures: index -> paths of its JPEGs below the layout's folder: one, for some layouts two.
            `write` may pack them into other files and remove them.
        describe: (index, scenes, draws, image size) -> record.
        write: (folder, records in order) writes the annotation files.
    """

    pictures: Callable[[int], tuple[str, ...]]
    describe: Callable[[int, Sequence[Scene], Draw, int], Record]
    write: Callable[[Path, Iterable[Record]], None]


@contextmanager
def text_files(folder: Path, *names: str) -> Iterator[Sequence[TextIO]]:
    """Text files that appear when all are complete."""
    paths = [folder / name for name in names]
    files = [temporary_path(path).open("w", encoding="utf-8", newline="\n") for path in paths]
    try:
        yield files
    finally:
        for file in files:
            file.close()
    for path in paths:
        publish(path)


def write_list(file: TextIO, first: bool, record: Any) -> None:
    """Adds one entry to a JSON list that is written as it comes, one entry a line."""
    file.write(("\n" if first else ",\n") + json.dumps(record))


def write_json_list(
    folder: Path, name: str, records: Iterable[Record], before: str = "[", after: str = "]"
) -> None:
    """A JSON file with one list of records, between `before` and `after`."""
    with text_files(folder, name) as (file,):
        file.write(before)
        for number, record in enumerate(records):
            write_list(file, number == 0, record)
        file.write(f"\n{after}\n")
