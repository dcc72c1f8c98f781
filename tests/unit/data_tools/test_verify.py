import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.files import hash_file
from data_tools.shard_format import CAPTION_SCHEMA, MANIFEST_NAME, SCHEMAS, read_manifest
from data_tools.sources import SOURCES
from data_tools.verify import verify


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    arguments = ["--layout", "coco", "--num-images", "300", "--image-size", "32", "--workers", "1"]
    assert main(["synth", "--out", str(folder), *arguments]) == 0
    out = str(folder / "shards")
    assert main(["convert", "coco", "--raw", str(folder / "coco"), "--out", out, "--workers", "1"]) == 0
    return folder / "shards"


@pytest.fixture
def shards(world: Path, tmp_path: Path) -> Path:
    for path in world.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def faults(folder: Path, full: bool = True) -> list[str]:
    return [fault for _, found in verify(folder, full) for fault in found]


def restate(folder: Path, name: str, **changes: object) -> None:
    """Makes the manifest agree with a shard that was written anew."""
    path = folder / MANIFEST_NAME
    tree = json.loads(path.read_text("utf-8"))
    split = tree["splits"][name]
    shard = split["shards"][0]
    file = folder / shard["file"]
    shard |= {"bytes": file.stat().st_size, "sha256": hash_file(file), **changes}
    split |= {"rows": shard["rows"], "texts": shard["texts"]}
    path.write_text(json.dumps(tree), "utf-8")


def test_good_shards_have_no_faults(shards: Path) -> None:
    assert faults(shards, full=False) == faults(shards) == []
    assert main(["verify", str(shards), "--full", "--workers", "2"]) == 0


def test_files_missing_cut_or_not_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "val-00000.arrow").unlink()
    test = shards / "test-00000.arrow"
    test.write_bytes(test.read_bytes()[:-100])
    (shards / "train-00007.arrow").write_bytes(b"x")
    found = faults(shards, full=False)
    assert len(found) == 3
    assert "train-00007.arrow: not named" in found[0]
    assert "test-00000.arrow" in found[1]
    assert "bytes, expected" in found[1]
    assert "val-00000.arrow: missing" in found[2]
    assert main(["verify", str(shards), "--workers", "1"]) == 1
    assert "3 faults" in capsys.readouterr().out


def test_a_flipped_byte_is_found_by_the_full_check_and_never_crashes_the_fast_one(shards: Path) -> None:
    path = shards / "train-00000.arrow"
    good = path.read_bytes()
    draws = random.Random(0)
    for _ in range(60):
        data = bytearray(good)
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(data)
        assert any("train-00000.arrow: SHA-256" in fault for fault in faults(shards))
        faults(shards, full=False)


@pytest.mark.parametrize("layout", ["vqav2", "nlvr2", "snli_ve", "vg"])
def test_damaged_shards_of_every_task(layout: str, tmp_path: Path) -> None:
    """Cut, flipped, zeroed, in the footer too: the full check names file and fault, none crashes."""
    arguments = ["--layout", layout, "--num-images", "24", "--image-size", "32", "--workers", "1"]
    assert main(["synth", "--out", str(tmp_path), *arguments]) == 0
    (tmp_path / "answers.json").write_text('["yes", "no", "red", "2"]', "utf-8")
    more = ["--answers", str(tmp_path / "answers.json")] if layout == "vqav2" else []
    raw, out = str(tmp_path / layout), tmp_path / "out"
    assert main(["convert", layout, "--raw", raw, "--out", str(out), "--workers", "1", *more]) == 0
    path = out / "train-00000.arrow"
    good = path.read_bytes()
    draws = random.Random(layout)
    for trial in range(40):
        data = bytearray(good)
        at = draws.randrange(len(data) - 64)
        if trial % 4 == 0:
            del data[at:]
        elif trial % 4 == 1:
            data[at] ^= 1 << draws.randrange(8)
        elif trial % 4 == 2:
            data[at : at + 64] = bytes(64)
        else:
            for _ in range(8):
                data[-1 - draws.randrange(min(3000, len(data)))] ^= 1 << draws.randrange(8)
        path.write_bytes(data)
        found = faults(out)
        assert data == good or found
        assert all("train-00000.arrow" in fault for fault in [*found, *faults(out, full=False)])


def test_structure_is_checked_even_if_the_hash_fits(shards: Path) -> None:
    """Shards written by other hands, with a manifest that agrees."""
    path = shards / "val-00000.arrow"
    table = pa.ipc.open_file(str(path)).read_all()

    def write(rows: list[dict[str, Any]], schema: pa.Schema = CAPTION_SCHEMA, batch: int = 256) -> str:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), max_chunksize=batch)
        texts = sum(len(row["captions"]) for row in rows)
        restate(shards, "val", rows=len(rows), texts=texts)
        return "\n".join(faults(shards))

    rows = table.to_pylist()
    assert write(rows) == ""
    assert "record batch 0: 4 rows, expected 256" in write(rows, batch=4)
    assert "schema" in write(rows, pa.schema(list(CAPTION_SCHEMA)[::-1]))
    assert "rows without texts" in write([{**rows[0], "captions": []}])
    assert "row 1: a caption stands there twice" in write([rows[0], {**rows[1], "captions": ["a", "a"]}])
    assert "row 0: image: damaged" in write([{**rows[0], "image": rows[0]["image"][:-200]}])
    assert "is 32 x 32, but the row states 33 x 32" in write([{**rows[0], "width": 33}])
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 4), np.uint8)).save(buffer, "PNG")
    assert "plain RGB decoder: alpha" in write([{**rows[0], "image": buffer.getvalue()}])
    nullable = pa.schema([pa.field(field.name, field.type) for field in CAPTION_SCHEMA])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEMAS, "caption", nullable)
        assert "holds nulls" in write([{**rows[0], "image_id": None}], nullable)


def test_counts_are_compared(shards: Path) -> None:
    split = read_manifest(shards).splits["val"]
    restate(shards, "val", rows=split.rows + 1)
    assert any(f"{split.rows} rows and" in fault for fault in faults(shards, full=False))


def test_published_counts_are_known_for_every_data_set() -> None:
    own = {"img2dataset", "webdataset", "table", "pairs"}  # people's own data
    for name in set(SOURCES) - own:
        counts = SOURCES[name].published
        assert counts, name
        for split, (images, texts) in (item for splits in counts.values() for item in splits.items()):
            assert (images or texts or 0) > 276, (name, split)  # RTE has the smallest set


def test_no_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "manifest.json: not found" in capsys.readouterr().err


def test_stats_and_peek(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(shards)]) == 0
    output = capsys.readouterr().out
    (train,) = [line.split() for line in output.splitlines() if line.startswith("train ")]
    assert train[1:5] == ["240", "82783", "1200", "414113"]
    png = tmp_path / "sheet.png"
    assert main(["peek", str(shards), "--split", "val", "--rows", "5", "--png", str(png)]) == 0
    output = capsys.readouterr().out
    assert output.count("val COCO_val2014_") == 5
    assert "(32x32, " in output
    with Image.open(png) as sheet:
        assert sheet.width > sheet.height > 300
    assert main(["peek", str(shards), "--split", "nothing"]) == 1
    assert "no split 'nothing'" in capsys.readouterr().err
