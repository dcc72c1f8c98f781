"""Turns source rows into shards: many processes check pictures, one writes, memory stays bounded.

Shards end at fixed source rows (every `shard_file.ROWS_PER_SHARD`) or when full, so their bytes depend on the rows
alone, not on the number of workers or on how often the conversion was stopped. Each is written to a temporary
file, made durable, renamed and noted in the journal; the manifest comes last. A conversion that is run again
keeps the finished shards.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools import shard_file
from data_tools.checking import Checked, check_rows
from data_tools.dropped import (
    HARMLESS,
    LIST_NAME,
    MAX_LISTED,
    DroppedRow,
    is_counted,
    left_out,
    write_list,
)
from data_tools.job import ConversionError, Job, header_of
from data_tools.journal import JOURNAL_NAME, Journal, Stretch
from data_tools.lock import folder_lock
from data_tools.merge import PART, STARTS
from data_tools.pool import map_in_order
from data_tools.shard_file import OpenShard
from data_tools.shard_format import (
    MANIFEST_NAME,
    TEXT_COLUMNS,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    check_split_name,
    read_manifest,
    write_manifest,
)
from data_tools.sources.base import ImageFile, Row

_CHUNK = 32  # rows a task
_JUDGED_FROM = 1000  # rows: a share of fewer says little, and the end is near
_EXAMPLES = 3

Report = Callable[[int, Counter[str], Counter[str]], None]
"""Told (source rows done, dropped so far, changed so far)."""


def convert(job: Job, out: Path, workers: int = 1, report: Report | None = None) -> Manifest:
    """Writes the data set folder `out`; see the module docstring.

    Raises:
        ConversionError: `out` holds something else, a source changed meanwhile, policy "error" met a refused
            picture, or more than the budget was refused.
        AnnotationError: From the source.
        FolderInUse: Another run writes `out`.
    """
    job.check()
    states = [_state(path) for path in job.annotations]
    header = header_of(job)
    if (out / MANIFEST_NAME).exists():
        return _finished(job, out, header)
    if not (out / JOURNAL_NAME).exists() and any(out.glob("*.arrow")):
        raise ConversionError(f"{out}: holds shards of something else; remove them or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        if (out / MANIFEST_NAME).exists():  # another run has just finished it
            return _finished(job, out, header)
        return _convert(job, out, header, states, workers, report)


def _convert(
    job: Job,
    out: Path,
    header: dict[str, Any],
    states: list[tuple[int, int]],
    workers: int,
    report: Report | None,
) -> Manifest:
    journal = Journal(out, header)
    try:
        _write_shards(job, out, journal, workers, report)
        for path, state in zip(job.annotations, states, strict=True):
            if _state(path) != state:
                raise ConversionError(f"{path}: changed while it was read; remove {out} and convert again")
        write_list(out, (row for stretch in journal.stretches for row in stretch.listed))
        manifest = _manifest(header, journal.stretches)
        write_manifest(out, manifest)
    except BaseException:
        journal.close()
        raise
    journal.close(remove=True)
    return manifest


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _finished(job: Job, out: Path, header: dict[str, Any]) -> Manifest:
    """The manifest of a conversion that has been finished before, if it is the same one."""
    manifest = read_manifest(out)
    found = {key: getattr(manifest, key) for key in header}
    found["options"] = {key: value for key, value in manifest.options.items() if key != STARTS}
    found["sources"] = [source.__dict__ for source in manifest.sources]
    keys = sorted(key for key in header if found[key] != header[key])
    if keys:
        raise ConversionError(
            f"{out}: holds a finished data set that differs in {', '.join(keys)}; "
            "remove it or choose another --out"
        )
    rows = sum(split.rows for split in manifest.splits.values())
    excess = job.limit.excess(rows + left_out(manifest.dropped), manifest.dropped)
    if excess:
        raise ConversionError(f"{out}: holds a finished data set: {excess}; see {out / LIST_NAME}")
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    return manifest


def _manifest(header: dict[str, Any], stretches: list[Stretch]) -> Manifest:
    shards: dict[str, list[ShardInfo]] = {}
    starts: dict[str, list[int]] = {}
    dropped: Counter[str] = Counter()
    for stretch in stretches:
        shards.setdefault(stretch.split, [])
        starts.setdefault(stretch.split, [])
        if stretch.shard is not None:
            shards[stretch.split].append(stretch.shard)
            starts[stretch.split].append(stretch.start)
        dropped.update(stretch.dropped)
    if PART in header["options"]:
        header = {**header, "options": {**header["options"], STARTS: starts}}
    sources = tuple(SourceInfo(**source) for source in header["sources"])
    splits = {split: SplitInfo.of(tuple(shards[split])) for split in sorted(shards)}
    return Manifest(
        **{**header, "splits": splits, "dropped": dict(sorted(dropped.items())), "sources": sources}
    )


# The conversion itself.


class _Tally:
    """Counts over all rows of a conversion, those of earlier runs too."""

    def __init__(self, job: Job, journal: Journal) -> None:
        self._job = job
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._listed: Counter[tuple[str, str]] = Counter()
        self._examples: list[str] = []
        for stretch in journal.stretches:
            self.dropped.update(stretch.dropped)
            for entry in stretch.listed:
                self._list(entry)
        self.done = sum(stretch.stop - stretch.start for stretch in journal.stretches)

    def _list(self, entry: DroppedRow) -> None:
        self._listed[entry.split, entry.reason] += 1
        if is_counted(entry.reason) and len(self._examples) < _EXAMPLES:
            self._examples.append(f"image {entry.id!r}: {entry.reason}: {entry.detail}")

    def add(self, open_shard: OpenShard, number: int, row: Row, checked: Checked) -> None:
        """Puts a row into the shard, or counts and lists it there."""
        self.done += 1
        self.dropped.update(open_shard.add(row, checked))
        self.changed.update(picture.change for picture in checked.pictures if picture.change)
        if not checked.reason:
            return
        if self._listed[row.split, checked.reason] < MAX_LISTED:
            detail = checked.detail or row.where
            entry = DroppedRow.of(row.split, number, row.image_id, checked.reason, detail, self._job.raw)
            self._list(entry)
            open_shard.note(entry)
        if self.done >= _JUDGED_FROM:
            self.check_budget()

    def check_budget(self) -> None:
        """Raises `ConversionError` if more was dropped than may be."""
        excess = self._job.limit.excess(self.done, self.dropped)
        if excess:
            examples = "; ".join(self._examples)
            raise ConversionError(
                f"{excess}. {examples}. The same command with a larger share goes on from here"
            )


def _write_shards(job: Job, out: Path, journal: Journal, workers: int, report: Report | None) -> None:
    """Appends all stretches that the journal does not have."""
    tally = _Tally(job, journal)
    if job.policy == "error":  # what an earlier run passed over
        tally.check_budget()
    open_shard: OpenShard | None = None
    for number, row, checked in _checked_rows(job, journal, workers):
        if checked.reason and checked.reason not in HARMLESS and job.policy == "error":
            raise ConversionError(f"{row.where}: image {row.image_id!r}: {checked.reason}: {checked.detail}")
        if open_shard is not None and not open_shard.takes(number, row, checked):
            journal.add(open_shard.close())
            open_shard = None
        if open_shard is None:
            open_shard = OpenShard(out, job.task, row.split, journal.num_shards(row.split), number)
        tally.add(open_shard, number, row, checked)
        if report is not None:
            report(tally.done, tally.dropped, tally.changed)
    if open_shard is not None:
        journal.add(open_shard.close())
    tally.check_budget()


def _checked_rows(job: Job, journal: Journal, workers: int) -> Iterator[tuple[int, Row, Checked]]:
    """(number inside its split, row, checked) of the rows that are not done, in order."""
    under_way: deque[list[tuple[int, Row]]] = deque()

    def tasks() -> Iterator[list[tuple[ImageFile, ...] | None]]:
        rows = _numbered(job.rows, journal, job.part)
        while chunk := list(islice(rows, _CHUNK)):
            under_way.append(chunk)
            column = TEXT_COLUMNS[job.task]
            yield [row.images if row.columns[column] and not row.refused else None for _, row in chunk]

    check = partial(check_rows, resize=job.resize)
    for results in map_in_order(check, tasks(), workers):
        for (number, row), checked in zip(under_way.popleft(), results, strict=True):
            yield number, row, Checked((), row.refused) if row.refused else checked


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
