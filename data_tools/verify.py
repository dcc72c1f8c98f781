"""Checks a finished data set folder against its manifest and the shard contract."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_tools.files import hash_file
from data_tools.images import ImageRefused, check_image
from data_tools.pool import map_in_order
from data_tools.shard_file import open_shard
from data_tools.shard_format import (
    IMAGE_COLUMNS,
    MANIFEST_NAME,
    ROWS_PER_BATCH,
    TEXT_COLUMNS,
    ShardFormatError,
    ShardInfo,
    read_manifest,
)


def verify(folder: Path, full: bool = False, workers: int = 1) -> Iterator[tuple[str, list[str]]]:
    """Yields (shard, faults) for each shard the manifest names, and for files it does not name.

    Fast: structure, sizes and counts. Full: also hashes, repeated texts, and every picture decoded.

    Raises:
        ShardFormatError: There is no manifest, or it is broken.
    """
    manifest = read_manifest(folder)
    shards = [shard for name in sorted(manifest.splits) for shard in manifest.splits[name].shards]
    named = {shard.file for shard in shards}
    for path in sorted(folder.glob("*.arrow")):
        if path.name not in named:
            yield path.name, [f"{path}: not named in {MANIFEST_NAME}; remove it"]
    tasks = [(folder, manifest.task, shard, full) for shard in shards]
    for shard, faults in zip(shards, map_in_order(_check_shard, tasks, workers), strict=True):
        yield shard.file, faults


def _check_shard(task: tuple[Path, str, ShardInfo, bool]) -> list[str]:
    folder, name, shard, full = task
    path = folder / shard.file
    if not path.is_file():
        return [f"{path}: missing; {MANIFEST_NAME} names it"]
    size = path.stat().st_size
    if size != shard.bytes:
        return [f"{path}: {size} bytes, expected {shard.bytes}; copy it or convert the data again"]
    if full and (found := hash_file(path)) != shard.sha256:
        return [f"{path}: SHA-256 is {found}, expected {shard.sha256}; copy it or convert the data again"]
    try:
        return [f"{path}: {fault}" for fault in _contents(path, name, shard, full)]
    except ShardFormatError as error:
        return [str(error)]
    except (pa.ArrowException, OSError) as error:
        return [f"{path}: {error}"]


def _contents(path: Path, task: str, shard: ShardInfo, full: bool) -> Iterator[str]:
    """Faults of the batches, at most the first few of a batch."""
    reader = open_shard(path, task)
    rows = texts = 0
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        batch.validate(full=True)
        where = f"record batch {number}"
        if batch.num_rows != ROWS_PER_BATCH and number != reader.num_record_batches - 1:
            yield f"{where}: {batch.num_rows} rows, expected {ROWS_PER_BATCH}"
        if any(column.null_count for column in batch.columns):
            yield f"{where}: holds nulls"
            return
        if batch.column(TEXT_COLUMNS[task]).values.null_count:
            yield f"{where}: holds null texts"
            return
        lengths = batch.column(TEXT_COLUMNS[task]).value_lengths()
        if batch.num_rows and pc.min(lengths).as_py() < 1:
            yield f"{where}: holds rows without texts"
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_list(column.type) and not column.value_lengths().equals(lengths):
                yield f"{where}: {name}: expected an entry for each of {TEXT_COLUMNS[task]}"
        texts += pc.sum(lengths).as_py() or 0
        if full:
            for row in range(batch.num_rows):
                yield from (f"row {rows + row}: {fault}" for fault in _row_faults(batch, row, task))
        rows += batch.num_rows
    if (rows, texts) != (shard.rows, shard.texts):
        yield f"{rows} rows and {texts} texts, expected {shard.rows} and {shard.texts}"


def _row_faults(batch: Any, row: int, task: str) -> Iterator[str]:
    texts = batch.column(TEXT_COLUMNS[task])[row].as_py()
    if task == "caption" and len(set(texts)) != len(texts):
        yield "a caption stands there twice"
    for image, width, height in IMAGE_COLUMNS[task]:
        stated = (batch.column(width)[row].as_py(), batch.column(height)[row].as_py())
        try:
            picture = check_image(batch.column(image)[row].as_py())
        except ImageRefused as refused:
            yield f"{image}: {refused}"
            continue
        if picture.change:
            yield f"{image}: does not show itself to a plain RGB decoder: {picture.change}"
        elif (picture.width, picture.height) != stated:
            yield f"{image}: is {picture.width} x {picture.height}, but the row states {stated[0]} x {stated[1]}"
