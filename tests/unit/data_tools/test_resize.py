import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.cli import main
from data_tools.images import Picture, check_image, decode_rgb
from data_tools.resize import Resize, resized
from data_tools.shard_format import read_manifest
from data_tools.sources import Row
from data_tools.writer import convert
from tests.helpers.conversion import faults, job, tree


def encoded(width: int, height: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth picture: red grows to the right, green downwards."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    pixels = np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def shrink(data: bytes, side: int, quality: int = 90) -> tuple[Picture, np.ndarray]:
    found = resized(check_image(data), Resize(side, quality))
    return found, np.asarray(decode_rgb(found.data), np.int32)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_shows_the_same_picture_smaller(form: str) -> None:
    found, pixels = shrink(encoded(640, 400, form), 100)
    assert (found.width, found.height, found.change) == (160, 100, "resized")
    assert pixels.shape == (100, 160, 3)
    assert found.data[:2] == b"\xff\xd8"
    expected = np.asarray(decode_rgb(encoded(160, 100, "PNG")), np.int32)
    assert np.abs(pixels - expected).mean() < 3
    again = check_image(found.data)
    assert (again.width, again.height, again.change) == (160, 100, "")


@given(st.integers(16, 300), st.integers(16, 300), st.integers(16, 200))
def test_sizes(width: int, height: int, side: int) -> None:
    picture = Picture(encoded(width, height), width, height)
    found = resized(picture, Resize(side))
    if min(width, height) <= side:  # never enlarged, and not encoded again
        assert found is picture
        return
    assert min(found.width, found.height) == side
    assert abs(found.width * height - found.height * width) <= max(
        width, height
    )  # the aspect, but for rounding
    assert Image.open(io.BytesIO(found.data)).size == (found.width, found.height)


def test_other_changes_come_first(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(encoded(300, 100)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, "JPEG", exif=exif)
    found, _ = shrink(buffer.getvalue(), 50)
    assert (found.width, found.height, found.change) == (50, 150, "orientation, resized")
    found, pixels = shrink(encoded(300, 100, "PNG", "RGBA"), 50)
    assert found.change == "alpha, resized"
    assert pixels.shape == (50, 150, 3)
    for mode in ("L", "P", "1"):
        assert shrink(encoded(300, 100, "PNG", mode), 50)[1].shape == (50, 150, 3)


def test_quality_counts() -> None:
    data = encoded(640, 400)
    assert len(shrink(data, 200, 95)[0].data) > len(shrink(data, 200, 40)[0].data)


@pytest.mark.parametrize("resize", [Resize(15), Resize(0), Resize(64, 0), Resize(64, 101)])
def test_impossible_settings(resize: Resize, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--(resize-short-side|quality)"):
        convert(job([], tmp_path, resize=resize), tmp_path / "out")


def test_shards(tmp_path: Path) -> None:
    sizes = [(40 + 7 * i, 40 + 3 * i) for i in range(12)]
    rows = [
        Row("train", str(i), (encoded(*size),), {"captions": ["a"]}, f"rows[{i}]", {})
        for i, size in enumerate(sizes)
    ]
    changed: dict[str, int] = {}
    one = job(rows, tmp_path, resize=Resize(48, 80))
    manifest = convert(one, tmp_path / "1", report=lambda done, dropped, changes: changed.update(changes))
    convert(one, tmp_path / "2", workers=2)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert manifest.options == {"resize_short_side": 48, "quality": 80}
    assert changed == {"resized": sum(min(size) > 48 for size in sizes)}
    assert faults(tmp_path / "1") == []
    table = pa.ipc.open_file(str(tmp_path / "1" / "train-00000.arrow")).read_all().to_pylist()
    assert [min(row["width"], row["height"]) for row in table] == [min(48, *size) for size in sizes]
    with pytest.raises(ValueError, match="differs in options"):
        convert(job(rows, tmp_path, resize=Resize(48, 81)), tmp_path / "1")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.jpg").write_bytes(encoded(100, 60))
    (raw / "a.txt").write_text("a caption", "utf-8")
    command = ["convert", "pairs", "--raw", str(raw), "--workers", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--quality", "80"]) == 2
    assert "--resize-short-side" in capsys.readouterr().err
    assert main([*command, "--resize-short-side", "30"]) == 0
    assert "encoded anew in this run, resized: 1" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").options == {"resize_short_side": 30, "quality": 90}
