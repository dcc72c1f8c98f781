"""SBU captions: `sbu-captions-all.json`, an object of parallel lists `image_urls` and `captions`.

Pictures are those that could be downloaded, named by the last part of their URL, in `SBU/` (also in `images/`
or beside the JSON). Entries whose picture is not there count as `missing_file`.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from data_tools.sources.base import (
    AnnotationError,
    Request,
    Row,
    Source,
    clean_texts,
    first_existing,
    is_inside,
)
from data_tools.sources.json_stream import entries

FOLDERS = ("SBU", "images", ".")


def find(raw: Path) -> list[Path]:
    """The JSON of the official archive."""
    return [
        first_existing(raw, ("sbu-captions-all.json", "annotations/sbu-captions-all.json"), "SBU captions")
    ]


def rows(request: Request) -> Iterator[Row]:
    """One row an entry, all in split `train`."""
    for path in request.annotations:
        pairs = zip_longest(entries(path, "image_urls"), entries(path, "captions"))
        for url_entry, caption_entry in pairs:
            if url_entry is None or caption_entry is None:
                where = (url_entry or caption_entry)[0]
                raise AnnotationError(
                    f"{where}: 'image_urls' and 'captions' differ in length; expected equal lists"
                )
            (where, url), (caption_where, caption) = url_entry, caption_entry
            for place, value in ((where, url), (caption_where, caption)):
                if not isinstance(value, str):
                    raise AnnotationError(f"{place}: found {value!r:.80}, expected a text")
            name = url.rsplit("/", 1)[-1]
            captions, dropped = clean_texts([caption])
            images = tuple(request.images / folder / name for folder in FOLDERS) if is_inside(name) else ()
            yield Row("train", name, (images,), {"captions": captions}, where, dropped)


SOURCE = Source(
    task="caption",
    find=find,
    rows=rows,
    published={"sbu-captions-all.json": {"train": (1_000_000, 1_000_000)}},
)
