"""Puts the parts of a conversion (`convert --part I/N`) together: the same bytes as one run."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.dropped import DroppedRow, read_list, write_list
from data_tools.files import publish, temporary_path
from data_tools.lock import folder_lock
from data_tools.options import BadOption
from data_tools.shard_format import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    SplitInfo,
    read_manifest,
    shard_name,
    write_manifest,
)

PART, STARTS = "part", "starts"
"""Options of a part's manifest: "I/N", and split -> first source row of each of its shards."""


class MergeError(ValueError):
    """Parts that do not make one data set."""


def merge(parts: Sequence[Path], out: Path) -> Manifest:
    """Makes the data set folder `out` of finished parts; shards are linked, or copied to another file system.

    Raises:
        MergeError: A part is missing, there twice, or of another conversion; `out` holds something else.
        ShardFormatError: A part is not finished or broken.
        FolderInUse: Another run writes `out`.
    """
    manifests = [read_manifest(part) for part in parts]
    _check_parts(parts, manifests)
    placed: dict[str, list[tuple[int, Path, ShardInfo]]] = {}
    dropped: Counter[str] = Counter()
    for part, manifest in zip(parts, manifests, strict=True):
        dropped.update(manifest.dropped)
        for split, info in manifest.splits.items():
            starts = manifest.options[STARTS][split]
            own = [(start, part, shard) for start, shard in zip(starts, info.shards, strict=True)]
            placed.setdefault(split, []).extend(own)
    splits, moves = {}, []
    for split in sorted(placed):
        shards = []
        for index, (_, part, shard) in enumerate(sorted(placed[split], key=lambda place: place[0])):
            name = shard_name(split, index)
            moves.append((part / shard.file, out / name))
            shards.append(ShardInfo(name, shard.rows, shard.texts, shard.bytes, shard.sha256))
        splits[split] = SplitInfo.of(tuple(shards))
    first = manifests[0]
    merged = Manifest(
        dataset=first.dataset,
        task=first.task,
        tool_version=first.tool_version,
        options=_common_options(first),
        splits=splits,
        dropped=dict(sorted(dropped.items())),
        sources=first.sources,
    )
    listed = [row for part in parts for row in read_list(part)]
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        _place(moves, merged, listed, out)
    return merged


def _place(moves: list[tuple[Path, Path]], merged: Manifest, listed: list[DroppedRow], out: Path) -> None:
    if (out / MANIFEST_NAME).exists():
        if read_manifest(out) != merged:
            raise MergeError(f"{out}: holds another data set; remove it or choose another --out")
        return
    foreign = {path.name for path in out.glob("*.arrow")} - {target.name for _, target in moves}
    if foreign:
        raise MergeError(f"{out}: holds {sorted(foreign)[0]}, which is no part of this; choose another --out")
    for source, target in moves:
        temporary = temporary_path(target)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        publish(target)
    write_list(out, listed)
    write_manifest(out, merged)


def _check_parts(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """All parts of one conversion, each once."""
    if not parts:
        raise MergeError("no parts given")
    numbers: dict[int, Path] = {}
    total = 0
    for part, manifest in zip(parts, manifests, strict=True):
        if PART not in manifest.options:
            raise MergeError(f"{part}: is no part; expected folders written with `convert --part I/N`")
        try:
            number, of = parse_part(str(manifest.options[PART]))
        except BadOption as error:
            raise MergeError(f"{part / MANIFEST_NAME}: options: {error}") from error
        total = total or of
        if of != total:
            raise MergeError(f"{part}: is part {number} of {of}, but {parts[0]} is one of {total}")
        if number in numbers:
            raise MergeError(f"{part}: is part {number}, and so is {numbers[number]}")
        numbers[number] = part
        for key in ("dataset", "task", "tool_version", "sources"):
            if getattr(manifest, key) != getattr(manifests[0], key):
                raise MergeError(f"{part}: differs from {parts[0]} in {key}; convert both from the same data")
        if _common_options(manifest) != _common_options(manifests[0]):
            raise MergeError(f"{part}: differs from {parts[0]} in its options; convert both alike")
        starts = manifest.options.get(STARTS)
        counts = {split: len(info.shards) for split, info in manifest.splits.items()}
        if not isinstance(starts, dict) or {split: len(own) for split, own in starts.items()} != counts:
            raise MergeError(f"{part / MANIFEST_NAME}: options.{STARTS}: expected a start for each shard")
    missing = sorted(set(range(1, total + 1)) - set(numbers))
    if missing:
        raise MergeError(f"parts {', '.join(map(str, missing))} of {total} are missing")


def _common_options(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.options.items() if key not in (PART, STARTS)}


def parse_part(text: str) -> tuple[int, int]:
    """Reads I/N, such as "2/8" -> (2, 8).

    Raises:
        BadOption: It is not I/N with 1 <= I <= N.
    """
    number, _, of = text.partition("/")
    if not (number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
        raise BadOption(f"--part {text!r}: expected I/N, such as 2/8")
    if not 1 <= int(number) <= int(of):
        raise BadOption(f"--part {text!r}: expected 1 <= I <= N")
    return int(number), int(of)
