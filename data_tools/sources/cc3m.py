"""Conceptual Captions 3M: `Train_GCC-training.tsv` and `Validation_GCC-1.1.0-Validation.tsv`.

Each line is caption TAB URL, without a header. Pictures are those that could be downloaded, named by the
number of their line (from 0) as the published converters expect: `train_image/<number>.jpg` and
`val_image/<number>.jpg` (any usual suffix). Lines whose picture is not there count as `missing_file`.
"""

from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.base import AnnotationError, Request, Row, Source, clean_texts
from data_tools.sources.tables import lines

_FILES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", "")


def find(raw: Path) -> list[Path]:
    """The tables that are there, training first."""
    found = [raw / folder / name for name in _FILES.values() for folder in (".", "utils")]
    found = [path for path in found if path.is_file()]
    if not found:
        raise AnnotationError(f"{raw}: expected {' or '.join(_FILES.values())} in this folder or in utils/")
    return found


def rows(request: Request) -> Iterator[Row]:
    """One row a line."""
    for path in request.annotations:
        split = "val" if path.name.lower().startswith("val") else "train"
        for number, (where, line) in enumerate(lines(path)):
            fields = line.split("\t")
            if len(fields) < 2:
                raise AnnotationError(f"{where}: found {len(fields)} field, expected caption TAB url")
            captions, dropped = clean_texts(fields[:1])
            images = tuple(request.images / f"{split}_image" / f"{number}{suffix}" for suffix in SUFFIXES)
            yield Row(split, str(number), (images,), {"captions": captions}, where, dropped)


SOURCE = Source(
    task="caption",
    find=find,
    rows=rows,
    published={_FILES["train"]: {"train": (3_318_333, 3_318_333)}, _FILES["val"]: {"val": (15_840, 15_840)}},
)
