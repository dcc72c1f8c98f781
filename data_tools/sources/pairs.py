"""A plain folder: `x.jpg` beside `x.txt` (a caption a line), at any depth. What img2dataset's `files` writes.

Folders and files are taken in the order of their names. A picture without a text file counts as `no_text`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.base import AnnotationError, Request, Row, Source, clean_texts
from data_tools.sources.tables import lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def find(raw: Path) -> list[Path]:
    """No annotation files: the folder speaks for itself."""
    if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in raw.rglob("*")):
        raise AnnotationError(f"{raw}: no pictures; expected some ending in {', '.join(IMAGE_SUFFIXES)}")
    return []


def rows(request: Request) -> Iterator[Row]:
    """One row a picture, all in split `train`."""
    for folder, names in _walk(request.images):
        there = set(names)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            path = folder / name
            texts = (
                [line for _, line in lines(folder / f"{stem}.txt") if line.strip()]
                if f"{stem}.txt" in there
                else []
            )
            captions, dropped = clean_texts(texts)
            image_id = path.relative_to(request.images).as_posix()
            yield Row("train", image_id, ((path,),), {"captions": captions}, str(path), dropped)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, file names) below a folder in the order of names; symbolic links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise AnnotationError(f"{folder}: cannot be listed ({error.strerror})") from error
    yield folder, [entry.name for entry in found if entry.is_file()]
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name)


SOURCE = Source("caption", find, rows)
