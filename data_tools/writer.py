"""Turns source rows into shards: many processes write them, one puts them in order, memory stays bounded.

Shards end at fixed source rows (every `shard_file.ROWS_PER_SHARD`) or when full, so their bytes depend on the rows
alone, not on the number of workers or on how often the conversion was stopped. A process writes them to temporary
files and makes them durable; this one gives them their names in the order of the rows and notes each in the
journal; the manifest comes last. A conversion that is run again keeps the finished shards.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.dropped import (
    LIST_NAME,
    MAX_LISTED,
    DroppedRow,
    is_counted,
    left_out,
    write_list,
)
from data_tools.files import sync_folder
from data_tools.job import ConversionError, Job, header_of
from data_tools.journal import JOURNAL_NAME, Journal, Stretch
from data_tools.lock import folder_lock
from data_tools.merge import PART, STARTS
from data_tools.pieces import pieces
from data_tools.pool import map_in_order
from data_tools.shard_format import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    read_manifest,
    shard_name,
    write_manifest,
)
from data_tools.stretch import Maker

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
    _remove_leftovers(out)
    try:
        _write_shards(job, out, journal, workers, report)
        for path, state in zip(job.annotations, states, strict=True):
            if _state(path) != state:
                raise ConversionError(f"{path}: changed while it was read; remove {out} and convert again")
        write_list(out, (row for stretch in journal.stretches for row in stretch.listed))
        manifest = _manifest(header, journal.stretches)
        write_manifest(out, manifest)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # from writing, such as to a full disk
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    finally:
        journal.close()
        _remove_leftovers(out)
    journal.remove()
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
        self.done = 0
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._listed: Counter[tuple[str, str]] = Counter()
        self._examples: list[str] = []
        for stretch in journal.stretches:
            self.add(stretch)

    def add(self, stretch: Stretch) -> Stretch:
        """Counts a stretch; returns it with its list of rows left out cut to what there is room for."""
        self.done += stretch.stop - stretch.start
        self.dropped.update(stretch.dropped)
        self._shards[stretch.split] += stretch.shard is not None
        return replace(stretch, listed=tuple(entry for entry in stretch.listed if self._lists(entry)))

    def _lists(self, entry: DroppedRow) -> bool:
        self._listed[entry.split, entry.reason] += 1
        if is_counted(entry.reason) and len(self._examples) < _EXAMPLES:
            self._examples.append(f"image {entry.id!r}: {entry.reason}: {entry.detail}")
        return self._listed[entry.split, entry.reason] <= MAX_LISTED

    def next_name(self, split: str) -> str:
        """The name of the next shard of a split."""
        return shard_name(split, self._shards[split])

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
    if job.policy == "error" or tally.done >= _JUDGED_FROM:  # what an earlier run passed over
        tally.check_budget()
    run = str(os.getpid())
    maker = Maker(out, job.task, job.raw, job.resize, job.policy == "error", run)
    with closing(map_in_order(maker, pieces(job, journal, out, run), workers)) as results:
        for made in results:
            for stretch in made.stretches:
                if stretch.shard is not None:
                    stretch = _name_shard(out, stretch, tally.next_name(stretch.split))
                journal.add(tally.add(stretch))
            tally.changed.update(made.changed)
            if report is not None:
                report(tally.done, tally.dropped, tally.changed)
            if tally.done >= _JUDGED_FROM:
                tally.check_budget()
    tally.check_budget()


def _name_shard(out: Path, stretch: Stretch, name: str) -> Stretch:
    """Gives a finished shard its name."""
    assert stretch.shard is not None
    os.replace(out / stretch.shard.file, out / name)
    sync_folder(out)
    return replace(stretch, shard=replace(stretch.shard, file=name))


def _remove_leftovers(out: Path) -> None:
    """Removes what runs that were stopped have left unfinished."""
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)
