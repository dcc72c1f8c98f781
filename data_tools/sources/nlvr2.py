"""NLVR2: statements about pairs of pictures.

Raw folder: `{train,dev,test1}.json` (JSON lines; also in `data/`, `nlvr2/data/`, and the balanced and unbalanced
sets beside them), and the pictures `images/train/<directory>/<key>-img0.png`, `images/dev/<key>-img0.png`,
`images/test1/...`. One row a pair of pictures, its statements in the order of the file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.base import (
    AnnotationError,
    Request,
    Row,
    Source,
    drop,
    inside,
    member,
    text_fault,
    unique,
)
from data_tools.sources.tables import lines

_NAMES = (
    *("train", "dev", "test1"),
    *(f"{kind}_{split}" for kind in ("balanced", "unbalanced") for split in ("dev", "test1")),
)
_FOLDERS = (".", "data", "nlvr2/data", "data/balanced", "data/unbalanced", "nlvr2/data/balanced")
_LABELS = {"true": 1, "false": 0}


def find(raw: Path) -> list[Path]:
    """All sets that are there."""
    folders = (*_FOLDERS, "nlvr2/data/unbalanced")
    places = [[raw / folder / f"{name}.json" for folder in folders] for name in _NAMES]
    found = [path for place in places for path in [path for path in place if path.is_file()][:1]]
    if not found:
        raise AnnotationError(f"{raw}: no NLVR2 statements; expected data/dev.json or the like")
    return found


def rows(request: Request) -> Iterator[Row]:
    """The rows of each set, the splits named like the files."""
    for path in request.annotations:
        found: dict[str, Row] = {}
        seen: set[str] = set()
        for where, line in lines(path):
            if not line.strip():
                continue
            record = parse_line(line, where)
            identifier = member(record, "identifier", str, where)
            unique(identifier, seen, "identifier", where)
            key, _, number = identifier.rpartition("-")
            if not key or not number:
                raise AnnotationError(
                    f"{where}: identifier {identifier!r:.80}: expected split-set-pair-number"
                )
            if key not in found:
                files = _places(request.images, key, record, where)
                found[key] = Row(path.stem, key, files, {name: [] for name in _COLUMNS}, where)
            _add(found[key], record, identifier, where)
        yield from found.values()


_COLUMNS = ("statements", "identifiers", "labels")


def _add(row: Row, record: Any, identifier: str, where: str) -> None:
    label = _LABELS.get(str(member(record, "label", (str, bool), where)).lower())
    if label is None:
        raise AnnotationError(
            f"{where}: field 'label': found {record['label']!r:.80}, expected True or False"
        )
    statement = member(record, "sentence", str, where).strip()
    reason = text_fault(statement)
    if reason:
        drop(row, reason)
        return
    for name, value in zip(_COLUMNS, (statement, identifier, label), strict=True):
        row.columns[name].append(value)


def _places(images: Path, key: str, record: Any, where: str) -> tuple[tuple[Path, ...], ...]:
    split = key.split("-")[0]
    folder = f"{split}/{member(record, 'directory', (int, str), where)}" if split == "train" else split
    names = [inside(f"images/{folder}/{key}-img{number}.png", where) for number in (0, 1)]
    return tuple((images / name,) for name in names)


def parse_line(line: str, where: str) -> Any:
    """One JSON value.

    Raises:
        AnnotationError: The line holds something else.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{where}: not JSON: {error}") from error


SOURCE = Source(
    task="nlvr2",
    find=find,
    rows=rows,
    published={
        "train.json": {"train": (46_724, 86_373)},
        "dev.json": {"dev": (3_491, 6_982)},
        "test1.json": {"test1": (3_484, 6_967)},
    },
)
