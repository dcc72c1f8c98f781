"""Smaller pictures in the shards: less disk and less to decode, at the price of encoding them once more."""

import io
from dataclasses import dataclass, replace

from PIL import Image

from data_tools.images import MIN_SIDE, Picture
from data_tools.options import BadOption

RESIZED = "resized"
DEFAULT_QUALITY = 90
_SPARE = 2  # a JPEG is decoded at the smallest scale of at least this times the size wanted


@dataclass(frozen=True)
class Resize:
    """How pictures are made smaller.

    Attributes:
        short_side: Pixels of the shorter side afterwards; smaller pictures stay as they are.
        quality: Of the JPEG, 1 to 100.
    """

    short_side: int
    quality: int = DEFAULT_QUALITY

    def check(self) -> None:
        """Refuses impossible settings.

        Raises:
            ValueError: The side is shorter than any accepted picture's, or the quality out of range.
        """
        if self.short_side < MIN_SIDE:
            raise BadOption(f"--resize-short-side {self.short_side}: expected at least {MIN_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise BadOption(f"--quality {self.quality}: expected 1 to 100")


def resized(picture: Picture, resize: Resize) -> Picture:
    """The picture with its shorter side cut down to `resize.short_side`, as JPEG; never enlarged.

    Args:
        picture: An accepted picture; one that is small enough is returned as it is.
        resize: The settings.
    """
    scale = resize.short_side / min(picture.width, picture.height)
    if scale >= 1:
        return picture
    size = (
        max(resize.short_side, round(picture.width * scale)),
        max(resize.short_side, round(picture.height * scale)),
    )
    image: Image.Image = Image.open(io.BytesIO(picture.data))
    image.draft("RGB", (_SPARE * size[0], _SPARE * size[1]))
    buffer = io.BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=resize.quality)
    change = f"{picture.change}, {RESIZED}" if picture.change else RESIZED
    return replace(picture, data=buffer.getvalue(), width=size[0], height=size[1], change=change)
