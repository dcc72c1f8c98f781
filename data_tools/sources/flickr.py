"""Flickr30k and Flickr8k captions: the Karpathy JSON, or the token file with the official split lists.

Flickr30k: `dataset_flickr30k.json`, or `results_20130124.token` with `train.txt`, `val.txt`, `test.txt` (ids, also
in `flickr30k_entities/`; photos in none of those that are there belong to train); pictures in `flickr30k-images/`.
Flickr8k: `dataset_flickr8k.json`, or `Flickr8k.token.txt` with `Flickr_8k.trainImages.txt`, `...devImages.txt`,
`...testImages.txt` (also in `Flickr8k_text/`; photos in no list count as `no_split`); pictures in
`Flicker8k_Dataset/`, as the official folder is spelled, or `Flickr8k_Dataset/`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.sources.base import (
    AnnotationError,
    Request,
    Row,
    Source,
    clean_texts,
    first_existing,
    inside,
    unique,
)
from data_tools.sources.coco import karpathy_rows
from data_tools.sources.tables import lines

_TOKEN_LINE = re.compile(r"([^\t#]+)#(\d+)\t(.*)")


@dataclass(frozen=True)
class _Set:
    """What differs between the two.

    Attributes:
        name: Name of the data set.
        files: Annotation files that may hold it, the preferred first.
        lists: Split -> places of its list of photos, beside the token file or one folder up.
        rest: Split of photos that no list names; empty: they are left out.
        folders: Folders that may hold the pictures.
    """

    name: str
    files: tuple[str, ...]
    lists: dict[str, tuple[str, ...]]
    rest: str
    folders: tuple[str, ...]

    def find(self, raw: Path) -> list[Path]:
        return [first_existing(raw, self.files, f"{self.name} captions")]

    def rows(self, request: Request) -> Iterator[Row]:
        for path in request.annotations:
            if path.suffix == ".json":
                yield from karpathy_rows(
                    request.images, path, [f"{folder}/{{filename}}" for folder in self.folders]
                )
            else:
                yield from self._token_rows(request.images, path)

    def _token_rows(self, images: Path, path: Path) -> Iterator[Row]:
        split_of: dict[str, str] = {}
        for split, places in self.lists.items():
            found = [folder / name for folder in (path.parent, path.parent.parent) for name in places]
            for file in [file for file in found if file.is_file()][:1]:
                split_of |= {line.strip().removesuffix(".jpg"): split for _, line in lines(file)}
        for split in (*self.lists, "") if split_of else ("train",):
            for where, name, texts in _photos(path):
                own = split_of.get(name.removesuffix(".jpg"), self.rest) if split_of else "train"
                if own != split:
                    continue
                captions, dropped = clean_texts(texts)
                files = tuple(images / folder / name for folder in self.folders)
                refused = "" if split else "no_split"
                yield Row(split or "train", name, (files,), {"captions": captions}, where, dropped, refused)


def _photos(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(position, photo, captions) of a token file, whose lines are `<photo>#<number>TAB<caption>`."""
    photo, start = "", ""
    texts: list[str] = []
    seen: set[str] = set()
    for where, line in lines(path):
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise AnnotationError(f"{where}: found {line!r:.80}, expected photo.jpg#number TAB caption")
        if match[1] != photo:
            if photo:
                yield start, photo, texts
            photo, start, texts = inside(match[1], where), where, []
            unique(photo, seen, "photo", where)
        texts.append(match[3])
    if photo:
        yield start, photo, texts


_FLICKR30K = _Set(
    name="Flickr30k",
    files=(
        "dataset_flickr30k.json",
        "karpathy/dataset_flickr30k.json",
        "results_20130124.token",
        "results.token",
    ),
    lists={split: (f"{split}.txt", f"flickr30k_entities/{split}.txt") for split in ("train", "val", "test")},
    rest="train",
    folders=("flickr30k-images", "flickr30k_images", "images"),
)
_FLICKR8K = _Set(
    name="Flickr8k",
    files=(
        "dataset_flickr8k.json",
        "karpathy/dataset_flickr8k.json",
        "Flickr8k_text/Flickr8k.token.txt",
        "Flickr8k.token.txt",
    ),
    lists={
        split: (f"Flickr_8k.{name}Images.txt",)
        for split, name in (("train", "train"), ("val", "dev"), ("test", "test"))
    },
    rest="",
    folders=("Flicker8k_Dataset", "Flickr8k_Dataset", "images"),
)

FLICKR30K = Source(
    task="caption",
    find=_FLICKR30K.find,
    rows=_FLICKR30K.rows,
    published={
        "dataset_flickr30k.json": {
            "train": (29_000, 145_000),
            "val": (1_014, 5_070),
            "test": (1_000, 5_000),
        },
        "results_20130124.token": {
            "train": (29_783, 148_915),
            "val": (1_000, 5_000),
            "test": (1_000, 5_000),
        },
    },
)
FLICKR8K = Source(
    task="caption",
    find=_FLICKR8K.find,
    rows=_FLICKR8K.rows,
    published={
        file: {"train": (6_000, 30_000), "val": (1_000, 5_000), "test": (1_000, 5_000)}
        for file in ("dataset_flickr8k.json", "Flickr8k.token.txt")
    },
)
