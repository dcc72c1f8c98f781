"""Turns source rows into shards: many processes check pictures, one writes, memory stays bounded.

Shards end at fixed source rows (every `shard_file.ROWS_PER_SHARD`) or when full, so their bytes depend on the rows
alone, not on the number of workers or on how often the conversion was stopped. Each is written to a temporary
file, made durable, renamed and noted in the journal; the manifest comes last. A conversion that is run again
keeps the finished shards.
"""

import errno
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools import TOOL_VERSION, shard_file
from data_tools.files import hash_file
from data_tools.images import MAX_FILE_BYTES, ImageRefused, check_image
from data_tools.journal import JOURNAL_NAME, Journal, Stretch
from data_tools.merge import PART, STARTS
from data_tools.pool import map_in_order
from data_tools.shard_file import Checked, OpenShard
from data_tools.shard_format import (
    FORMAT_VERSION,
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
_ROOM = 1 << 20  # of a shard's size for what is not pictures or texts

POLICIES = ("skip", "error")
Report = Callable[[int, Counter[str], Counter[str]], None]
"""Told (source rows done, dropped so far, changed so far)."""


class ConversionError(ValueError):
    """A conversion that cannot go on."""


@dataclass(frozen=True)
class Job:
    """What to convert.

    Attributes:
        dataset: Name for the manifest.
        task: Key of `SCHEMAS`.
        rows: The source rows, all rows of a split together.
        raw: Raw folder; source files are named relative to it.
        annotations: Files the rows come from.
        options: Options that change the shards, for the manifest.
        policy: "skip": count pictures that are refused; "error": stop at the first.
        part: (I, N): only every N-th stretch of `ROWS_PER_SHARD` source rows, from the I-th on.
    """

    dataset: str
    task: str
    rows: Iterable[Row]
    raw: Path
    annotations: tuple[Path, ...]
    options: dict[str, Any]
    policy: str = "skip"
    part: tuple[int, int] = (1, 1)


def convert(job: Job, out: Path, workers: int = 1, report: Report | None = None) -> Manifest:
    """Writes the data set folder `out`; see the module docstring.

    Raises:
        ConversionError: `out` holds something else, a source changed meanwhile, or policy "error" met a
            refused picture.
        AnnotationError: From the source.
    """
    if job.policy not in POLICIES:
        raise ConversionError(f"policy {job.policy!r}: expected one of {POLICIES}")
    states = [_state(path) for path in job.annotations]
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dataset": job.dataset,
        "task": job.task,
        "tool_version": TOOL_VERSION,
        "options": job.options if job.part == (1, 1) else {**job.options, PART: "{}/{}".format(*job.part)},
        "sources": [_source_info(job.raw, path).__dict__ for path in job.annotations],
    }
    if (out / MANIFEST_NAME).exists():
        return _finished(out, header)
    if not (out / JOURNAL_NAME).exists() and any(out.glob("*.arrow")):
        raise ConversionError(f"{out}: holds shards of something else; remove them or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, header)
    try:
        _write_shards(job, out, journal, workers, report)
        for path, state in zip(job.annotations, states, strict=True):
            if _state(path) != state:
                raise ConversionError(f"{path}: changed while it was read; remove {out} and convert again")
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


def _source_info(raw: Path, path: Path) -> SourceInfo:
    name = path.relative_to(raw).as_posix() if path.is_relative_to(raw) else path.name
    return SourceInfo(name, path.stat().st_size, hash_file(path))


def _finished(out: Path, header: dict[str, Any]) -> Manifest:
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


def _write_shards(job: Job, out: Path, journal: Journal, workers: int, report: Report | None) -> None:
    """Appends all stretches that the journal does not have."""
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for stretch in journal.stretches:
        dropped.update(stretch.dropped)
    done = sum(journal.done(split) for split in {stretch.split for stretch in journal.stretches})
    open_shard: OpenShard | None = None
    for number, row, checked in _checked_rows(job, journal, workers):
        if checked.reason and job.policy == "error":
            raise ConversionError(f"{row.where}: image {row.image_id!r}: {checked.reason}: {checked.detail}")
        if open_shard is not None and not open_shard.takes(number, row, checked):
            journal.add(open_shard.close())
            open_shard = None
        if open_shard is None:
            open_shard = OpenShard(out, job.task, row.split, journal.num_shards(row.split), number)
        reasons = open_shard.add(row, checked)
        dropped.update(reasons)
        changed.update(picture.change for picture in checked.pictures if picture.change)
        done += 1
        if report is not None:
            report(done, dropped, changed)
    if open_shard is not None:
        journal.add(open_shard.close())


def _checked_rows(job: Job, journal: Journal, workers: int) -> Iterator[tuple[int, Row, Checked]]:
    """(number inside its split, row, checked) of the rows that are not done, in order."""
    under_way: deque[list[tuple[int, Row]]] = deque()

    def tasks() -> Iterator[list[tuple[ImageFile, ...] | None]]:
        rows = _numbered(job.rows, journal, job.part)
        while chunk := list(islice(rows, _CHUNK)):
            under_way.append(chunk)
            column = TEXT_COLUMNS[job.task]
            yield [row.images if row.columns[column] and not row.refused else None for _, row in chunk]

    for results in map_in_order(_check_rows, tasks(), workers):
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


def _check_rows(chunk: list[tuple[ImageFile, ...] | None]) -> list[Checked]:
    """Runs in a worker: reads and checks the pictures of rows; None stands for a row that is left out."""
    return [Checked((), "no_text") if images is None else _check_row(images) for images in chunk]


def _check_row(images: tuple[ImageFile, ...]) -> Checked:
    try:
        return Checked(tuple(check_image(_read(image)) for image in images))
    except ImageRefused as refused:
        return Checked((), refused.reason, refused.detail)


def _read(image: ImageFile) -> bytes:
    if isinstance(image, bytes):
        return image
    for path in image:
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ImageRefused("unreadable_file", f"{path}: not a file")
            if found.st_size > MAX_FILE_BYTES:
                raise ImageRefused("file_too_large", str(path))
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file can have such a name
                continue
            if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise ImageRefused("unreadable_file", f"{path}: {error.strerror}") from error
            raise  # a fault of the machine, not of the file
    raise ImageRefused("missing_file", str(image[0]) if image else "no file name")
