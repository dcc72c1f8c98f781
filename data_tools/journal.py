"""What an unfinished conversion has done: the shards that need not be written again.

The journal lies beside the shards as JSON lines: first what is being converted, then one entry for each
finished stretch of source rows. Entries are made durable one by one; a line cut short by a crash does not
count.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.dropped import DroppedRow
from data_tools.files import hash_file
from data_tools.shard_format import ShardInfo

JOURNAL_NAME = ".progress.jsonl"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Source rows [start, stop) of a split and what became of them.

    Attributes:
        split: The split.
        start: Number of the first row among the source rows of the split.
        stop: One behind the last.
        shard: The file that holds those that were kept; None if none was.
        dropped: Reason -> number.
        listed: Rows left out that the list of dropped rows names.
    """

    split: str
    start: int
    stop: int
    shard: ShardInfo | None
    dropped: Mapping[str, int]
    listed: tuple[DroppedRow, ...] = ()


class Journal:
    """The journal of one output folder.

    Args:
        folder: Output folder.
        header: What is being converted: equal headers mean equal shards.

    Raises:
        ValueError: The folder holds an unfinished conversion with another header.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self._folder = folder
        self._path = folder / JOURNAL_NAME
        self.stretches: list[Stretch] = []
        if self._path.exists():
            self._read(dict(header))
        lines = [json.dumps(header, sort_keys=True)]
        lines += [json.dumps(dataclasses.asdict(stretch), sort_keys=True) for stretch in self.stretches]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def _read(self, header: dict[str, Any]) -> None:
        lines = self._path.read_text("utf-8").split("\n")[:-1]  # what follows the last line end is cut short
        if not lines:
            return
        before = json.loads(lines[0])
        if before != header:
            keys = sorted(key for key in {*before, *header} if before.get(key) != header.get(key))
            raise ValueError(
                f"{self._folder}: holds an unfinished conversion that differs in {', '.join(keys)}; "
                "finish that one, remove the folder, or choose another --out"
            )
        for line in lines[1:]:
            entry = json.loads(line)
            shard = ShardInfo(**entry["shard"]) if entry["shard"] is not None else None
            listed = tuple(DroppedRow(**row) for row in entry["listed"])
            self.stretches.append(Stretch(**{**entry, "shard": shard, "listed": listed}))
        self._keep_valid()

    def _keep_valid(self) -> None:
        """Forgets the first stretch of a split whose shard is damaged, and those after it."""
        broken: set[str] = set()
        kept = []
        for stretch in self.stretches:
            if stretch.split not in broken and self._is_valid(stretch.shard):
                kept.append(stretch)
            else:
                broken.add(stretch.split)
        self.stretches = kept

    def _is_valid(self, shard: ShardInfo | None) -> bool:
        if shard is None:
            return True
        path = self._folder / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes and hash_file(path) == shard.sha256

    def done(self, split: str) -> int:
        """Number of source rows of a split that need not be looked at again."""
        return max((stretch.stop for stretch in self.stretches if stretch.split == split), default=0)

    def add(self, stretch: Stretch) -> None:
        """Notes a finished stretch; its shard must be durable and have its name already."""
        self._file.write(json.dumps(dataclasses.asdict(stretch), sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.stretches.append(stretch)

    def close(self) -> None:
        """Ends."""
        self._file.close()

    def remove(self) -> None:
        """Removes the file, once the manifest stands."""
        self._path.unlink()
