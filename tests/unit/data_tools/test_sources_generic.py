"""Flickr, CC12M, and the forms people have their own data in."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.shard_format import read_manifest
from data_tools.sources import SOURCES, AnnotationError, Request, Row, Slice
from tests.helpers.conversion import stored


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (number * 9 % 256, 0, 99)).save(buffer, "JPEG")
    return buffer.getvalue()


def rows(name: str, raw: Path, **columns: Any) -> list[Row]:
    source = SOURCES[name]
    return list(source.rows(Request(raw, source.find(raw), **columns)))


def brief(found: list[Row]) -> list[tuple[str, str, list[str], str]]:
    return [(row.split, row.image_id, row.columns["captions"], row.refused) for row in found]


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


def test_flickr30k_token_file(tmp_path: Path) -> None:
    write(
        tmp_path / "results_20130124.token",
        "1.jpg#0\ta dog .\n1.jpg#1\ta # cat\n2.jpg#0\ttwo\n3.jpg#0\tthree\n",
    )
    write(tmp_path / "flickr30k_entities" / "test.txt", "2\n")
    write(tmp_path / "flickr30k_entities" / "val.txt", "3\n")
    found = rows("flickr30k", tmp_path)
    assert brief(found) == [
        ("train", "1.jpg", ["a dog .", "a # cat"], ""),
        ("val", "3.jpg", ["three"], ""),
        ("test", "2.jpg", ["two"], ""),
    ]
    assert found[0].images == (tuple(tmp_path / f / "1.jpg" for f in FLICKR30K),)
    write(tmp_path / "results_20130124.token", "1.jpg#0\ta\n2.jpg#0\tb\n1.jpg#1\tc\n")
    with pytest.raises(AnnotationError, match=r"line 3: photo '1\.jpg' stands in the file twice"):
        rows("flickr30k", tmp_path)
    write(tmp_path / "results_20130124.token", "1.jpg a\n")
    with pytest.raises(AnnotationError, match="line 1: found"):
        rows("flickr30k", tmp_path)


FLICKR30K = ("flickr30k-images", "flickr30k_images", "images")


def test_flickr8k_lists_name_the_splits(tmp_path: Path) -> None:
    text = tmp_path / "Flickr8k_text"
    write(text / "Flickr8k.token.txt", "a.jpg#0\tone\nb.jpg.1#0\tfaulty\nc.jpg#0\tthree\n")
    write(text / "Flickr_8k.trainImages.txt", "c.jpg\n")
    write(text / "Flickr_8k.devImages.txt", "a.jpg\n")
    assert brief(rows("flickr8k", tmp_path)) == [
        ("train", "c.jpg", ["three"], ""),
        ("val", "a.jpg", ["one"], ""),
        ("train", "b.jpg.1", ["faulty"], "no_split"),
    ]


def test_flickr_karpathy(tmp_path: Path) -> None:
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": name}]}
        for name, split in (("x", "val"), ("y", "train"))
    ]
    write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": images}))
    assert brief(rows("flickr30k", tmp_path)) == [("train", "y.jpg", ["y"], ""), ("val", "x.jpg", ["x"], "")]


def test_cc12m_is_the_other_way_round(tmp_path: Path) -> None:
    write(tmp_path / "cc12m.tsv", "http://a\tone\nhttp://b\ttwo\n")
    found = rows("cc12m", tmp_path)
    assert brief(found) == [("train", "0", ["one"], ""), ("train", "1", ["two"], "")]
    (files,) = found[1].images
    assert isinstance(files, tuple)
    assert files[0] == tmp_path / "cc12m_image" / "1.jpg"


TABLES = {
    "a.tsv": 'path\tcaption\nx/1.jpg\t"quoted\nx/1.jpg\tagain\n../2.jpg\tup\nx/3.jpg\t\n',
    "a.csv": 'caption,filename\n"""quoted",x/1.jpg\nagain,x/1.jpg\nup,../2.jpg\n,x/3.jpg\n',
    "a.jsonl": "\n".join(
        json.dumps({"image": image, "text": text})
        for image, text in (("x/1.jpg", ['"quoted', "again"]), ("../2.jpg", "up"), ("x/3.jpg", None))
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, TABLES[name])
    found = rows("table", tmp_path)
    assert brief(found) == [
        ("train", "x/1.jpg", ['"quoted', "again"], ""),
        ("train", "../2.jpg", ["up"], "unsafe_path"),
        ("train", "x/3.jpg", [], ""),
    ]
    assert found[0].images == ((tmp_path / "x/1.jpg",),)
    assert found[1].images == ((),)


def test_parquet_with_paths_bytes_or_neither(tmp_path: Path) -> None:
    cells = [{"bytes": jpeg(1), "path": "a"}, {"bytes": jpeg(2), "path": None}]
    table = pa.table({"picture": cells, "title": ["one", "two"]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = rows("table", tmp_path, path_column="picture", caption_column="title")
    assert [row.images for row in found] == [(jpeg(1),), (jpeg(2),)]
    assert [row.columns["captions"] for row in found] == [["one"], ["two"]]
    with pytest.raises(AnnotationError, match=r"row 0: columns \['picture', 'title'\].*--path-column"):
        rows("table", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(AnnotationError, match=r"a\.parquet: not a readable Parquet file"):
        rows("table", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "path\tcaption\nx.jpg\n", "line 2: 1 fields, expected 2"),
        ("a.csv", 'path,caption\nx.jpg,"open\n', "unexpected end of data"),
        ("a.jsonl", '{"path": "a"}\n', "line 1: columns"),
        ("a.jsonl", '{"path": 3, "text": "a"}\n', "line 1: picture: found 3"),
        ("a.jsonl", '{"path": "a", "text": [1]}\n', "line 1: field 'text'"),
        ("a.jsonl", '{"path": "a", "text": NaN}\n', "line 1: field 'text': found nan"),
        ("a.jsonl", "[1]\n", "line 1: found"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
    ],
)
def test_broken_tables(name: str, content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    with pytest.raises(AnnotationError) as caught:
        rows("table", tmp_path)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_pairs(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/1.png", "a/3.jpg"):
        write(tmp_path / name, "")
    write(tmp_path / "a" / "1.txt", " one \n\nuno\n")
    write(tmp_path / "b" / "2.txt", "two")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    write(outside / "4.jpg", "")
    (tmp_path / "link").symlink_to(outside, target_is_directory=True)
    assert brief(rows("pairs", tmp_path)) == [
        ("train", "a/1.png", ["one", "uno"], ""),
        ("train", "a/3.jpg", [], ""),
        ("train", "b/2.JPG", ["two"], ""),
    ]


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path: Path) -> None:
    members = {
        "000.jpg": jpeg(0),
        "000.txt": b"zero\n",
        "000.json": b'{"caption": "not this one"}',
        "../../001.png": jpeg(1),
        "../../001.json": b'{"caption": "up", "status": "success"}',
        "d/002.seg.png": b"another file",
        "d/002.jpg": jpeg(2),
        "d/002.cls": b"3",
        "003.json": b'{"caption": "no picture"}',
    }
    make_tar(tmp_path / "x" / "0.tar", members)
    found = rows("webdataset", tmp_path)
    assert brief(found) == [
        ("train", "000", ["zero"], ""),
        ("train", "../../001", ["up"], ""),
        ("train", "d/002", [], ""),
        ("train", "003", ["no picture"], ""),
    ]
    assert [stored(row) for row in found[:3]] == [[jpeg(0)], [jpeg(1)], [jpeg(2)]]
    assert found[3].images == ((),)
    (first, *_) = rows("webdataset", tmp_path, caption_column="caption")
    assert first.columns == {"captions": ["not this one"]}


def test_compressed_tars_give_the_same_rows(tmp_path: Path) -> None:
    members = {f"{i}.{s}": d for i in range(3) for s, d in (("jpg", jpeg(i)), ("txt", b"a"))}
    make_tar(tmp_path / "plain" / "0.tar", members)
    data = (tmp_path / "plain" / "0.tar").read_bytes()
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "0.tar.gz").write_bytes(gzip.compress(data))
    plain, packed = rows("webdataset", tmp_path / "plain"), rows("webdataset", tmp_path / "gz")
    assert brief(plain) == brief(packed)
    assert [stored(row) for row in plain] == [stored(row) for row in packed] == [[jpeg(i)] for i in range(3)]
    assert isinstance(plain[0].images[0], Slice)  # not read before a worker wants it
    (tmp_path / "gz" / "0.tar.gz").write_bytes(gzip.compress(data)[:-300])
    with pytest.raises(AnnotationError, match=r"0\.tar\.gz: not a readable tar file"):
        rows("webdataset", tmp_path / "gz")


def test_links_and_devices_in_tars_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert rows("webdataset", tmp_path) == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_cut_tars_are_named(share: float, tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {f"{i}.jpg": jpeg(i) for i in range(40)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: int(len(data.rstrip(b"\0")) * share)])
    with pytest.raises(AnnotationError, match=r"a\.tar: not a readable tar file"):
        rows("webdataset", tmp_path)


def test_bad_text_members_are_named(tmp_path: Path) -> None:
    for data in (b'{"caption": 3}', b"{", b"[]", b"\xff"):
        make_tar(tmp_path / "a.tar", {"7.jpg": jpeg(1), "7.json": data})
        with pytest.raises(AnnotationError, match=r"a\.tar: sample 7"):
            rows("webdataset", tmp_path)


def test_img2dataset_in_all_its_formats_gives_the_same_rows(tmp_path: Path) -> None:
    def captions(found: list[Row]) -> list[tuple[list[str], bytes]]:
        return [(row.columns["captions"], *stored(row)) for row in found]

    members: dict[str, bytes] = {}
    for i in range(3):
        members |= {f"0000{i}.jpg": jpeg(i), f"0000{i}.txt": f"caption {i}".encode()}
        members |= {f"0000{i}.json": json.dumps({"caption": f"caption {i}", "status": "success"}).encode()}
    make_tar(tmp_path / "tars" / "00000.tar", members)
    metadata = pa.table({"url": ["u"] * 3, "caption": [f"caption {i}" for i in range(3)]})
    pq.write_table(metadata, tmp_path / "tars" / "00000.parquet")
    for name, data in members.items():
        (tmp_path / "files" / "00000").mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / "00000" / name).write_bytes(data)
    pq.write_table(metadata, tmp_path / "files" / "00000.parquet")
    (tmp_path / "parquet").mkdir()
    pictures = metadata.append_column("jpg", pa.array([jpeg(i) for i in range(3)]))
    pq.write_table(pictures, tmp_path / "parquet" / "00000.parquet")
    expected = [([f"caption {i}"], jpeg(i)) for i in range(3)]
    for form in ("tars", "files", "parquet"):
        assert captions(rows("img2dataset", tmp_path / form)) == expected, form


def test_own_pairs_to_shards(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / "raw" / f"{i}.txt", f"picture {i}")
        (tmp_path / "raw" / f"{i}.jpg").write_bytes(jpeg(i))
    out = str(tmp_path / "out")
    assert main(["convert", "pairs", "--raw", str(tmp_path / "raw"), "--out", out, "--name", "mine"]) == 0
    assert main(["verify", out, "--full", "--workers", "1"]) == 0
    manifest = read_manifest(out)
    assert (manifest.dataset, manifest.splits["train"].rows) == ("mine", 5)
