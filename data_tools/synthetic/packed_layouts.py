"""The world in the forms people have data in that is not a data set's own: pairs, tables, tars, .arrow files."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.files import publish, temporary_path
from data_tools.synthetic.caption_layouts import coco_describe, coco_picture
from data_tools.synthetic.captions import write_captions
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.layout import Layout, Record, text_files
from data_tools.synthetic.world import Scene

_PER_FILE = 1000  # pictures in a tar or a folder
_LOOSE = "loose"  # folder of the pictures until they are packed
_PER_BATCH = 256  # rows of an .arrow file's record batches


def _key(index: int) -> str:
    """As img2dataset names samples: five digits of the file, four of the place in it."""
    return f"{index // _PER_FILE:05d}{index % _PER_FILE:04d}"


def _path(index: int) -> str:
    return f"{index // _PER_FILE:05d}/{_key(index)}.jpg"


def _describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    return {"index": index, "captions": write_captions(scenes[0], draw, 2), "side": image_size}


# A plain folder, and a table of paths: two captions a picture.


def _pairs_write(folder: Path, records: Iterable[Record]) -> None:
    for record in records:
        text = "".join(f"{caption}\n" for caption in record["captions"])
        (folder / _path(record["index"])).with_suffix(".txt").write_text(text, "utf-8")


def _table_write(folder: Path, records: Iterable[Record]) -> None:
    with text_files(folder, "captions.csv") as (file,):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "caption"])
        for record in records:
            table.writerows([_path(record["index"]), caption] for caption in record["captions"])


# Tars of samples: webdataset's with texts; img2dataset's with a record beside, and its metadata in Parquet.


def _webdataset_write(folder: Path, records: Iterable[Record]) -> None:
    for name, group in _files_of(records):
        _write_tar(folder / f"{name}.tar", (_members(folder, record) for record in group))
    shutil.rmtree(folder / _LOOSE)


def _img2dataset_write(folder: Path, records: Iterable[Record]) -> None:
    for name, group in _files_of(records):
        known = [_metadata(record) for record in group]
        members = (
            {**_members(folder, record), "json": json.dumps(own).encode("ascii")}
            for record, own in zip(group, known, strict=True)
        )
        _write_tar(folder / f"{name}.tar", members)
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(known), temporary_path(path))
        publish(path)
    shutil.rmtree(folder / _LOOSE)


def _files_of(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    for number, group in groupby(records, key=lambda record: record["index"] // _PER_FILE):
        yield f"{number:05d}", list(group)


def _members(folder: Path, record: Record) -> dict[str, bytes]:
    """Suffix -> data, `key` the sample's name."""
    picture = (folder / _LOOSE / _path(record["index"])).read_bytes()
    caption: str = record["captions"][0]
    return {"key": _key(record["index"]).encode("ascii"), "jpg": picture, "txt": caption.encode("utf-8")}


def _metadata(record: Record) -> dict[str, Any]:
    return {
        "url": f"http://example.com/pictures/{record['index']}.jpg",
        "caption": record["captions"][0],
        "key": _key(record["index"]),
        "status": "success",
        "error_message": None,
        "width": record["side"],
        "height": record["side"],
    }


def _write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    with tarfile.open(temporary_path(path), "w") as tar:
        for sample in samples:
            key = sample.pop("key").decode("ascii")
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")  # of no owner and no time: same options, same bytes
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    publish(path)


# COCO as the published ViLT, METER, BridgeTower and ManagerTower code keeps it: a file a split, pictures inside.

_ARROW_SCHEMA = pa.schema(
    {"image": pa.binary(), "caption": pa.list_(pa.string()), "image_id": pa.string(), "split": pa.string()}
)


def _arrow_write(folder: Path, records: Iterable[Record]) -> None:
    splits: dict[str, tuple[Path, Any, list[Record]]] = {}
    for record in records:
        split = record["split"]
        if split not in splits:
            path = folder / f"coco_caption_karpathy_{split}.arrow"
            splits[split] = path, pa.ipc.new_file(str(temporary_path(path)), _ARROW_SCHEMA), []
        _, writer, rows = splits[split]
        picture = (folder / _LOOSE / record["filepath"] / record["filename"]).read_bytes()
        captions = [sentence["raw"] for sentence in record["sentences"]]
        rows.append({"image": picture, "caption": captions, "image_id": record["filename"], "split": split})
        if len(rows) == _PER_BATCH:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_ARROW_SCHEMA))
            rows.clear()
    for path, writer, rows in splits.values():
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_ARROW_SCHEMA))
        writer.close()
        publish(path)
    shutil.rmtree(folder / _LOOSE)


PACKED_LAYOUTS: dict[str, Layout] = {
    "pairs": Layout(lambda index: (_path(index),), _describe, _pairs_write),
    "table": Layout(lambda index: (_path(index),), _describe, _table_write),
    "webdataset": Layout(lambda index: (f"{_LOOSE}/{_path(index)}",), _describe, _webdataset_write),
    "img2dataset": Layout(lambda index: (f"{_LOOSE}/{_path(index)}",), _describe, _img2dataset_write),
    "reference-arrow": Layout(
        lambda index: (f"{_LOOSE}/{coco_picture(index)}",), coco_describe, _arrow_write
    ),
}
