"""The world in the raw layouts of caption data sets."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_tools.synthetic.captions import write_captions, write_regions
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.layout import HELD_OUT, Layout, Record, text_files, write_json_list, write_list
from data_tools.synthetic.world import Scene

CAPTIONS_PER_IMAGE = 5


# COCO captions with the Karpathy splits: about 80 % train, 10 % restval, 5 % val, 5 % test.


def _coco_split(index: int) -> str:
    place = index % HELD_OUT
    return {HELD_OUT - 1: "test", HELD_OUT - 2: "val"}.get(
        place, "restval" if place >= HELD_OUT - 4 else "train"
    )


def coco_picture(index: int) -> str:
    """Where COCO's picture lies."""
    folder = "train2014" if _coco_split(index) == "train" else "val2014"
    return f"{folder}/COCO_{folder}_{index + 1:012d}.jpg"


def coco_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    """An entry of the Karpathy JSON."""
    captions = write_captions(scenes[0], draw, CAPTIONS_PER_IMAGE)
    folder, name = coco_picture(index).split("/")
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


def _official_write(folder: Path, records: Iterable[Record]) -> None:
    """COCO's own files: the pictures, then the captions, of one set each."""
    (folder / "annotations").mkdir(exist_ok=True)
    kept = {"train2014": list[Record](), "val2014": list[Record]()}
    for record in records:
        kept[record["filepath"]].append(record)
    with text_files(folder, *[f"annotations/captions_{name}.json" for name in kept]) as files:
        for file, own in zip(files, kept.values(), strict=True):
            images = [{"id": record["cocoid"], "file_name": record["filename"]} for record in own]
            annotations = [
                {"id": one["sentid"], "image_id": record["cocoid"], "caption": one["raw"]}
                for record in own
                for one in record["sentences"]
            ]
            json.dump({"images": images, "annotations": annotations}, file)


def _coco_write(folder: Path, records: Iterable[Record]) -> None:
    write_json_list(folder, "dataset_coco.json", records, '{"images": [', '], "dataset": "coco"}')


# Visual Genome regions.


def vg_picture(index: int) -> str:
    """Where Visual Genome's picture lies: half of them in either folder."""
    return f"{('VG_100K', 'VG_100K_2')[index % 2]}/{index + 1}.jpg"


def _vg_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    image_id = index + 1
    url = f"https://cs.stanford.edu/people/rak248/{vg_picture(index)}"
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
        for number, (phrase, (x, y, width, height)) in enumerate(write_regions(scenes[0], draw, image_size))
    ]
    return {**data, "coco_id": None, "flickr_id": None}, {"regions": regions, "id": image_id}


def _vg_write(folder: Path, records: Iterable[Record]) -> None:
    with text_files(folder, "image_data.json", "region_descriptions.json") as files:
        for file in files:
            file.write("[")
        for number, record in enumerate(records):
            for file, part in zip(files, record, strict=True):
                write_list(file, number == 0, part)
        for file in files:
            file.write("\n]\n")


# CC3M: tab-separated caption and URL; pictures are named by the row number (from 0) in their file.


def _cc3m_place(index: int) -> tuple[str, int]:
    """(split, row): of 20 pictures the last goes to val."""
    block, place = divmod(index, HELD_OUT)
    return ("val", block) if place == HELD_OUT - 1 else ("train", index - block)


def _cc3m_picture(index: int) -> str:
    split, row = _cc3m_place(index)
    return f"{split}_image/{row}.jpg"


def _cc3m_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    (caption,) = write_captions(scenes[0], draw, 1)
    return [_cc3m_place(index)[0], caption, f"http://example.com/pictures/{index}.jpg"]


def _cc3m_write(folder: Path, records: Iterable[Record]) -> None:
    names = ("Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv")
    with text_files(folder, *names) as (train, val):
        for split, caption, url in records:
            (train if split == "train" else val).write(f"{caption}\t{url}\n")


# SBU: one JSON object of parallel lists; pictures are named by the last part of their URL.


def _sbu_name(index: int) -> str:
    return f"{index:010d}_{Draw('sbu name', index).below(1 << 32):08x}.jpg"


def _sbu_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    (caption,) = write_captions(scenes[0], draw, 1)
    url = f"http://static.flickr.com/{1000 + index % 9000}/{_sbu_name(index)}"
    return {"image_urls": url, "user_ids": f"{index:08d}@N00", "captions": caption}


def _sbu_write(folder: Path, records: Iterable[Record]) -> None:
    columns: dict[str, list[str]] = {"image_urls": [], "user_ids": [], "captions": []}
    for record in records:
        for name, column in columns.items():
            column.append(record[name])
    with text_files(folder, "sbu-captions-all.json") as (file,):
        json.dump(columns, file)


# CC12M: URL TAB caption; pictures named by the row number.


def _cc12m_write(folder: Path, records: Iterable[Record]) -> None:
    with text_files(folder, "cc12m.tsv") as (file,):
        for _, caption, url in records:
            file.write(f"{url}\t{caption}\n")


# Flickr30k and Flickr8k: the Karpathy JSON, the token file and the split lists.


def flickr_id(index: int) -> str:
    """The name of a photo without its suffix: digits, as Flickr30k's."""
    return str(1000000000 + index)


def flickr_split(index: int) -> str:
    """Of 20 photos one goes to val, one to test."""
    return {HELD_OUT - 1: "test", HELD_OUT - 2: "val"}.get(index % HELD_OUT, "train")


def _flickr_describe(index: int, scenes: Sequence[Scene], draw: Draw, image_size: int) -> Record:
    captions = write_captions(scenes[0], draw, CAPTIONS_PER_IMAGE)
    first = index * CAPTIONS_PER_IMAGE
    return {
        "sentids": [first + i for i in range(len(captions))],
        "imgid": index,
        "sentences": [
            {"tokens": caption.split(), "raw": caption, "imgid": index, "sentid": first + i}
            for i, caption in enumerate(captions)
        ],
        "split": flickr_split(index),
        "filename": f"{flickr_id(index)}.jpg",
    }


def _flickr30k_write(folder: Path, records: Iterable[Record]) -> None:
    lists = {split: f"{split}.txt" for split in ("train", "val", "test")}
    _flickr_write(folder, records, "flickr30k", "results_20130124.token", lists, "")


def _flickr8k_write(folder: Path, records: Iterable[Record]) -> None:
    (folder / "Flickr8k_text").mkdir(exist_ok=True)
    names = {"train": "train", "val": "dev", "test": "test"}
    lists = {split: f"Flickr8k_text/Flickr_8k.{name}Images.txt" for split, name in names.items()}
    _flickr_write(folder, records, "flickr8k", "Flickr8k_text/Flickr8k.token.txt", lists, ".jpg")


def _flickr_write(
    folder: Path, records: Iterable[Record], name: str, token: str, lists: dict[str, str], suffix: str
) -> None:
    with text_files(folder, f"dataset_{name}.json", token, *lists.values()) as (karpathy, tokens, *rest):
        files = dict(zip(lists, rest, strict=True))
        karpathy.write('{"images": [')
        for number, record in enumerate(records):
            write_list(karpathy, number == 0, record)
            photo = record["filename"]
            for place, sentence in enumerate(record["sentences"]):
                tokens.write(f"{photo}#{place}\t{sentence['raw']}\n")
            files[record["split"]].write(f"{photo.removesuffix('.jpg')}{suffix}\n")
        karpathy.write(f'\n], "dataset": "{name}"}}\n')


CAPTION_LAYOUTS: dict[str, Layout] = {
    "coco": Layout(lambda index: (coco_picture(index),), coco_describe, _coco_write),
    "coco-official": Layout(lambda index: (coco_picture(index),), coco_describe, _official_write),
    "vg": Layout(lambda index: (vg_picture(index),), _vg_describe, _vg_write),
    "cc3m": Layout(lambda index: (_cc3m_picture(index),), _cc3m_describe, _cc3m_write),
    "cc12m": Layout(lambda index: (f"cc12m_image/{index}.jpg",), _cc3m_describe, _cc12m_write),
    "sbu": Layout(lambda index: (f"SBU/{_sbu_name(index)}",), _sbu_describe, _sbu_write),
    "flickr30k": Layout(
        lambda index: (f"flickr30k-images/{flickr_id(index)}.jpg",), _flickr_describe, _flickr30k_write
    ),
    "flickr8k": Layout(
        lambda index: (f"Flicker8k_Dataset/{flickr_id(index)}.jpg",), _flickr_describe, _flickr8k_write
    ),
}
