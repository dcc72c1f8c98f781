"""The links of the tables that can be fetched, and the file that `convert` expects each picture in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from data_tools.sources import cc3m, cc12m, sbu
from data_tools.sources.base import AnnotationError, is_inside
from data_tools.sources.json_stream import entries
from data_tools.sources.tables import lines

_MAX_NAME_BYTES = 200  # of a file, with room for the temporary name


@dataclass(frozen=True, slots=True)
class Link:
    """One picture to fetch.

    Attributes:
        row: Number of its row in the table, from 0.
        url: Where it is.
        file: Where it goes, below the raw folder.
        fault: Why there is no point in fetching it; empty if there is.
    """

    row: int
    url: str
    file: str
    fault: str = ""


def _cc3m(path: Path) -> Iterator[Link]:
    split = "val" if path.name.lower().startswith("val") else "train"
    return _table(path, 1, f"{split}_image", "caption TAB url")


def _cc12m(path: Path) -> Iterator[Link]:
    return _table(path, 0, cc12m.FOLDERS[0], "url TAB caption")


def _table(path: Path, column: int, folder: str, expected: str) -> Iterator[Link]:
    for number, (where, line) in enumerate(lines(path)):
        fields = line.split("\t")
        if len(fields) < 2:
            raise AnnotationError(f"{where}: found {len(fields)} field, expected {expected}")
        yield Link(number, fields[column].strip(), f"{folder}/{number}.jpg")


def _sbu(path: Path) -> Iterator[Link]:
    """Files are named by the URL: a name that comes again with another URL would show the wrong picture."""
    owner: dict[int, int] = {}  # hashes of names and URLs: a million of them must fit
    pairs = zip_longest(entries(path, "image_urls"), entries(path, "captions"))
    for number, (entry, caption) in enumerate(pairs):
        if entry is None or caption is None:
            raise AnnotationError(
                f"{(entry or caption)[0]}: 'image_urls' and 'captions' differ in length; expected equal lists"
            )
        where, url = entry
        if not isinstance(url, str):
            raise AnnotationError(f"{where}: found {url!r:.80}, expected a text")
        name = url.rsplit("/", 1)[-1]
        fault = (
            "" if is_inside(name) and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES else "bad_url"
        )
        if not fault and owner.setdefault(hash(name), hash(url)) != hash(url):
            fault = "duplicate_name"
        yield Link(number, url, f"{sbu.FOLDERS[0]}/{name}", fault)


TABLES: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path], Iterator[Link]]]] = {
    "cc3m": (cc3m.find, _cc3m),
    "cc12m": (cc12m.find, _cc12m),
    "sbu": (sbu.find, _sbu),
}
"""Data set -> (raw folder -> its tables, table -> links)."""
