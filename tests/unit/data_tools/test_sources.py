import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.sources import SOURCES, AnnotationError, Request, Row
from data_tools.sources.base import MAX_TEXT_BYTES, clean_texts, is_inside


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def rows(name: str, raw: Path) -> list[Row]:
    source = SOURCES[name]
    return list(source.rows(Request(raw, source.find(raw))))


def karpathy(number: int, split: str, captions: list[str], **changes: Any) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
    entry = {"filepath": "val2014", "filename": f"{number}.jpg", "split": split, "sentences": sentences}
    return {**entry, **changes}


def names(row: Row, raw: Path) -> list[str]:
    (files,) = row.images
    assert isinstance(files, tuple)
    return [path.relative_to(raw).as_posix() for path in files]


def test_coco_karpathy_rows_come_split_by_split_in_file_order(tmp_path: Path) -> None:
    images = [
        karpathy(3, "test", ["c"]),
        karpathy(1, "train", [" a dog. ", "two", "a dog."]),
        karpathy(7, "restval", ["r"]),
        karpathy(2, "train", ["b", "", "x" * (MAX_TEXT_BYTES + 1)]),
    ]
    write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    found = rows("coco", tmp_path)
    assert [(row.split, row.image_id) for row in found] == [
        ("train", "1.jpg"),
        ("train", "2.jpg"),
        ("restval", "7.jpg"),
        ("test", "3.jpg"),
    ]
    assert found[0].columns == {"captions": ["a dog.", "two"]}
    assert found[0].dropped == {"duplicate_text": 1}
    assert found[1].dropped == {"empty_text": 1, "long_text": 1}
    assert names(found[0], tmp_path)[0] == "val2014/1.jpg"
    assert found[0].where.endswith("dataset_coco.json: images[1]")


def official(year: str) -> dict[str, Any]:
    return {
        "images": [{"file_name": "9.jpg", "id": 9}, {"file_name": "8.jpg", "id": 8}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "eight"},
            {"image_id": 9, "id": 2, "caption": "nine"},
            {"image_id": 8, "id": 3, "caption": "acht"},
        ],
        "info": {"year": year},
    }


def test_coco_official_rows(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"captions_{split}2017.json", official("2017"))
    found = rows("coco", tmp_path)
    assert [(row.split, row.image_id, row.columns["captions"]) for row in found] == [
        ("train", "9.jpg", ["nine"]),
        ("train", "8.jpg", ["eight", "acht"]),
        ("val", "9.jpg", ["nine"]),
        ("val", "8.jpg", ["eight", "acht"]),
    ]
    assert names(found[0], tmp_path)[0] == "train2017/9.jpg"
    write(tmp_path / "annotations" / "captions_val2014.json", official("2014"))
    with pytest.raises(AnnotationError, match=r"2014.*2017.*--annotations"):
        SOURCES["coco"].find(tmp_path)
    write(tmp_path / "dataset_coco.json", {"images": []})
    assert SOURCES["coco"].find(tmp_path) == [tmp_path / "dataset_coco.json"]


def test_vg_rows(tmp_path: Path) -> None:
    regions = [{"phrase": phrase} for phrase in (" a clock ", "the clock", "a clock", "  ")]
    write(tmp_path / "region_descriptions.json", [{"id": 12, "regions": regions}, {"id": 3, "regions": []}])
    first, second = rows("vg", tmp_path)
    assert first.columns == {"captions": ["a clock", "the clock"]}
    assert first.dropped == {"duplicate_text": 1, "empty_text": 1}
    assert (first.split, first.image_id) == ("train", "12")
    assert names(first, tmp_path)[:2] == ["VG_100K/12.jpg", "VG_100K_2/12.jpg"]
    assert second.columns == {"captions": []}


def test_cc3m_rows_are_numbered_per_file_from_0(tmp_path: Path) -> None:
    write(
        tmp_path / "Train_GCC-training.tsv", "a dog\thttp://a/1\n\thttp://a/2\r\nthree \thttp://a/3\textra\n"
    )
    write(tmp_path / "utils" / "Validation_GCC-1.1.0-Validation.tsv", "val\thttp://a/4")
    found = rows("cc3m", tmp_path)
    assert [(row.split, row.image_id, row.columns["captions"]) for row in found] == [
        ("train", "0", ["a dog"]),
        ("train", "1", []),
        ("train", "2", ["three"]),
        ("val", "0", ["val"]),
    ]
    assert names(found[2], tmp_path)[0] == "train_image/2.jpg"
    assert "train_image/2.png" in names(found[2], tmp_path)
    assert names(found[3], tmp_path)[0] == "val_image/0.jpg"


def test_sbu_rows(tmp_path: Path) -> None:
    urls = ["http://a/b/1_x.jpg", "http://a/b/2_y.jpg", "http://a/..", "http://a/"]
    captions = ["one", "two", "up", "none"]
    write(tmp_path / "sbu-captions-all.json", {"image_urls": urls, "user_ids": [], "captions": captions})
    found = rows("sbu", tmp_path)
    assert [row.image_id for row in found[:2]] == ["1_x.jpg", "2_y.jpg"]
    assert names(found[0], tmp_path)[0] == "SBU/1_x.jpg"
    assert found[2].images == found[3].images == ((),)  # counted as missing: no such file can be


COCO, OFFICIAL = "dataset_coco.json", "annotations/captions_val2017.json"
VG, SBU, CC3M = "region_descriptions.json", "sbu-captions-all.json", "Train_GCC-training.tsv"


@pytest.mark.parametrize(
    ("name", "file", "content", "parts"),
    [
        ("coco", COCO, {"images": [karpathy(1, "train", ["a"], sentences=3)]}, ["images[0]", "'sentences'"]),
        (
            "coco",
            COCO,
            {"images": [karpathy(1, "train", ["a"]), {"split": "x"}]},
            ["images[1]", "'filename'"],
        ),
        (
            "coco",
            COCO,
            {"images": [karpathy(1, "train", [], sentences=[{"raw": None}])]},
            ["sentences[0]", "'raw'", "None", "a text"],
        ),
        (
            "coco",
            COCO,
            {"images": [karpathy(1, "train", ["a"]), karpathy(1, "val", ["a"])]},
            ["images[1]", "file name '1.jpg'", "twice"],
        ),
        (
            "coco",
            COCO,
            {"images": [karpathy(1, "train", ["a"], filepath="../../etc")]},
            ["../../etc", "leave"],
        ),
        (
            "coco",
            COCO,
            {"images": [karpathy(1, "train", ["a"], filename="/x.jpg")]},
            ["images[0]", "//x.jpg"],
        ),
        ("coco", COCO, {"images": [5]}, ["images[0]", "found 5", "an object"]),
        ("coco", COCO, {"dataset": "coco"}, ["'images' is missing"]),
        ("coco", OFFICIAL, {**official(""), "images": []}, ["image_id 8", "'images'"]),
        ("coco", OFFICIAL, {**official(""), "annotations": [{"image_id": True}]}, ["annotations[0]", "True"]),
        ("vg", VG, [{"id": "1", "regions": []}], ["entry [0]", "'id'", "'1'", "an integer"]),
        ("vg", VG, [{"id": 2**63, "regions": []}], ["entry [0]", "'id'", "64 bits"]),
        ("vg", VG, [{"id": 1, "regions": []}] * 2, ["entry [1]", "image id 1", "twice"]),
        ("vg", VG, [{"id": 1, "regions": [{}]}], ["entry [0].regions[0]", "'phrase' is missing"]),
        ("vg", VG, {"id": 1}, ["line 1 column 1", "start of the list"]),
        ("vg", VG, "[{", ["line 1 column 3"]),
        ("sbu", SBU, {"image_urls": ["a"], "captions": []}, ["image_urls[0]", "differ in length"]),
        ("sbu", SBU, {"image_urls": ["http://a/b"], "captions": [1]}, ["captions[0]", "found 1"]),
        ("cc3m", CC3M, "a\tb\nonly a caption\n", ["line 2", "found 1 field"]),
    ],
)
def test_broken_annotations_are_named(
    name: str, file: str, content: Any, parts: list[str], tmp_path: Path
) -> None:
    write(tmp_path / file, content)
    with pytest.raises(AnnotationError) as caught:
        rows(name, tmp_path)
    for part in [file.rsplit("/", 1)[-1], *parts]:
        assert part in str(caught.value)


def test_bad_utf8_in_a_table(tmp_path: Path) -> None:
    (tmp_path / CC3M).write_bytes(b"a\tb\nc\xff\td\n")
    with pytest.raises(AnnotationError, match="line 2 column 2: not UTF-8"):
        rows("cc3m", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_an_empty_folder_says_what_is_expected(name: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="expected"):
        SOURCES[name].find(tmp_path)


@given(st.lists(st.text()))
def test_clean_texts(texts: list[str]) -> None:
    kept, dropped = clean_texts(texts)
    assert len(kept) + sum(dropped.values()) == len(texts)
    assert len(set(kept)) == len(kept)
    assert clean_texts(kept) == (kept, {})
    for text in kept:
        assert text == text.strip()
        assert text.encode("utf-8")
    order = [texts.index(next(t for t in texts if t.strip() == text)) for text in kept]
    assert order == sorted(order)


def test_odd_texts_are_counted() -> None:
    texts = ["a\0b", "half \ud800", "tab\there", "x" * (MAX_TEXT_BYTES + 1), "é" * (MAX_TEXT_BYTES // 2 + 1)]
    assert clean_texts(texts) == (["tab\there"], {"bad_text": 2, "long_text": 2})


@given(st.text(max_size=20))
def test_names_stay_inside(name: str) -> None:
    if is_inside(name):
        root = Path("/raw/data")
        assert (root / name).parts[:3] == root.parts
        assert ".." not in (root / name).parts
        assert (root / name) != root


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "a/../b", "a//b", "C:/x", "c:x", "a\\..\\b", "a\0", "a/", "./a"]
)
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_inside(name)
