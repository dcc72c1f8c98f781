"""Memory-mapped reading of shard folders: pairs (image, text) by number, images without copies.

The folders of all tasks are read here: a text is a caption, a question, a statement, a hypothesis, a sentence or
the name of a class, and what belongs to it (labels, scores, ids) comes along when asked for.

Only so many shards are open at a time, whatever the size of the data set. Threads may read freely.
"""

import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.shard_format import MANIFEST_NAME, ShardFormatError, ShardInfo, read_manifest
from mt_deepspeed.data.mapped_shard import EncodedImage, MappedShard, ShardReadError

__all__ = ["CaptionDataset", "EncodedImage", "Pair", "ShardReadError"]

MAX_OPEN_SHARDS = 2048
"""More than the blocks of a window: a shard is then opened about once in a window."""

_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """One (image, text) pair: the row of its image inside the data set, and the text."""

    row: int
    caption: str


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
        self._open: OrderedDict[int, MappedShard] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        _allow_open_files()

    @property
    def num_pairs(self) -> int:
        """Number of (image, caption) pairs."""
        return int(self._text_starts[-1])

    @property
    def num_rows(self) -> int:
        """Number of images."""
        return int(self._row_starts[-1])

    @property
    def num_bytes(self) -> int:
        """Size of the shards."""
        return sum(info.bytes for info in self._infos)

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

    def where(self, row: int) -> str:
        """File, row and id of row `row`, for messages."""
        shard = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        return self._shard(shard).where(row - int(self._row_starts[shard]))

    def read_ahead(self, first: int, last: int) -> None:
        """Has the system read the images of pairs `first` to `last` - 1 in one go, without waiting for it."""
        begin = int(np.searchsorted(self._text_starts, first, side="right")) - 1
        end = int(np.searchsorted(self._text_starts, last, side="left"))
        for number in range(begin, end):
            start, stop = (int(self._text_starts[i]) for i in (number, number + 1))
            self._shard(number).read_ahead(max(first, start) - start, min(last, stop) - start)

    def _shard(self, number: int) -> MappedShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                info = self._infos[number]
                shard = self._open[number] = MappedShard(self.folder / info.file, info, self.task)
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)  # views of it keep its file mapped
            self._open.move_to_end(number)
            return shard

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), threading.Lock()


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


def _allow_open_files() -> None:
    """Lets this process have as many open files as it may: the usual 1024 are fewer than the open shards."""
    if sys.version_info < (3, 13):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
