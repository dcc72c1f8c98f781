"""One shard file: writing it while hashing it, and opening it."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.checking import Checked
from data_tools.dropped import DroppedRow
from data_tools.files import sync_file
from data_tools.journal import Stretch
from data_tools.shard_format import (
    IMAGE_COLUMNS,
    MAX_SHARD_BYTES,
    ROWS_PER_BATCH,
    SCHEMAS,
    TEXT_COLUMNS,
    ShardFormatError,
    ShardInfo,
)
from data_tools.sources.base import Row

ROWS_PER_SHARD = 4096
"""Source rows after which a shard ends even if there is room left: the work of a process at a time."""

_ROOM = 1 << 20  # of a shard's size for what is not pictures or texts


def open_shard(path: Path, task: str) -> Any:
    """Opens a shard through a memory map: a `pyarrow.ipc.RecordBatchFileReader`.

    Raises:
        ShardFormatError: It is missing, no Arrow file, or of another schema.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowException) as error:
        raise ShardFormatError(f"{path}: not a readable Arrow IPC file: {error}") from error
    if not reader.schema.equals(SCHEMAS[task]):
        raise ShardFormatError(f"{path}: schema\n{reader.schema}\nexpected\n{SCHEMAS[task]}")
    return reader


class OpenShard:
    """The shard being written; nothing is on disk before the first batch is full or the shard is closed.

    Args:
        path: File to write.
        task: Key of `SCHEMAS`.
        split: Its split.
        start: Number of its first row among the source rows of the split.
    """

    def __init__(self, path: Path, task: str, split: str, start: int) -> None:
        self._path = path
        self._task, self._split = task, split
        self._start = self._stop = start
        self._schema = SCHEMAS[task]
        self._batch: list[dict[str, Any]] = []
        self._sink: _HashedFile | None = None
        self._writer: Any = None
        self._rows = self._texts = self._bytes = 0
        self._dropped: Counter[str] = Counter()
        self._listed: list[DroppedRow] = []

    def takes(self, row: Row, checked: Checked) -> bool:
        """Whether there is room for the row."""
        return not self._rows or self._bytes + _size(row, checked) <= MAX_SHARD_BYTES - _ROOM

    def add(self, row: Row, checked: Checked) -> None:
        """Takes the next row, or counts it as dropped."""
        self._stop += 1
        self._dropped.update(row.dropped)
        if checked.reason:
            self._dropped[checked.reason] += 1
            return
        record: dict[str, Any] = {**row.columns, "image_id": row.image_id}
        for (image, width, height), picture in zip(IMAGE_COLUMNS[self._task], checked.pictures, strict=True):
            record |= {image: picture.data, width: picture.width, height: picture.height}
        self._batch.append(record)
        self._rows += 1
        self._texts += len(record[TEXT_COLUMNS[self._task]])
        self._bytes += _size(row, checked)
        if len(self._batch) == ROWS_PER_BATCH:
            self._flush()

    def note(self, row: DroppedRow) -> None:
        """Puts a row that was left out on the list."""
        self._listed.append(row)

    def _flush(self) -> None:
        if self._sink is None:
            self._sink = _HashedFile(self._path)
            self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), self._schema)
        columns = [
            pa.array([record[field.name] for record in self._batch], field.type) for field in self._schema
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._batch = []

    def close(self) -> Stretch:
        """Finishes the file and makes it durable."""
        shard = None
        if self._rows:
            if self._batch:
                self._flush()
            assert self._sink is not None
            self._writer.close()
            self._sink.close()
            sync_file(self._path)
            digest = self._sink.digest.hexdigest()
            shard = ShardInfo(self._path.name, self._rows, self._texts, self._sink.size, digest)
        dropped = dict(sorted(self._dropped.items()))
        return Stretch(self._split, self._start, self._stop, shard, dropped, tuple(self._listed))


def _size(row: Row, checked: Checked) -> int:
    texts = sum(len(str(value)) for value in row.columns.values())
    return sum(len(picture.data) for picture in checked.pictures) + texts


class _HashedFile(io.RawIOBase):
    """A file for writing that hashes what goes through it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._file.write(view)
        self.digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            super().close()
