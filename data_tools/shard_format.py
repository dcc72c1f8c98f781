"""The shard contract: what a data set folder holds. The writer and every reader import it.

A data set is a folder with `manifest.json` and Arrow IPC files `<split>-00000.arrow`, `<split>-00001.arrow`,
... (file format, not stream; uncompressed; record batches of `ROWS_PER_BATCH` rows, the last one of a shard
smaller). The manifest is written last and names every shard with its size and hash; a folder without one is
unfinished, and a file it does not name is no part of the data set.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.files import write_atomically
from data_tools.schemas import (
    CAPTION_SCHEMA,
    ENTAILMENT_SCHEMA,
    IMAGE_COLUMNS,
    NLVR2_SCHEMA,
    SCHEMAS,
    TEXT_COLUMNS,
    VQA_SCHEMA,
)

__all__ = [
    "CAPTION_SCHEMA",
    "ENTAILMENT_SCHEMA",
    "FORMAT_VERSION",
    "IMAGE_COLUMNS",
    "MANIFEST_NAME",
    "MAX_SHARD_BYTES",
    "NLVR2_SCHEMA",
    "ROWS_PER_BATCH",
    "SCHEMAS",
    "TEXT_COLUMNS",
    "VQA_SCHEMA",
    "Manifest",
    "ShardFormatError",
    "ShardInfo",
    "SourceInfo",
    "SplitInfo",
    "check_split_name",
    "read_manifest",
    "shard_name",
    "write_manifest",
]

FORMAT_VERSION = 1
ROWS_PER_BATCH = 256
MAX_SHARD_BYTES = 512 << 20
MANIFEST_NAME = "manifest.json"

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*(-[A-Za-z0-9_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ShardFormatError(ValueError):
    """A data set folder that breaks the contract."""


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One Arrow file.

    Attributes:
        file: Name inside the folder.
        rows: Rows (images).
        texts: Entries of the task's text column over all rows.
        bytes: Size of the file.
        sha256: Hash of the file, hexadecimal.
    """

    file: str
    rows: int
    texts: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """The shards of one split, in order, with the sums of their rows and texts."""

    shards: tuple[ShardInfo, ...]
    rows: int
    texts: int

    @classmethod
    def of(cls, shards: tuple[ShardInfo, ...]) -> "SplitInfo":
        """A split of these shards."""
        return cls(shards, sum(shard.rows for shard in shards), sum(shard.texts for shard in shards))


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """One annotation file the shards were made from: path below the raw folder, size in bytes, hash."""

    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        dataset: Name of the data set, such as "coco".
        task: Key of `SCHEMAS`.
        tool_version: Version of data_tools that wrote the shards.
        options: Conversion options that change the shards.
        splits: Split name -> shards.
        dropped: Reason -> number of rows left out.
        sources: Annotation files.
        format_version: Version of this contract.
    """

    dataset: str
    task: str
    tool_version: str
    options: Mapping[str, Any]
    splits: Mapping[str, SplitInfo]
    dropped: Mapping[str, int]
    sources: tuple[SourceInfo, ...]
    format_version: int = FORMAT_VERSION

    def digest(self) -> str:
        """SHA-256 over the shard hashes and counts in order: two data sets with equal digests are equal."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            for shard in self.splits[name].shards:
                digest.update(f"{name} {shard.sha256} {shard.rows} {shard.texts}\n".encode("ascii"))
        return digest.hexdigest()


def shard_name(split: str, index: int) -> str:
    """The file name of shard `index` (from 0) of a split."""
    return f"{split}-{index:05d}.arrow"


def check_split_name(split: str) -> None:
    """Refuses a split name that cannot be part of a file name.

    Raises:
        ShardFormatError: Letters, digits, `_` and single inner `-` are allowed.
    """
    if not _SPLIT_NAME.fullmatch(split):
        raise ShardFormatError(f"split name {split!r}: use letters, digits, '_' and inner '-' only")


def write_manifest(folder: Path | str, manifest: Manifest) -> None:
    """Writes `manifest.json` so that it appears whole or not at all (temporary file, fsync, rename)."""
    tree = {"format_version": manifest.format_version, **dataclasses.asdict(manifest)}
    text = json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(Path(folder) / MANIFEST_NAME, text.encode("ascii"))


def read_manifest(folder: Path | str) -> Manifest:
    """Reads and checks `manifest.json`.

    Structure, types, names and sums are checked; the shard files themselves are not looked at.

    Raises:
        ShardFormatError: Names the file, the key, what was found and what was expected.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        tree = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except FileNotFoundError as error:
        raise ShardFormatError(
            f"{path}: not found; expected a finished data set (run `python -m data_tools convert` to its end)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ShardFormatError(f"{path}: cannot be read as JSON: {error}") from error
    return _Checker(str(path)).manifest(tree)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError(f"a key stands twice in the object with the keys {sorted(tree)}")
    return tree


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


class _Checker:
    """Turns parsed JSON into the dataclasses; `file` goes into the messages."""

    def __init__(self, file: str) -> None:
        self.file = file

    def fail(self, key: str, found: Any, expected: str) -> ShardFormatError:
        return ShardFormatError(f"{self.file}: {key}: found {found!r:.200}, expected {expected}")

    def fields(self, value: Any, key: str, cls: type) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(value) if isinstance(value, dict) else value
            raise self.fail(key, found, f"an object with exactly the keys {sorted(names)}")
        return value

    def text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value:
            raise self.fail(key, value, "a text that is not empty")
        return value

    def count(self, value: Any, key: str) -> int:
        if type(value) is not int or value < 0:
            raise self.fail(key, value, "an integer >= 0")
        return value

    def sha256(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.fail(key, value, "64 hexadecimal digits in lower case")
        return value

    def object(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key, value, "an object")
        return value

    def list(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(key, value, "a list")
        return value

    def manifest(self, tree: Any) -> Manifest:
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise self.fail("format_version", version, f"{FORMAT_VERSION}; convert again with this version")
        self.fields(tree, "top level", Manifest)
        task = self.text(tree["task"], "task")
        if task not in SCHEMAS:
            raise self.fail("task", task, f"one of {sorted(SCHEMAS)}")
        splits = self.object(tree["splits"], "splits")
        dropped = self.object(tree["dropped"], "dropped")
        sources = self.list(tree["sources"], "sources")
        return Manifest(
            dataset=self.text(tree["dataset"], "dataset"),
            task=task,
            tool_version=self.text(tree["tool_version"], "tool_version"),
            options=self.object(tree["options"], "options"),
            splits={name: self.split(name, splits[name]) for name in sorted(splits)},
            dropped={name: self.count(dropped[name], f"dropped.{name}") for name in sorted(dropped)},
            sources=tuple(self.source(value, f"sources[{i}]") for i, value in enumerate(sources)),
        )

    def split(self, name: str, value: Any) -> SplitInfo:
        key = f"splits.{name}"
        if not _SPLIT_NAME.fullmatch(name):
            raise self.fail(key, name, "a split name of letters, digits, '_' and inner '-'")
        self.fields(value, key, SplitInfo)
        entries = self.list(value["shards"], f"{key}.shards")
        shards = tuple(self.shard(name, index, entry) for index, entry in enumerate(entries))
        split = SplitInfo.of(shards)
        for field in ("rows", "texts"):
            if self.count(value[field], f"{key}.{field}") != getattr(split, field):
                raise self.fail(
                    f"{key}.{field}", value[field], f"{getattr(split, field)}, the sum over shards"
                )
        return split

    def shard(self, split: str, index: int, value: Any) -> ShardInfo:
        key = f"splits.{split}.shards[{index}]"
        self.fields(value, key, ShardInfo)
        if value["file"] != shard_name(split, index):
            raise self.fail(f"{key}.file", value["file"], repr(shard_name(split, index)))
        return ShardInfo(
            file=value["file"],
            rows=self.count(value["rows"], f"{key}.rows"),
            texts=self.count(value["texts"], f"{key}.texts"),
            bytes=self.count(value["bytes"], f"{key}.bytes"),
            sha256=self.sha256(value["sha256"], f"{key}.sha256"),
        )

    def source(self, value: Any, key: str) -> SourceInfo:
        self.fields(value, key, SourceInfo)
        return SourceInfo(
            file=self.text(value["file"], f"{key}.file"),
            bytes=self.count(value["bytes"], f"{key}.bytes"),
            sha256=self.sha256(value["sha256"], f"{key}.sha256"),
        )
