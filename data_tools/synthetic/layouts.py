"""The raw layouts the world is written in: file names and annotation files as the data sets publish them.

Each layout says where picture `index` goes and what is written about it, from (scene, draws) alone, and how
the records of all pictures in order become annotation files. So a smaller world is a prefix of a larger one.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from data_tools.files import publish, temporary_path
from data_tools.synthetic.captions import write_captions, write_regions
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.world import Scene

CAPTIONS_PER_IMAGE = 5
_HELD_OUT = 20  # of 20 pictures in order the last few are held out

Record = Any  # what `describe` returns: JSON-able


@dataclasses.dataclass(frozen=True)
class Layout:
    """One raw layout.

    Attributes:
        picture: index -> path of the JPEG below the layout's folder.
        describe: (index, scene, draws, image size) -> record.
        write: (folder, records in order) writes the annotation files.
    """

    picture: Callable[[int], str]
    describe: Callable[[int, Scene, Draw, int], Record]
    write: Callable[[Path, Iterable[Record]], None]


@contextmanager
def _text_files(folder: Path, *names: str) -> Iterator[Sequence[TextIO]]:
    """Text files that appear when all are complete."""
    paths = [folder / name for name in names]
    files = [temporary_path(path).open("w", encoding="utf-8", newline="\n") for path in paths]
    try:
        yield files
    finally:
        for file in files:
            file.close()
    for path in paths:
        publish(path)


def _write_list(file: TextIO, first: bool, record: Any) -> None:
    """Adds one entry to a JSON list that is written as it comes, one entry a line."""
    file.write(("\n" if first else ",\n") + json.dumps(record))


# COCO captions with the Karpathy splits: about 80 % train, 10 % restval, 5 % val, 5 % test.


def _coco_split(index: int) -> str:
    place = index % _HELD_OUT
    return {_HELD_OUT - 1: "test", _HELD_OUT - 2: "val"}.get(
        place, "restval" if place >= _HELD_OUT - 4 else "train"
    )


def _coco_picture(index: int) -> str:
    folder = "train2014" if _coco_split(index) == "train" else "val2014"
    return f"{folder}/COCO_{folder}_{index + 1:012d}.jpg"


def _coco_describe(index: int, scene: Scene, draw: Draw, image_size: int) -> Record:
    captions = write_captions(scene, draw, CAPTIONS_PER_IMAGE)
    folder, name = _coco_picture(index).split("/")
    sentence_ids = [index * CAPTIONS_PER_IMAGE + i for i in range(len(captions))]
    return {
        "filepath": folder,
        "sentids": sentence_ids,
        "filename": name,
        "imgid": index,
        "split": _coco_split(index),
        "sentences": [
            {"tokens": caption.split(), "raw": caption, "imgid": index, "sentid": sentence_id}
            for caption, sentence_id in zip(captions, sentence_ids, strict=True)
        ],
        "cocoid": index + 1,
    }


def _coco_write(folder: Path, records: Iterable[Record]) -> None:
    with _text_files(folder, "dataset_coco.json") as (file,):
        file.write('{"images": [')
        for number, record in enumerate(records):
            _write_list(file, number == 0, record)
        file.write('\n], "dataset": "coco"}\n')


# Visual Genome regions.


def _vg_picture(index: int) -> str:
    return f"{('VG_100K', 'VG_100K_2')[index % 2]}/{index + 1}.jpg"


def _vg_describe(index: int, scene: Scene, draw: Draw, image_size: int) -> Record:
    image_id = index + 1
    url = f"https://cs.stanford.edu/people/rak248/{_vg_picture(index)}"
    data = {"width": image_size, "url": url, "height": image_size, "image_id": image_id}
    regions = [
        {
            "region_id": image_id * 100 + number,
            "width": width,
            "height": height,
            "image_id": image_id,
            "phrase": phrase,
            "y": y,
            "x": x,
        }
        for number, (phrase, (x, y, width, height)) in enumerate(write_regions(scene, draw, image_size))
    ]
    return {**data, "coco_id": None, "flickr_id": None}, {"regions": regions, "id": image_id}


def _vg_write(folder: Path, records: Iterable[Record]) -> None:
    with _text_files(folder, "image_data.json", "region_descriptions.json") as files:
        for file in files:
            file.write("[")
        for number, record in enumerate(records):
            for file, part in zip(files, record, strict=True):
                _write_list(file, number == 0, part)
        for file in files:
            file.write("\n]\n")


# CC3M: tab-separated caption and URL; pictures are named by the row number (from 0) in their file.


def _cc3m_place(index: int) -> tuple[str, int]:
    """(split, row): of 20 pictures the last goes to val."""
    block, place = divmod(index, _HELD_OUT)
    return ("val", block) if place == _HELD_OUT - 1 else ("train", index - block)


def _cc3m_picture(index: int) -> str:
    split, row = _cc3m_place(index)
    return f"{split}_image/{row}.jpg"


def _cc3m_describe(index: int, scene: Scene, draw: Draw, image_size: int) -> Record:
    (caption,) = write_captions(scene, draw, 1)
    return [_cc3m_place(index)[0], caption, f"http://example.com/pictures/{index}.jpg"]


def _cc3m_write(folder: Path, records: Iterable[Record]) -> None:
    names = ("Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv")
    with _text_files(folder, *names) as (train, val):
        for split, caption, url in records:
            (train if split == "train" else val).write(f"{caption}\t{url}\n")


# SBU: one JSON object of parallel lists; pictures are named by the last part of their URL.


def _sbu_name(index: int) -> str:
    return f"{index:010d}_{Draw('sbu name', index).below(1 << 32):08x}.jpg"


def _sbu_describe(index: int, scene: Scene, draw: Draw, image_size: int) -> Record:
    (caption,) = write_captions(scene, draw, 1)
    url = f"http://static.flickr.com/{1000 + index % 9000}/{_sbu_name(index)}"
    return {"image_urls": url, "user_ids": f"{index:08d}@N00", "captions": caption}


def _sbu_write(folder: Path, records: Iterable[Record]) -> None:
    columns: dict[str, list[str]] = {"image_urls": [], "user_ids": [], "captions": []}
    for record in records:
        for name, column in columns.items():
            column.append(record[name])
    with _text_files(folder, "sbu-captions-all.json") as (file,):
        json.dump(columns, file)


LAYOUTS: dict[str, Layout] = {
    "coco": Layout(_coco_picture, _coco_describe, _coco_write),
    "vg": Layout(_vg_picture, _vg_describe, _vg_write),
    "cc3m": Layout(_cc3m_picture, _cc3m_describe, _cc3m_write),
    "sbu": Layout(lambda index: f"SBU/{_sbu_name(index)}", _sbu_describe, _sbu_write),
}
