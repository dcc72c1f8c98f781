"""Any table of pictures and captions: TSV, CSV, JSON lines or Parquet, with a column of paths or of bytes.

A row's path leads below the picture folder. TSV and CSV need a header line that names the columns. A caption is
a text or a list of texts. Rows with the same path one after another become one row with all their captions.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.sources.base import AnnotationError, Request, Row, Source, clean_texts, is_inside
from data_tools.sources.tables import MAX_LINE_BYTES, lines

PATH_COLUMNS = ("path", "image", "image_path", "filepath", "file_name", "filename", "jpg")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title", "txt")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")
_BATCH = 64  # rows of a Parquet file in memory: they may hold pictures

Record = Mapping[str, Any]


def find(raw: Path) -> list[Path]:
    """All tables directly in the folder."""
    found = sorted(path for path in raw.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise AnnotationError(f"{raw}: no table; expected a file ending in {', '.join(SUFFIXES)}")
    return found


def rows(request: Request) -> Iterator[Row]:
    """One row for each picture of each table, all in split `train`."""
    for path in request.annotations:
        records = _records(path)
        pairs = (_pair(request, where, record) for where, record in records)
        for number, (image, group) in enumerate(groupby(pairs, key=lambda pair: pair[1])):
            members = list(group)
            captions, dropped = clean_texts(text for _, _, texts in members for text in texts)
            where = members[0][0]
            if isinstance(image, bytes):
                yield Row("train", f"{path.name}/{number}", (image,), {"captions": captions}, where, dropped)
                continue
            refused = "unsafe_path" if image and not is_inside(image) else ""
            files = (request.images / image,) if image and not refused else ()
            yield Row("train", image, (files,), {"captions": captions}, where, dropped, refused)


def _pair(request: Request, where: str, record: Record) -> tuple[str, str | bytes, list[str]]:
    """(position, path or bytes of the picture, captions) of one record."""
    image = record[_column(record, request.path_column, PATH_COLUMNS, "--path-column", where)]
    column = _column(record, request.caption_column, CAPTION_COLUMNS, "--caption-column", where)
    texts = record[column]
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if isinstance(image, dict) and isinstance(
        image.get("bytes"), bytes
    ):  # the form of Hugging Face data sets
        image = image["bytes"]
    if image is None:  # a download that failed
        image = ""
    if not isinstance(image, (str, bytes)):
        raise AnnotationError(f"{where}: picture: found {image!r:.80}, expected a path or the file's bytes")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise AnnotationError(f"{where}: field {column!r}: found {texts!r:.80}, expected a text or texts")
    return where, image, texts


def _column(record: Record, wanted: str | None, usual: tuple[str, ...], option: str, where: str) -> str:
    for name in [wanted] if wanted is not None else usual:
        if name in record:
            return name
    expected = repr(wanted) if wanted is not None else f"one of {', '.join(usual)}, or {option}"
    raise AnnotationError(f"{where}: columns {sorted(map(str, record))}; expected {expected}")


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    if path.suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return _separated(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    for where, line in lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise AnnotationError(f"{where}: found {record!r:.80}, expected an object")
        yield where, record


def _separated(path: Path) -> Iterator[tuple[str, Record]]:
    """TSV fields stand as they are; CSV fields may be quoted and then span lines."""
    csv.field_size_limit(MAX_LINE_BYTES)
    place = [f"{path}: line 1"]

    def texts() -> Iterator[str]:
        for where, line in lines(path):
            place[0] = where
            yield line + "\n"

    if path.suffix == ".tsv":
        reader = csv.reader(texts(), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise AnnotationError(
                        f"{place[0]}: {len(fields)} fields, expected {len(header)}: {header}"
                    )
                yield place[0], dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise AnnotationError(f"{place[0]}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        number = 0
        with pq.ParquetFile(io.FileIO(path)) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    yield f"{path}: row {number}", record
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise AnnotationError(f"{path}: not a readable Parquet file: {error}") from error


SOURCE = Source("caption", find, rows)
