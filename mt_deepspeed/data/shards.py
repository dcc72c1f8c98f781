"""Memory-mapped reading of shard folders: pairs (image, text) by number, images without copies.

The folders of all tasks are read here: a text is a caption, a question, a statement or a hypothesis, and what
belongs to it (labels, scores, ids) comes along when asked for.

The index is one small table per open shard (a line per record batch); captions and offsets stay in the file.
Nothing is locked and nothing is shared but read-only pages, so threads and forked workers may read freely.
"""

import mmap
import os
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
    read_manifest,
)

# Buffers of a record batch that are read, as rows of `_Shard._spans`; values follow their offsets, and the
# offsets of a row's second image those of the first.
LIST_OFFSETS, TEXT_OFFSETS, ID_OFFSETS, IMAGE_OFFSETS = 0, 1, 3, 5

_Int64 = NDArray[np.int64]


class ShardReadError(ValueError):
    """A row of a shard that cannot be read; names file, row and reason."""


@dataclass(frozen=True)
class Pair:
    """One (image, text) pair: the row of its image inside the data set, and the text."""

    row: int
    caption: str


@dataclass(frozen=True)
class EncodedImage:
    """One image as stored.

    Attributes:
        data: [bytes] uint8, read-only view of the mapped file.
        where: File, row and image id, for messages.
    """

    data: NDArray[np.uint8]
    where: str


class CaptionDataset:
    """The (image, text) pairs of some splits of one shard folder.

    Pairs and rows are numbered through the splits in the order given, shard by shard, row by row, text by
    text. Shards open when first touched.

    Args:
        folder: Folder with `manifest.json`.
        splits: Names of the splits to read.
        task: Key of `SCHEMAS`: what the folder must hold.

    Raises:
        ShardFormatError: The manifest breaks the contract, or the folder does not hold what it names: a shard
            is missing, has another size, or stands there without being named.
        ValueError: A split that the manifest does not have, or one named twice.
    """

    def __init__(self, folder: Path | str, splits: Sequence[str], task: str = "caption") -> None:
        self.folder = Path(folder)
        self.task = task
        self.splits = tuple(splits)
        manifest = read_manifest(self.folder)
        if manifest.task != task:
            raise ShardFormatError(f"{self.folder}: task {manifest.task!r}, expected {task!r}")
        unknown = [name for name in self.splits if name not in manifest.splits]
        if unknown or not self.splits or len(set(self.splits)) != len(self.splits):
            raise ValueError(
                f"{self.folder}: splits {list(self.splits)} asked for; "
                f"choose from {sorted(manifest.splits)}, at least one, each once"
            )
        self.name = manifest.dataset
        self.digest = manifest.digest()
        self.options = manifest.options
        self._infos = [info for name in self.splits for info in manifest.splits[name].shards]
        named = {info.file for split in manifest.splits.values() for info in split.shards}
        _check_files(self.folder, named, self._infos)
        self._text_starts = np.cumsum([0, *(info.texts for info in self._infos)])
        self._row_starts = np.cumsum([0, *(info.rows for info in self._infos)])
        self._open: dict[int, _Shard] = {}

    @property
    def num_pairs(self) -> int:
        """Number of (image, caption) pairs."""
        return int(self._text_starts[-1])

    @property
    def num_rows(self) -> int:
        """Number of images."""
        return int(self._row_starts[-1])

    def check(self, part: int = 0, num_parts: int = 1) -> None:
        """Opens every `num_parts`-th shard: footer, schema and counts must be what the manifest says.

        Raises:
            ShardFormatError: Names the shard, what was found and what was expected.
        """
        for number in range(part, len(self._infos), num_parts):
            self._shard(number)

    def caption_bytes(self, pairs_K: _Int64) -> _Int64:
        """Length of the captions of pairs [K] in UTF-8 bytes: [K]."""
        lengths_K = np.empty(len(pairs_K), dtype=np.int64)
        shard_K = np.searchsorted(self._text_starts, pairs_K, side="right") - 1
        for number in np.unique(shard_K).tolist():
            here = shard_K == number
            lengths_K[here] = self._shard(number).caption_bytes(pairs_K[here] - self._text_starts[number])
        return lengths_K

    def pair(self, index: int) -> Pair:
        """Reads the text of pair `index` and finds its image's row.

        Raises:
            ShardReadError: The stored offsets or the text are damaged.
        """
        number = int(np.searchsorted(self._text_starts, index, side="right")) - 1
        row, caption = self._shard(number).text(index - int(self._text_starts[number]))
        return Pair(int(self._row_starts[number]) + row, caption)

    def annotations(self, index: int) -> dict[str, Any]:
        """What belongs to the text of pair `index`: its entry of every other list column, by column name.

        Raises:
            ShardReadError: A column holds no entry for the text.
        """
        number = int(np.searchsorted(self._text_starts, index, side="right")) - 1
        return self._shard(number).annotations(index - int(self._text_starts[number]))

    def first_pairs(self) -> _Int64:
        """The first pair of every row that has one, in order."""
        found = [
            self._shard(number).first_texts() + start for number, start in enumerate(self._text_starts[:-1])
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def image(self, row: int, number: int = 0) -> EncodedImage:
        """The encoded image `number` of row `row`.

        Raises:
            ShardReadError: The stored offsets are damaged.
        """
        shard = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        return self._shard(shard).image(row - int(self._row_starts[shard]), number)

    def _shard(self, number: int) -> "_Shard":
        shard = self._open.get(number)
        if shard is None:  # two threads may both open it; one of the two equal shards is then dropped
            info = self._infos[number]
            shard = self._open.setdefault(number, _Shard(self.folder / info.file, info, self.task))
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class _Shard:
    """One mapped shard file and where the buffers of its record batches lie in it."""

    def __init__(self, path: Path, info: ShardInfo, task: str) -> None:
        self.path = path
        self._images = [image for image, _, _ in IMAGE_COLUMNS[task]]
        self._text = TEXT_COLUMNS[task]
        schema = SCHEMAS[task]
        self._lists = [c.name for c in schema if pa.types.is_list(c.type) and c.name != self._text]
        try:
            mapped = _map_file(path)
            arrow = pa.py_buffer(mapped)
            reader = pa.ipc.open_file(pa.BufferReader(arrow))
            if not reader.schema.equals(schema):
                raise ShardFormatError(
                    f"{path}: schema\n{reader.schema}\nexpected\n{schema}\nconvert the data again"
                )
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
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
        spans = [_spans(batch, self._text, self._images, arrow.address) for batch in batches]
        self._spans = np.array(spans, np.int64).reshape(-1, IMAGE_OFFSETS + 2 * len(self._images), 2)
        if (self._spans[:, :, 0] % 8).any() or (self._spans < 0).any() or (self._spans > len(mapped)).any():
            raise ShardFormatError(f"{path}: compressed or not aligned to 8 bytes; convert the data again")
        self._batches = batches if self._lists else []

    def caption_bytes(self, texts_K: _Int64) -> _Int64:
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

    def image(self, row: int, number: int) -> EncodedImage:
        batch = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        within = row - int(self._row_starts[batch])
        offsets = IMAGE_OFFSETS + 2 * number
        data = self._value(self._longs, batch, offsets, within, f"row {row}: {self._images[number]}")
        image_id = self._value(self._words, batch, ID_OFFSETS, within, f"row {row}: image_id").tobytes()
        return EncodedImage(data, f"{self.path}: row {row}: image {image_id.decode('utf-8', 'replace')!r}")

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


def _check_files(folder: Path, named: set[str], needed: Sequence[ShardInfo]) -> None:
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".arrow")}
    extra = sorted(set(sizes) - named)
    if extra:
        raise ShardFormatError(
            f"{folder / extra[0]}: not named in {MANIFEST_NAME} ({len(extra)} such files); "
            "remove it, or convert the data again"
        )
    for info in needed:
        if info.file not in sizes:
            raise ShardFormatError(f"{folder / info.file}: missing; {MANIFEST_NAME} names it")
        if sizes[info.file] != info.bytes:
            raise ShardFormatError(
                f"{folder / info.file}: {sizes[info.file]} bytes, but {MANIFEST_NAME} says {info.bytes}; "
                "copy it or convert the data again"
            )


def _map_file(path: Path) -> mmap.mmap:
    # One descriptor per shard would hit the usual limit of 1024; newer Pythons can let go of it.
    untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **untracked)


def _spans(batch: pa.RecordBatch, text: str, images: Sequence[str], base: int) -> list[tuple[int, int]]:
    """First and last + 1 byte in the file of the buffers of a record batch that are read."""
    _, list_offsets, _, text_offsets, texts = batch.column(text).buffers()
    _, id_offsets, ids = batch.column("image_id").buffers()
    buffers = [list_offsets, text_offsets, texts, id_offsets, ids]
    for name in images:
        buffers += batch.column(name).buffers()[1:]
    # An empty buffer has no place in the file, and nothing ever reads from it.
    starts = [buffer.address - base if buffer is not None and buffer.size else 0 for buffer in buffers]
    return [
        (start, start + (buffer.size if buffer is not None else 0))
        for start, buffer in zip(starts, buffers, strict=True)
    ]
