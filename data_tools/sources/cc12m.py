"""Conceptual 12M: `cc12m.tsv`, URL TAB caption a line (the other way round than CC3M), without a header.

Pictures are those that could be downloaded, named by the number of their line (from 0) in `cc12m_image/` or
`train_image/` (any usual suffix). Lines whose picture is not there count as `missing_file`.
"""

from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.base import AnnotationError, Request, Row, Source, clean_texts, first_existing
from data_tools.sources.cc3m import SUFFIXES
from data_tools.sources.tables import lines

FOLDERS = ("cc12m_image", "train_image")


def find(raw: Path) -> list[Path]:
    """The table."""
    return [first_existing(raw, ("cc12m.tsv", "utils/cc12m.tsv"), "CC12M table")]


def rows(request: Request) -> Iterator[Row]:
    """One row a line, all in split `train`."""
    for path in request.annotations:
        for number, (where, line) in enumerate(lines(path)):
            fields = line.split("\t")
            if len(fields) < 2:
                raise AnnotationError(f"{where}: found {len(fields)} field, expected url TAB caption")
            captions, dropped = clean_texts(fields[1:2])
            names = [f"{folder}/{number}{suffix}" for folder in FOLDERS for suffix in SUFFIXES]
            files = tuple(request.images / name for name in names)
            yield Row("train", str(number), (files,), {"captions": captions}, where, dropped)


SOURCE = Source("caption", find, rows, {"cc12m.tsv": {"train": (12_423_374, 12_423_374)}})
