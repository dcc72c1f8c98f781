"""Cuts the rows of a source into pieces for the worker processes."""

import io
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data_tools import shard_file
from data_tools.job import ConversionError, Job
from data_tools.journal import Journal
from data_tools.shard_format import TEXT_COLUMNS, check_split_name
from data_tools.sources.base import ImageFile, Row, Slice
from data_tools.stretch import Piece


def pieces(job: Job, journal: Journal, folder: Path, run: str) -> Iterator[Piece]:
    """The rows that are not done, in order: a piece ends with its split and at each `ROWS_PER_SHARD`-th row.

    Args:
        job: The conversion.
        journal: What is done.
        folder: Where pictures are put that came as bytes, until their piece is done.
        run: Part of the temporary names that no other run uses.
    """
    text_column = TEXT_COLUMNS[job.task]
    own: _Piece | None = None
    for number, row in _numbered(job.rows, journal, job.part):
        if own is not None and (row.split != own.split or number % shard_file.ROWS_PER_SHARD == 0):
            yield own.close()
            own = None
        if own is None:
            spool = folder / f".{row.split}-{number:012d}.{run}.spool.tmp"
            own = _Piece(row.split, number, spool)
        own.add(row, text_column)
    if own is not None:
        yield own.close()


def _numbered(rows: Iterable[Row], journal: Journal, part: tuple[int, int]) -> Iterator[tuple[int, Row]]:
    """Numbers the rows of each split from 0 and leaves out those that are done or of other parts."""
    split, number, done = "", 0, 0
    seen: set[str] = set()
    for row in rows:
        if row.split != split:
            check_split_name(row.split)
            if row.split in seen:
                raise ConversionError(f"{row.where}: rows of split {row.split!r} do not stand together")
            seen.add(row.split)
            split, number, done = row.split, 0, journal.done(row.split)
        if number >= done and number // shard_file.ROWS_PER_SHARD % part[1] == part[0] - 1:
            yield number, row
        number += 1


class _Piece:
    """A piece that is being filled. Pictures that came as bytes go to a file: memory stays bounded."""

    def __init__(self, split: str, start: int, spool: Path) -> None:
        self.split = split
        self._start = start
        self._rows: list[Row] = []
        self._spool_path = spool
        self._spool: io.BufferedWriter | None = None

    def add(self, row: Row, text_column: str) -> None:
        wanted = row.columns[text_column] and not row.refused
        images = tuple(map(self._by_reference, row.images)) if wanted else ()
        self._rows.append(replace(row, images=images))

    def _by_reference(self, image: ImageFile) -> ImageFile:
        if not isinstance(image, bytes):
            return image
        if self._spool is None:
            self._spool = self._spool_path.open("wb")
        start = self._spool.tell()
        self._spool.write(image)
        return Slice(self._spool_path, start, len(image))

    def close(self) -> Piece:
        spool = None
        if self._spool is not None:
            self._spool.close()
            spool = self._spool_path
        return Piece(self.split, self._start, pickle.dumps(self._rows, protocol=5), spool)
