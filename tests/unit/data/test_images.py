"""Decoding: every kind of file becomes upright RGB, and damage is an error."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mt_deepspeed.data import images
from mt_deepspeed.data.images import decode_image, from_pillow, to_picture, to_tensor
from tests.helpers.datasets import encode_image


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A smooth picture of 48 x 30 whose corners differ."""
    x, y = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 30))
    return Image.fromarray(np.stack([x, y, 255 - x / 2 - y / 2], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def difference(pixels: torch.Tensor, image: Image.Image) -> int:
    return int((pixels.int() - to_tensor(image.convert("RGB")).int()).abs().max())


@pytest.fixture(params=["torchvision", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pillow":
        monkeypatch.setattr(images, "_decode_jpeg", None)


@pytest.mark.usefixtures("decoder")
class TestJpeg:
    def test_colour_and_grey(self, picture: Image.Image) -> None:
        for image in (picture, picture.convert("L")):
            data = encoded(image, "JPEG", quality=90)
            assert difference(decode_image(data), Image.open(io.BytesIO(data.tobytes()))) == 0

    def test_cmyk(self, picture: Image.Image) -> None:
        data = encoded(picture.convert("CMYK"), "JPEG", quality=95)
        assert difference(decode_image(data), picture) < 20

    def test_exif_orientation_is_applied(self, picture: Image.Image) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its left side
        data = encoded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
        assert difference(decode_image(data), picture) < 20

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_exif_is_ignored(self, picture: Image.Image) -> None:
        data = encoded(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", quality=95)
        assert difference(decode_image(data), picture) < 20

    def test_damage_is_an_error(self, picture: Image.Image) -> None:
        data = encoded(picture, "JPEG")
        for damaged in (data[: len(data) * 6 // 10], data[:30], data[:2]):
            with pytest.raises(ValueError, match="cannot decode"):
                decode_image(damaged)


def test_a_large_jpeg_is_decoded_smaller_where_asked() -> None:
    x, y = np.meshgrid(np.linspace(0, 1, 640), np.linspace(0, 1, 480))
    waves = np.stack([x, y, (np.sin(20 * x) + 1) / 2], -1) * 255
    picture = Image.fromarray(waves.astype(np.uint8))
    data = encoded(picture, "JPEG", quality=95)
    for side, shape in (
        (None, (480, 640)),
        (300, (480, 640)),
        (240, (240, 320)),
        (61, (120, 160)),
        (60, (60, 80)),
    ):
        pixels = decode_image(data, side)
        assert pixels.shape == (3, *shape)
        smaller = picture.resize(shape[::-1], Image.Resampling.BOX)
        assert (pixels.float() - to_tensor(smaller).float()).abs().mean() < 1.5
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(data[: len(data) // 2], 60)
    png = encoded(picture, "PNG")
    assert torch.equal(decode_image(png, 60), decode_image(png))


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n1234"])
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot decode image"):
        decode_image(np.frombuffer(data, np.uint8))


def test_cut_png_is_an_error(picture: Image.Image) -> None:
    data = encoded(picture, "PNG")
    with pytest.raises(ValueError, match="cannot decode image"):
        decode_image(data[: len(data) // 2])


def test_lossless_kinds(picture: Image.Image) -> None:
    assert difference(decode_image(encoded(picture, "PNG")), picture) == 0
    assert difference(decode_image(encoded(picture, "WEBP", lossless=True)), picture) == 0
    palette = picture.quantize(16)
    assert difference(decode_image(encoded(palette, "PNG")), palette) == 0


def test_sixteen_bits_are_scaled(picture: Image.Image) -> None:
    grey = np.asarray(picture.convert("L"))
    data = encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    assert np.array_equal(decode_image(data).numpy(), np.stack([grey] * 3))


def test_transparency_lies_on_white(picture: Image.Image) -> None:
    see_through = picture.convert("RGBA")
    alpha = np.full((30, 48), 255, np.uint8)
    alpha[:, :24] = 0
    see_through.putalpha(Image.fromarray(alpha))
    pixels = decode_image(encoded(see_through, "PNG"))
    assert (pixels[:, :, :24] == 255).all()
    assert difference(pixels[:, :, 24:], picture.crop((24, 0, 48, 30))) == 0

    palette = picture.quantize(4)
    clear = palette.getpixel((0, 0))
    pixels = decode_image(encoded(palette, "PNG", transparency=clear))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]


def test_an_opened_file_is_its_pixels(picture: Image.Image) -> None:
    turned = Image.Exif()
    turned[274] = 6
    see_through = picture.convert("RGBA")
    see_through.putalpha(90)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200)
    for data in (
        encoded(picture, "PNG", exif=turned),
        encoded(see_through, "PNG"),
        encoded(deep, "PNG"),
        encoded(picture.quantize(16), "PNG"),
        encoded(picture, "JPEG", exif=turned),
    ):
        pixels = from_pillow(Image.open(io.BytesIO(data.tobytes())))
        assert int((pixels.int() - decode_image(data).int()).abs().max()) <= 1  # two JPEG decoders


def test_first_frame_of_an_animation(picture: Image.Image) -> None:
    first = picture.quantize(16)
    data = encoded(first, "GIF", save_all=True, append_images=[picture.rotate(180).quantize(16)])
    assert difference(decode_image(data), first) == 0


def test_decompression_bombs_are_refused(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(encoded(picture, "PNG"))


def test_read_only_data_is_enough() -> None:
    data = np.frombuffer(encode_image(1), np.uint8)
    assert not data.flags.writeable
    decode_image(data)


def test_pictures_and_tensors(picture: Image.Image) -> None:
    assert np.array_equal(np.asarray(to_picture(to_tensor(picture))), np.asarray(picture))
