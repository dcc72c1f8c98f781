"""One shard file, memory-mapped: texts and images by number, without copies.

The index is a line per record batch that says where its buffers lie; captions and offsets stay in the file.
"""

import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.shard_format import (
    IMAGE_COLUMNS,
    MANIFEST_NAME,
    SCHEMAS,
    TEXT_COLUMNS,
    ShardFormatError,
    ShardInfo,
)

# Buffers of a record batch that are read, as rows of `_Shard._spans`; values follow their offsets. Those of a
# row's first image (offsets, values, widths, heights) come last, then those of its second.
LIST_OFFSETS, TEXT_OFFSETS, ID_OFFSETS, IMAGE_OFFSETS = 0, 1, 3, 5
PER_IMAGE = 4

_Int64 = NDArray[np.int64]


class ShardReadError(ValueError):
    """A row of a shard that cannot be read; names file, row and reason."""


@dataclass(frozen=True)
class EncodedImage:
    """One image as stored.

    Attributes:
        data: [bytes] uint8, read-only view of the mapped file.
        width: Pixels, as the shard states them.
        height: Pixels.
        where: File, row and image id, for messages.
    """

    data: NDArray[np.uint8]
    width: int
    height: int
    where: str


class MappedShard:
    """One mapped shard file and where the buffers of its record batches lie in it."""

    def __init__(self, path: Path, info: ShardInfo, task: str) -> None:
        self.path = path
        self._images = [image for image, _, _ in IMAGE_COLUMNS[task]]
        self._text = TEXT_COLUMNS[task]
        schema = SCHEMAS[task]
        self._lists = [c.name for c in schema if pa.types.is_list(c.type) and c.name != self._text]
        try:
            self._mapped = mapped = _map_file(path)
            arrow = pa.py_buffer(mapped)
            reader = pa.ipc.open_file(pa.BufferReader(arrow))
            if not reader.schema.equals(schema):
                raise ShardFormatError(
                    f"{path}: schema\n{reader.schema}\nexpected\n{schema}\nconvert the data again"
                )
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            if isinstance(error, ShardFormatError):
                raise
            raise ShardFormatError(f"{path}: not a readable Arrow IPC file: {error}") from error
        # Buffers are 8-byte aligned, so whole-file views serve all of them.
        self._bytes = np.frombuffer(mapped, np.uint8)
        self._words = np.frombuffer(mapped, np.int32, len(mapped) // 4)
        self._longs = np.frombuffer(mapped, np.int64, len(mapped) // 8)
        self._row_starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._text_starts = np.cumsum([0, *(len(batch.column(self._text).values) for batch in batches)])
        found = (int(self._row_starts[-1]), int(self._text_starts[-1]))
        if found != (info.rows, info.texts):
            raise ShardFormatError(
                f"{path}: {found[0]} rows and {found[1]} texts, but {MANIFEST_NAME} says {info.rows} and "
                f"{info.texts}; convert the data again"
            )
        spans = [_spans(batch, self._text, IMAGE_COLUMNS[task], arrow.address) for batch in batches]
        self._spans = np.array(spans, np.int64).reshape(-1, IMAGE_OFFSETS + PER_IMAGE * len(self._images), 2)
        if (self._spans[:, :, 0] % 8).any() or (self._spans < 0).any() or (self._spans > len(mapped)).any():
            raise ShardFormatError(f"{path}: compressed or not aligned to 8 bytes; convert the data again")
        self._check_sizes()
        self._batches = batches if self._lists else []

    def _check_sizes(self) -> None:
        """Every buffer of offsets must be as long as its column: they are read without further checks."""
        rows, texts = np.diff(self._row_starts), np.diff(self._text_starts)
        needed = {LIST_OFFSETS: 4 * rows + 4, TEXT_OFFSETS: 4 * texts + 4, ID_OFFSETS: 4 * rows + 4}
        for first in range(IMAGE_OFFSETS, self._spans.shape[1], PER_IMAGE):
            needed |= {first: 8 * rows + 8, first + 2: 4 * rows, first + 3: 4 * rows}
        for buffer, sizes in needed.items():
            short = (np.ptp(self._spans[:, buffer], axis=1) < sizes) & (rows > 0)
            if short.any():
                raise ShardFormatError(
                    f"{self.path}: record batch {short.argmax()}: damaged: a buffer is too short"
                )

    def caption_bytes(self, texts_K: _Int64) -> _Int64:
        """Length of texts [K] in UTF-8 bytes: [K]."""
        batch_K = np.searchsorted(self._text_starts, texts_K, side="right") - 1
        first_K = self._spans[batch_K, TEXT_OFFSETS, 0] // 4 + texts_K - self._text_starts[batch_K]
        return self._words[first_K + 1].astype(np.int64) - self._words[first_K]

    def text(self, text: int) -> tuple[int, str]:
        """(row inside the shard, text) of a text."""
        batch = int(np.searchsorted(self._text_starts, text, side="right")) - 1
        within = text - int(self._text_starts[batch])
        offsets = self._list_offsets(batch)
        row = int(self._row_starts[batch] + np.searchsorted(offsets, within, side="right")) - 1
        data = self._value(self._words, batch, TEXT_OFFSETS, within, f"row {row}: {self._text}")
        try:
            return row, data.tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ShardReadError(f"{self.path}: row {row}: {self._text}: {error}") from error

    def _list_offsets(self, batch: int) -> NDArray[np.int32]:
        """Where the texts of each row of a record batch begin, and where the last ones end."""
        rows = int(self._row_starts[batch + 1] - self._row_starts[batch])
        first = int(self._spans[batch, LIST_OFFSETS, 0]) // 4
        offsets = self._words[first : first + rows + 1]
        texts = int(self._text_starts[batch + 1] - self._text_starts[batch])
        if offsets[0] != 0 or offsets[-1] != texts or (np.diff(offsets) < 0).any():
            raise ShardReadError(f"{self.path}: record batch {batch}: {self._text}: damaged offsets")
        return offsets

    def first_texts(self) -> _Int64:
        """The first text of every row that has one."""
        starts = [np.empty(0, np.int64)]
        for batch, start in enumerate(self._text_starts[:-1]):
            offsets = self._list_offsets(batch)
            starts.append(offsets[:-1][np.diff(offsets) > 0].astype(np.int64) + start)
        return np.concatenate(starts)

    def annotations(self, text: int) -> dict[str, Any]:
        """Entry of every other list column, by name."""
        batch = int(np.searchsorted(self._text_starts, text, side="right")) - 1
        within = text - int(self._text_starts[batch])
        offsets = self._list_offsets(batch)
        row = int(np.searchsorted(offsets, within, side="right")) - 1
        found = {}
        for name in self._lists:
            entries = self._batches[batch].column(name)[row].as_py()
            if len(entries) != offsets[row + 1] - offsets[row]:
                where = f"{self.path}: row {int(self._row_starts[batch]) + row}: {name}"
                raise ShardReadError(
                    f"{where}: found {len(entries)} entries, expected {offsets[row + 1] - offsets[row]}, "
                    f"one for each of {self._text}; convert the data again"
                )
            found[name] = entries[within - int(offsets[row])]
        return found

    def read_ahead(self, first: int, last: int) -> None:
        """Advises the kernel on the first images of texts `first` to `last` - 1, to about a row."""
        if not self._images:
            return
        edges = np.array([first, last])
        batch = (np.searchsorted(self._text_starts, edges, side="right") - 1).clip(max=len(self._spans) - 1)
        # Rows of a batch have about as many texts and bytes each.
        share = (edges - self._text_starts[batch]) / np.diff(self._text_starts)[batch].clip(min=1)
        values = self._spans[batch, IMAGE_OFFSETS + 1]
        begin, end = (values[:, 0] + share * np.ptp(values, axis=1)).astype(int).tolist()
        begin -= begin % mmap.PAGESIZE
        if end > begin:
            self._mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def image(self, row: int, number: int) -> EncodedImage:
        """The encoded image `number` of a row."""
        batch = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        within = row - int(self._row_starts[batch])
        first = IMAGE_OFFSETS + PER_IMAGE * number
        data = self._value(self._longs, batch, first, within, f"row {row}: {self._images[number]}")
        sides = (self._spans[batch, first + 2 : first + 4, 0] // 4 + within).tolist()
        width, height = (int(self._words[place]) for place in sides)
        return EncodedImage(data, width, height, self.where(row))

    def where(self, row: int) -> str:
        """File, row and id, for messages."""
        batch = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        within = row - int(self._row_starts[batch])
        name = self._value(self._words, batch, ID_OFFSETS, within, f"row {row}: image_id").tobytes()
        kind = "image" if self._images else "line"
        return f"{self.path}: row {row}: {kind} {name.decode('utf-8', 'replace')!r}"

    def _value(
        self, offsets: NDArray[Any], batch: int, buffer: int, index: int, what: str
    ) -> NDArray[np.uint8]:
        """Bytes of value `index` of a column whose offsets lie in `buffer` and its values in the next one."""
        first = int(self._spans[batch, buffer, 0]) // offsets.itemsize + index
        start, stop = self._spans[batch, buffer + 1].tolist()
        begin, end = start + int(offsets[first]), start + int(offsets[first + 1])
        if not start <= begin <= end <= stop:
            raise ShardReadError(f"{self.path}: {what}: damaged offsets")
        return self._bytes[begin:end]


def _map_file(path: Path) -> mmap.mmap:
    # A map keeps a descriptor of its own; newer Pythons can do without.
    untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **untracked)


def _spans(
    batch: pa.RecordBatch, text: str, images: Sequence[tuple[str, str, str]], base: int
) -> list[tuple[int, int]]:
    """First and last + 1 byte in the file of the buffers of a record batch that are read."""
    _, list_offsets, _, text_offsets, texts = batch.column(text).buffers()
    _, id_offsets, ids = batch.column("image_id").buffers()
    buffers = [list_offsets, text_offsets, texts, id_offsets, ids]
    for name, width, height in images:
        buffers += batch.column(name).buffers()[1:]
        buffers += [batch.column(side).buffers()[1] for side in (width, height)]
    # An empty buffer has no place in the file, and nothing ever reads from it.
    starts = [buffer.address - base if buffer is not None and buffer.size else 0 for buffer in buffers]
    return [
        (start, start + (buffer.size if buffer is not None else 0))
        for start, buffer in zip(starts, buffers, strict=True)
    ]
