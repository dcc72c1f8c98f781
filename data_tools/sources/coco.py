"""COCO captions: the Karpathy JSON (one entry an image) or the official `captions_*.json`.

Raw folder: `dataset_coco.json` (also in `karpathy/` or `annotations/`) or `annotations/captions_*.json`, and
the picture folders `train2014/`, `val2014/`, `train2017/`, ... (also in `images/`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.sources.base import (
    AnnotationError,
    Request,
    Row,
    Source,
    clean_texts,
    first_existing,
    inside,
    member,
    unique,
)
from data_tools.sources.json_stream import entries

_OFFICIAL = re.compile(r"captions_([a-z]+)(\d{4})\.json")
_SPLIT_ORDER = ("train", "restval", "val", "test")


def find(raw: Path) -> list[Path]:
    """The Karpathy file if there is one, else the official files of one year."""
    names = ("dataset_coco.json", "karpathy/dataset_coco.json", "annotations/dataset_coco.json")
    official = sorted(
        path for path in (raw / "annotations").glob("captions_*.json") if _OFFICIAL.fullmatch(path.name)
    )
    if official and not any((raw / name).is_file() for name in names):
        years = {path.stem[-4:] for path in official}
        if len(years) > 1:
            raise AnnotationError(
                f"{raw / 'annotations'}: captions of the years {sorted(years)}, which share their pictures; "
                "choose the files of one year with --annotations"
            )
        return official
    return [first_existing(raw, (*names, "annotations/captions_*.json"), "COCO captions")]


def rows(request: Request) -> Iterator[Row]:
    """Rows of each split; an image's captions in the order of the file."""
    for path in request.annotations:
        if _OFFICIAL.fullmatch(path.name):
            yield from _official_rows(request.images, path)
        else:
            yield from karpathy_rows(
                request.images, path, ("{filepath}/{filename}", "images/{filepath}/{filename}")
            )


def karpathy_rows(images: Path, path: Path, places: Sequence[str]) -> Iterator[Row]:
    """Rows of a Karpathy JSON, whose images stand in no order of splits: the file is read once per split.

    Args:
        images: Folder of the picture folders.
        path: The JSON.
        places: Where a picture may lie below `images`, with `{filepath}` and `{filename}` filled in.
    """
    splits: dict[str, None] = {}
    seen: set[str] = set()
    for where, entry in entries(path, "images"):
        splits[member(entry, "split", str, where)] = None
        unique(member(entry, "filename", str, where), seen, "file name", where)
    known = [split for split in _SPLIT_ORDER if split in splits]
    for split in [*known, *sorted(set(splits) - set(known))]:
        for where, entry in entries(path, "images"):
            if entry["split"] != split:
                continue
            name = entry["filename"]
            folder = member(entry, "filepath", str, where) if any("{filepath}" in p for p in places) else ""
            files = tuple(images / inside(p.format(filepath=folder, filename=name), where) for p in places)
            sentences = member(entry, "sentences", list, where)
            texts = [member(one, "raw", str, f"{where}.sentences[{i}]") for i, one in enumerate(sentences)]
            captions, dropped = clean_texts(texts)
            yield Row(split, name, (files,), {"captions": captions}, where, dropped)


def _official_rows(folder: Path, path: Path) -> Iterator[Row]:
    match = _OFFICIAL.fullmatch(path.name)
    assert match is not None
    split, year = match.groups()
    texts: dict[int, list[str]] = {}
    for where, entry in entries(path, "annotations"):
        image_id = member(entry, "image_id", int, where)
        texts.setdefault(image_id, []).append(member(entry, "caption", str, where))
    seen: set[int] = set()
    for where, entry in entries(path, "images"):
        name, image_id = member(entry, "file_name", str, where), member(entry, "id", int, where)
        unique(image_id, seen, "image id", where)
        inside(name, where)
        images = tuple(
            folder / place / name for place in (f"{split}{year}", f"images/{split}{year}", "images")
        )
        captions, dropped = clean_texts(texts.get(image_id, []))
        yield Row(split, name, (images,), {"captions": captions}, where, dropped)
    lost = sorted(set(texts) - seen)
    if lost:
        raise AnnotationError(f"{path}: annotations: image_id {lost[0]} (of {len(lost)}) is not in 'images'")


SOURCE = Source(
    task="caption",
    find=find,
    rows=rows,
    published={
        "dataset_coco.json": {
            "train": (82_783, 414_113),
            "restval": (30_504, 152_634),
            "val": (5_000, 25_010),
            "test": (5_000, 25_010),
        },
        "captions_train2014.json": {"train": (82_783, 414_113)},
        "captions_val2014.json": {"val": (40_504, 202_654)},
        "captions_train2017.json": {"train": (118_287, 591_753)},
        "captions_val2017.json": {"val": (5_000, 25_014)},
    },
)
