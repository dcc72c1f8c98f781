"""Encoded image bytes to RGB pixels."""

import io

import numpy as np
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# torchvision's libjpeg-turbo decoder takes two thirds of Pillow's time and gives the same pixels, but the
# function is announced to leave torchvision; Pillow serves then.
_decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)


def decode_image(data: NDArray[np.uint8], smallest_side: int | None = None) -> Tensor:
    """Decodes an image file: upright RGB, transparency on white, 16 bit scaled to 8, first frame only.

    Args:
        data: [bytes] uint8; JPEG, PNG or anything Pillow reads.
        smallest_side: Pixels that both sides have to keep: a JPEG is decoded at a half, a quarter or an eighth
            of its size where that leaves as many, which saves most of the work. None: at its size.

    Returns:
        [3, height, width] uint8.

    Raises:
        ValueError: Not an image, cut short, or damaged.
    """
    if smallest_side is None and _decode_jpeg is not None and data[:2].tobytes() == b"\xff\xd8":
        try:
            # The copy is for torch, which wants memory it could write to.
            pixels = _decode_jpeg(torch.from_numpy(data.copy()), apply_exif_orientation=True)
        except RuntimeError as error:
            raise ValueError(f"cannot decode JPEG: {str(error).rpartition(', ')[2]}") from error
        if len(pixels) == 3:
            return pixels
        if len(pixels) == 1:
            return pixels.expand(3, -1, -1)
    try:
        image = Image.open(io.BytesIO(data.tobytes()))
        if smallest_side is not None and image.mode == "RGB":
            image.draft("RGB", (smallest_side, smallest_side))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError("cannot decode image: no known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode image: {error}") from error
    return from_pillow(image)


def from_pillow(image: Image.Image) -> Tensor:
    """A picture as `decode_image` gives that of its file: upright RGB, [3, height, width] uint8."""
    return to_tensor(_to_rgb(_upright(image)))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, height, width] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_picture(pixels: Tensor) -> Image.Image:
    """The inverse of `to_tensor`."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError("cannot decode image: no known format") from error
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return image  # a damaged EXIF block says nothing about the pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")
