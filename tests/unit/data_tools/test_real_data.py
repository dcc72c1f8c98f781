"""Small pieces of the real data sets, where they are at hand; their photos are never copied."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import peek
from data_tools.cli import main
from data_tools.images import ImageRefused, check_image, decode_rgb
from data_tools.shard_format import Manifest, read_manifest

ROOT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("MT_REAL_DATA") or ROOT.parent / "shared" / "data")

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no real data: MT_REAL_DATA names no folder")


def convert(name: str, raw: str, out: Path, *more: str) -> tuple[Manifest, dict[str, tuple[int, int]]]:
    """The manifest and (images, texts) per split; the shards are verified in full."""
    options = ["--out", str(out), "--workers", "1", *more]
    assert main(["convert", name, "--raw", str(REAL / raw), *options]) == 0
    assert main(["verify", str(out), "--full", "--workers", "1"]) == 0
    manifest = read_manifest(out)
    return manifest, {split: (info.rows, info.texts) for split, info in manifest.splits.items()}


def test_coco(tmp_path: Path) -> None:
    files = ["annotations/captions_train2017.json", "annotations/captions_val2017.json"]
    manifest, counts = convert("coco", "coco", tmp_path / "official", "--annotations", *files)
    assert counts == {"train": (40, 200), "val": (79, 395)}
    assert manifest.dropped == {}
    assert [source.file for source in manifest.sources] == files
    manifest, counts = convert("coco", "coco", tmp_path / "karpathy")
    assert counts == {"test": (1, 5)}


def test_coco_rows_without_images(tmp_path: Path) -> None:
    more = ("--annotations", "captions_val2017.json")
    manifest, counts = convert("coco", "coco/rows-without-images", tmp_path / "out", *more)
    assert counts == {"val": (0, 0)}
    assert manifest.dropped == {"missing_file": 200}


def test_vg(tmp_path: Path) -> None:
    manifest, counts = convert("vg", "vg", tmp_path / "out")
    assert counts == {"train": (4, 1023 - 48)}
    assert manifest.dropped == {"duplicate_text": 48}
    manifest, _ = convert("vg", "vg/rows-without-images", tmp_path / "rows")
    assert manifest.dropped == {"missing_file": 1, "duplicate_text": 10}


def test_cc3m_and_sbu_rows(tmp_path: Path) -> None:
    manifest, counts = convert("cc3m", "cc3m/rows-without-images", tmp_path / "cc3m")
    assert counts == {"train": (0, 0), "val": (0, 0)}
    assert manifest.dropped == {"missing_file": 5 + 300}
    manifest, counts = convert("sbu", "sbu/rows-without-images", tmp_path / "sbu")
    assert manifest.dropped == {"missing_file": 5}


def test_flickr(tmp_path: Path) -> None:
    manifest, counts = convert("flickr30k", "flickr30k", tmp_path / "30k")
    assert counts == {"val": (4, 20), "test": (5, 25)}  # the photos come from those lists
    manifest, counts = convert("flickr8k", "flickr8k", tmp_path / "8k-karpathy")
    assert counts == {"train": (60, 300), "val": (14, 70), "test": (6, 30)}
    token = ("--annotations", "Flickr8k_text/Flickr8k.token.txt")
    manifest, counts = convert("flickr8k", "flickr8k", tmp_path / "8k-token", *token)
    assert counts == {"train": (60, 300), "val": (14, 70), "test": (6, 30)}
    assert manifest.dropped == {}
    manifest, counts = convert("flickr8k", "flickr8k/rows-without-images", tmp_path / "8k-rows")
    assert manifest.dropped == {"missing_file": 40}  # 39 photos, and one whose name ends in .jpg.1
    manifest, counts = convert("flickr30k", "flickr30k/rows-without-images", tmp_path / "30k-rows")
    assert manifest.dropped == {"missing_file": 200}
    csv = ("--annotations", "captions.txt", "--images", str(REAL / "flickr8k" / "Flicker8k_Dataset"))
    manifest, counts = convert("table", "flickr8k", tmp_path / "8k-csv", *csv)
    assert counts == {"train": (80, 400)}


def test_questions(tmp_path: Path) -> None:
    images = ("--images", str(REAL / "coco"), "--answers", str(REAL / "vqa" / "trainval_label2ans.json"))
    manifest, counts = convert("vqav2", "vqa", tmp_path / "vqa", *images)
    assert counts == {"train": (30, 46 - 1)}
    assert manifest.dropped == {"no_known_answer": 1}
    assert len(manifest.options["answers"]) == 3129
    _, counts = convert("vqav2", "vqa/for-coco-train2017-images", tmp_path / "vqa17", *images)
    assert counts == {"train": (25, 39 - 1)}
    manifest, _ = convert("vqav2", "vqa/rows-without-images", tmp_path / "vqa-rows", *images[2:])
    assert manifest.dropped == {"missing_file": 195, "no_text": 4, "no_known_answer": 4}  # 199 pictures
    manifest, counts = convert("vgqa", "vg", tmp_path / "vgqa", "--answers", str(tmp_path / "vqa"))
    assert counts["train"][0] == 4
    assert counts["train"][1] + sum(manifest.dropped.values()) == 580


def test_nlvr2_and_entailment(tmp_path: Path) -> None:
    _, counts = convert("nlvr2", "nlvr2", tmp_path / "nlvr2")
    assert counts == {"dev": (4, 8), "test1": (4, 8)}
    manifest, _ = convert("nlvr2", "nlvr2/rows-without-images", tmp_path / "rows")
    assert manifest.dropped == {"missing_file": 115}  # the pairs of 200 statements
    for name, expected in (("sample_pairs.allennlp", (2, 16)), ("sample_data.cpuknows", (5, 5))):
        more = ("--annotations", f"{name}.jsonl", "--images", str(REAL / "flickr30k"))
        _, counts = convert("snli_ve", "snli-ve", tmp_path / name, *more)
        assert counts == {"train": expected}


def test_cc12m_and_tars(tmp_path: Path) -> None:
    manifest, _ = convert("cc12m", "cc12m/rows-without-images", tmp_path / "cc12m")
    assert manifest.dropped == {"missing_file": 5}
    manifest, _ = convert("webdataset", "webdataset/clip-retrieval", tmp_path / "tars")
    assert manifest.dropped == {"no_text": 4 + 3 + 2 + 2}
    manifest, _ = convert("webdataset", "webdataset/webdataset", tmp_path / "tgz")
    assert manifest.dropped == {"no_text": 90}  # digits with a class


def coco_photos() -> list[tuple[str, bytes, list[str]]]:
    """(name, file, captions) of the train2017 photos at hand."""
    tree = json.loads((REAL / "coco" / "annotations" / "captions_train2017.json").read_text("utf-8"))
    captions: dict[int, list[str]] = {}
    for one in tree["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"].strip())
    folder = REAL / "coco" / "train2017"
    return [
        (i["file_name"], (folder / i["file_name"]).read_bytes(), captions[i["id"]]) for i in tree["images"]
    ]


def test_real_photos_in_every_other_form(tmp_path: Path) -> None:
    photos = coco_photos()
    for name in ("pairs", "webdataset", "table", "parquet", "arrow"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "webdataset" / "00000.tar", "w") as tar:
        for name, data, captions in photos:
            (tmp_path / "pairs" / name).write_bytes(data)
            (tmp_path / "pairs" / name).with_suffix(".txt").write_text("\n".join(captions), "utf-8")
            record = json.dumps({"caption": captions}).encode()
            for member, content in ((name, data), (name.replace("jpg", "json"), record)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    lines = [json.dumps({"path": name, "captions": captions}) + "\n" for name, _, captions in photos]
    (tmp_path / "table" / "t.jsonl").write_text("".join(lines), "utf-8")
    names, images, texts = zip(*photos, strict=True)
    pq.write_table(pa.table({"jpg": images, "caption": texts}), tmp_path / "parquet" / "00000.parquet")
    table = pa.table({"image": images, "caption": texts, "image_id": names, "split": ["train"] * 40})
    path = str(tmp_path / "arrow" / "coco_caption_karpathy_train.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    forms = [("pairs", "pairs"), ("webdataset", "webdataset"), ("img2dataset", "webdataset")]
    forms += [("img2dataset", "parquet"), ("img2dataset", "pairs"), ("table", "table")]
    for name, folder in [*forms, ("reference-arrow", "arrow")]:
        more = ["--images", str(REAL / "coco" / "train2017")] if name == "table" else []
        out = tmp_path / f"{name}-{folder}"
        manifest, counts = convert(name, str(tmp_path / folder), out, *more)
        assert counts == {"train": (40, 200)}, name
        assert manifest.dropped == {}
        found = [(row["image"], row["captions"]) for row in peek.rows(out)]
        assert sorted(found) == sorted((data, texts) for _, data, texts in photos), name


def test_bad_images_in_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for entry in json.loads((REAL / "bad-images" / "index.json").read_text("utf-8"))["files"]:
        path = tmp_path / "raw" / entry["file"]
        path.write_bytes((REAL / "bad-images" / entry["file"]).read_bytes())
        path.with_suffix(".txt").write_text("a caption", "utf-8")
    manifest, counts = convert("pairs", str(tmp_path / "raw"), tmp_path / "out")
    assert counts == {"train": (9, 9)}
    reasons = ("damaged", "empty_file", "not_an_image", "too_many_pixels", "too_small")
    assert manifest.dropped == dict.fromkeys(reasons, 1)


def test_bad_images_get_the_action_they_are_listed_with() -> None:
    files = json.loads((REAL / "bad-images" / "index.json").read_text("utf-8"))["files"]
    assert files
    for entry in files:
        data = (REAL / "bad-images" / entry["file"]).read_bytes()
        if entry["expected_action"] == "reject":
            with pytest.raises(ImageRefused):
                check_image(data)
            continue
        picture = check_image(data)
        image = decode_rgb(picture.data)
        expected = entry["expected_result"]
        assert image.mode == expected["mode"], entry["file"]
        size = (expected["width"], expected["height"])
        assert image.size == (picture.width, picture.height) == size, entry["file"]
        if entry["expected_action"] == "accept":
            assert picture.data == data, entry["file"]

    def pixels(name: str) -> np.ndarray:
        return np.asarray(decode_rgb(check_image((REAL / "bad-images" / name).read_bytes()).data), float)

    assert abs(pixels("gray-16bit.png").mean() - pixels("grayscale.jpg").mean()) < 2
    assert pixels("rgba-half-transparent.png")[:, :150].min() == 255
    assert abs(pixels("exif-orientation-6.jpg") - pixels("control-good.jpg")).mean() < 4
    assert abs(pixels("cmyk.jpg") - pixels("control-good.jpg")).mean() < 4


def test_every_photo_at_hand_is_accepted_as_it_is() -> None:
    photos = [path for path in REAL.rglob("*.jpg") if "bad-images" not in path.parts]
    assert photos
    for path in photos:
        data = path.read_bytes()
        assert check_image(data).data is data, path
