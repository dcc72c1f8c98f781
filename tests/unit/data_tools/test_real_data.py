"""Small pieces of the real data sets, where they are at hand; their photos are never copied."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

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
    manifest, counts = convert("vgqa", "vg", tmp_path / "vgqa", "--answers", str(tmp_path / "vqa"))
    assert counts["train"][0] == 4
    assert counts["train"][1] + sum(manifest.dropped.values()) == 580


def test_nlvr2_and_entailment(tmp_path: Path) -> None:
    _, counts = convert("nlvr2", "nlvr2", tmp_path / "nlvr2")
    assert counts == {"dev": (4, 8), "test1": (4, 8)}
    for name, expected in (("sample_pairs.allennlp", (2, 16)), ("sample_data.cpuknows", (5, 5))):
        more = ("--annotations", f"{name}.jsonl", "--images", str(REAL / "flickr30k"))
        _, counts = convert("snli_ve", "snli-ve", tmp_path / name, *more)
        assert counts == {"train": expected}


def test_cc12m_and_tars(tmp_path: Path) -> None:
    manifest, _ = convert("cc12m", "cc12m/rows-without-images", tmp_path / "cc12m")
    assert manifest.dropped == {"missing_file": 5}
    manifest, _ = convert("webdataset", "webdataset/clip-retrieval", tmp_path / "tars")
    assert manifest.dropped == {"no_text": 4 + 3 + 2 + 2}


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
