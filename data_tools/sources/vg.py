"""Visual Genome region descriptions: one row an image, its phrases as captions.

Raw folder: `region_descriptions.json` (also in `annotations/`) and the picture folders `VG_100K/` and
`VG_100K_2/` (also in `images/`). A picture's name is its id, and the folder that holds it is looked for, so
`image_data.json` is not needed.
"""

from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.base import Request, Row, Source, clean_texts, first_existing, member, unique
from data_tools.sources.json_stream import entries

FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images")


def find(raw: Path) -> list[Path]:
    """The region descriptions."""
    names = ("region_descriptions.json", "annotations/region_descriptions.json")
    return [first_existing(raw, names, "region descriptions")]


def rows(request: Request) -> Iterator[Row]:
    """One row an image, all in split `train`; repeated phrases of an image once."""
    seen: set[int] = set()
    for path in request.annotations:
        for where, entry in entries(path):
            image_id = member(entry, "id", int, where)
            unique(image_id, seen, "image id", where)
            regions = member(entry, "regions", list, where)
            texts = [member(one, "phrase", str, f"{where}.regions[{i}]") for i, one in enumerate(regions)]
            captions, dropped = clean_texts(texts)
            images = tuple(request.images / folder / f"{image_id}.jpg" for folder in FOLDERS)
            yield Row("train", str(image_id), (images,), {"captions": captions}, where, dropped)


SOURCE = Source(
    task="caption",
    find=find,
    rows=rows,
    published={"region_descriptions.json": {"train": (108_077, 5_408_689)}},
)
