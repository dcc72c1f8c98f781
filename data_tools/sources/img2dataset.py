"""What img2dataset leaves, in any of its output formats: tars, Parquet files with the pictures, or plain files.

Its Parquet files of metadata (beside tars and plain files, without a column of bytes) are not read.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.sources import pairs, table, webdataset
from data_tools.sources.base import AnnotationError, Request, Row, Source

BYTES_COLUMN = "jpg"


def find(raw: Path) -> list[Path]:
    """The tars, else the Parquet files with pictures, else nothing: plain files speak for themselves."""
    tars = sorted(raw.rglob("*.tar"))
    found = tars or [path for path in sorted(raw.rglob("*.parquet")) if _holds_pictures(path)]
    return found or pairs.find(raw)


def _holds_pictures(path: Path) -> bool:
    try:
        return BYTES_COLUMN in pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise AnnotationError(f"{path}: not a readable Parquet file: {error}") from error


def rows(request: Request) -> Iterator[Row]:
    """One row a picture, all in split `train`."""
    if not request.annotations:
        yield from pairs.rows(request)
    for path in request.annotations:
        one = replace(request, annotations=[path])
        if path.suffix == ".parquet":
            yield from table.rows(replace(one, path_column=BYTES_COLUMN))
        else:
            yield from webdataset.rows(one)


SOURCE = Source("caption", find, rows)
