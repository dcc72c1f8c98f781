"""Awkward pictures, all drawn here."""

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import images
from data_tools.images import REASONS, ImageRefused, check_image, decode_rgb


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture with some noise: left dark, right light, colours differing from corner to corner."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 12, (height, width))
    channels = [x * 200 // width + noise, y * 200 // height + noise, 255 - x * 150 // width - noise]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(ImageRefused) as caught:
        check_image(data)
    assert caught.value.reason in REASONS
    return caught.value.reason


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(check_image(data).data), int)


def difference(a: np.ndarray, b: Image.Image | np.ndarray) -> float:
    return float(abs(a - np.asarray(b, int)).mean())


@pytest.mark.parametrize(
    "data",
    [
        encode(photo(), "JPEG", quality=95),
        encode(photo(), "JPEG", quality=95, progressive=True),
        encode(photo(), "JPEG", quality=95, restart_marker_blocks=2),
        encode(photo().convert("L"), "JPEG"),
        encode(photo().convert("L"), "JPEG", progressive=True),
        encode(photo(), "PNG"),
        encode(photo().convert("L"), "PNG"),
        encode(photo().convert("1"), "PNG"),
        encode(photo().quantize(16), "PNG"),
        encode(photo(), "WEBP", quality=95),
    ],
)
def test_plain_pictures_keep_their_bytes(data: bytes) -> None:
    picture = check_image(data)
    assert picture.data == data
    assert picture.change == ""
    assert (picture.width, picture.height) == (96, 64)
    assert decode_rgb(data).mode == "RGB"


def test_content_counts_not_the_end_of_the_file() -> None:
    data = encode(photo(), "JPEG", quality=95)
    assert check_image(data + b"\0" * 100).data == data + b"\0" * 100


def convert_cases() -> dict[str, tuple[bytes, Image.Image | np.ndarray, float]]:
    """change -> (source, the picture it must show, tolerance of the mean in grey levels)."""
    plain = photo()
    grey16 = np.asarray(plain.convert("L"), np.uint16) * 257
    half = np.full((64, 96, 4), 255, np.uint8)
    half[..., :3] = np.asarray(plain)
    half[:, :48, 3] = 0
    on_white = np.asarray(plain).copy()
    on_white[:, :48] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = plain.transpose(Image.Transpose.ROTATE_90)  # orientation 6 asks to turn it back clockwise
    red = [Image.new("RGB", (96, 64), colour) for colour in ("red", "green", "blue")]
    return {
        "cmyk": (encode(plain.convert("CMYK"), "JPEG", quality=98), plain, 3),
        "16_bit": (encode(Image.fromarray(grey16), "PNG"), plain.convert("L").convert("RGB"), 0),
        "alpha": (encode(Image.fromarray(half), "PNG"), on_white, 0),
        "orientation": (encode(turned, "JPEG", quality=98, subsampling=0, exif=exif), plain, 3),
        "gif": (encode(red[0], "GIF", save_all=True, append_images=red[1:]), red[0], 0),
        "animation": (
            encode(red[0], "WEBP", save_all=True, append_images=red[1:], lossless=True),
            red[0],
            0,
        ),
        "bmp": (encode(plain, "BMP"), plain, 0),
        "tiff": (encode(plain, "TIFF"), plain, 0),
    }


@pytest.mark.parametrize("change", convert_cases())
def test_pictures_that_would_show_wrongly_are_encoded_anew(change: str) -> None:
    data, expected, tolerance = convert_cases()[change]
    picture = check_image(data)
    assert picture.change == change
    assert (picture.width, picture.height) == (96, 64)
    assert difference(shown(data), expected) <= tolerance
    again = check_image(picture.data)  # what is stored is stored as it is
    assert again.data == picture.data
    assert again.change == ""


def test_transparent_colour_and_palette_alpha_are_put_on_white() -> None:
    grey = Image.new("L", (32, 32), 10)
    grey.paste(200, (0, 0, 16, 32))
    assert shown(encode(grey, "PNG", transparency=10))[0, 20].tolist() == [255] * 3
    palette = photo(32, 32).quantize(8)
    transparent = bytes([0] * 8)
    assert shown(encode(palette, "PNG", transparency=transparent)).min() == 255
    layered = Image.merge("LA", (grey, Image.new("L", (32, 32), 0)))
    assert shown(encode(layered, "PNG")).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_stands_upright(orientation: int) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo().transpose(turns[orientation]) if orientation > 1 else photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {"quality": 98, "subsampling": 0}
        assert difference(shown(encode(stored, form, exif=exif, **options)), photo()) < 3, form


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0garbage",
        b"Exif\0\0" + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    ],
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    data = encode(photo(), "JPEG", exif=exif)
    assert check_image(data).data == data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b"\0" * 5000, "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (encode(photo(), "PPM"), "not_an_image"),
        (encode(photo(1, 1), "PNG"), "too_small"),
        (encode(photo(200, 15), "PNG"), "too_small"),
        (encode(photo(16, 321), "PNG"), "extreme_aspect"),
        (encode(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"), "unsupported_mode"),
    ],
)
def test_refusals(data: bytes, reason: str) -> None:
    assert refusal(data) == reason


def png_of(width: int, height: int) -> bytes:
    """A PNG that states a size and holds no rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30000, 30000), (9000, 9000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(images, "_load", lambda *_: pytest.fail("decoded"))
    assert refusal(png_of(*size)) == "too_many_pixels"


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "CMYK"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_cut_files_are_refused(form: str, share: float) -> None:
    sources: dict[str, Callable[[], bytes]] = {
        "progressive": lambda: encode(photo(), "JPEG", quality=95, progressive=True),
        "CMYK": lambda: encode(photo().convert("CMYK"), "JPEG", quality=95),
    }
    data = sources.get(form, lambda: encode(photo(), form))()
    check_image(data)
    assert refusal(data[: int(len(data) * share)]) in ("damaged", "not_an_image")


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.3, 0.9), grey=st.booleans())  # the last block alone may pass unseen
def test_cut_jpeg_with_an_end_mark_is_refused(share: float, grey: bool) -> None:
    """Decoders fill what is missing with grey and say nothing."""
    data = encode(photo().convert("L") if grey else photo(), "JPEG", quality=95)
    assert refusal(data[: int(len(data) * share)] + b"\xff\xd9") == "damaged"


def test_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    data = encode(photo(), "JPEG", quality=95, progressive=True)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 3
    for scan in scans[1:]:
        assert refusal(data[:scan] + b"\xff\xd9") == "damaged"


def test_a_truly_grey_corner_is_accepted() -> None:
    for size in ((96, 64), (333, 211)):
        image = photo(*size)
        image.paste((128, 128, 128), (size[0] // 2, 0, *size))
        for picture in (image, image.convert("L"), image.convert("CMYK")):
            check_image(encode(picture, "JPEG", quality=95))


def test_a_flipped_bit_of_a_png_is_refused() -> None:
    data = encode(photo(), "PNG")
    draws = random.Random(0)
    for _ in range(50):
        position = draws.randrange(40, len(data) - 12)
        flipped = bytearray(data)
        flipped[position] ^= 1 << draws.randrange(8)
        assert refusal(bytes(flipped)) == "damaged"


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 6000),
)
def test_damaged_files_are_refused_or_decode(form: str, edits: list[tuple[int, int]], cut: int) -> None:
    """Whatever the bytes: a verdict, and what is accepted decodes to the size stated."""
    data = bytearray(encode(photo(48, 32), form))
    for position, value in edits:
        data[position % len(data)] = value
    try:
        picture = check_image(bytes(data[: max(1, len(data) - cut)] if cut < 3000 else data))
    except ImageRefused:
        return
    assert decode_rgb(picture.data).size == (picture.width, picture.height)
