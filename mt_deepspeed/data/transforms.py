"""Image transforms by name: how a picture becomes [3, S, S] pixels, in training and in evaluation.

| name | what it does |
|---|---|
| clip | short side to S, centre crop |
| clip_randaug | RandAugment(2, level 9) on the whole picture, then as clip |
| albef, blip | to S x S, aspect ratio not kept |
| albef_randaug | random resized crop (area 0.5 to 1), flip, RandomAugment(2, level 7) |
| ..._wc | with colour operations as well |
| ..._wohf | without flip (for texts that speak of left and right) |
| ..._pretrain | crop area from 0.2 |
| blip_... | as albef_... with level 5, where the enhancing operations change nothing |

All resizing is bicubic with antialiasing, and all randomness comes from the generator of the call. Names and
numbers are those of the published code.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mt_deepspeed.data.augment import Augment, rand_augment, random_augment
from mt_deepspeed.data.images import to_picture, to_tensor

CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Recipe:
    """One row of the table above.

    Attributes:
        keep_aspect: Resize the short side and cut the centre out, or resize both sides.
        crop_area: Share of the picture's area that a random crop takes, from and to; None: the whole picture.
        flip: Mirror left and right every other time.
        augment: Further random changes.
    """

    keep_aspect: bool = False
    crop_area: tuple[float, float] | None = None
    flip: bool = False
    augment: Augment | None = None

    def smallest_side(self, size: int) -> int | None:
        """Pixels per side of the whole picture that still give every crop `size` of its own; None: all of them.

        What changes whole pictures by a number of pixels must see them at their size.
        """
        if self.crop_area is None:
            return size if self.augment is None else None
        return math.ceil(size / math.sqrt(self.crop_area[0] * CROP_RATIO[0]))

    @property
    def random(self) -> bool:
        """Whether the result depends on the generator."""
        return self.crop_area is not None or self.flip or self.augment is not None


def _crops(name: str, level: int) -> dict[str, Recipe]:
    shapes, with_colours = random_augment(level, colours=False), random_augment(level, colours=True)
    return {
        f"{name}_randaug": Recipe(crop_area=(0.5, 1.0), flip=True, augment=shapes),
        f"{name}_randaug_wc": Recipe(crop_area=(0.5, 1.0), flip=True, augment=with_colours),
        f"{name}_randaug_wohf": Recipe(crop_area=(0.5, 1.0), augment=shapes),
        f"{name}_randaug_pretrain": Recipe(crop_area=(0.2, 1.0), flip=True, augment=shapes),
    }


RECIPES: dict[str, Recipe] = {
    "clip": Recipe(keep_aspect=True),
    "clip_randaug": Recipe(keep_aspect=True, augment=rand_augment(level=9)),
    "albef": Recipe(),
    "blip": Recipe(),
    **_crops("albef", 7),
    **_crops("blip", 5),
}


class ImageTransform:
    """Brings decoded pictures to S x S.

    Args:
        name: Key of `RECIPES`.
        size: S, pixels per side.
        train: False refuses names whose result is random.

    Attributes:
        smallest_side: Pixels per side that pictures have to be decoded with, at least; None: at their size.
            In evaluation always None.

    Raises:
        ValueError: No such transform here; the message lists those there are.
    """

    def __init__(self, name: str, size: int, train: bool) -> None:
        names = sorted(key for key, recipe in RECIPES.items() if train or not recipe.random)
        if name not in names:
            kind = "train" if train else "eval"
            raise ValueError(f"data.{kind}_transform {name!r}: choose one of {', '.join(names)}")
        self.name, self.size = name, size
        self.smallest_side = RECIPES[name].smallest_side(size) if train else None

    def __call__(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        """[3, height, width] uint8 -> [3, S, S] uint8."""
        recipe = RECIPES[self.name]
        if recipe.crop_area is None:
            if recipe.augment is not None:
                pixels = _augmented(pixels, recipe.augment, generator)
            return (
                _short_side(pixels, self.size)
                if recipe.keep_aspect
                else _resize(pixels, self.size, self.size)
            )
        top, left, height, width = crop_box(pixels.shape[1], pixels.shape[2], recipe.crop_area, generator)
        pixels = _resize(pixels[:, top : top + height, left : left + width], self.size, self.size)
        if recipe.flip and generator.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels if recipe.augment is None else _augmented(pixels, recipe.augment, generator)


def crop_box(
    height: int, width: int, area: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop (Inception, arXiv 1409.4842).

    The area is uniform in `area`, the ratio of the sides log-uniform in `CROP_RATIO`; after ten draws that do
    not fit, the largest centre crop with an allowed ratio.
    """
    for _ in range(10):
        pixels = height * width * generator.uniform(*area)
        ratio = math.exp(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        crop_width, crop_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * CROP_RATIO[1])))
    crop_height = min(height, max(1, round(width / CROP_RATIO[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _augmented(pixels: Tensor, augment: Augment, generator: np.random.Generator) -> Tensor:
    return to_tensor(augment(to_picture(pixels), generator))


def _short_side(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[1:]
    if height <= width:
        pixels = _resize(pixels, size, int(size * width / height))
    else:
        pixels = _resize(pixels, int(size * height / width), size)
    return functional.center_crop(pixels, [size, size])


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    return functional.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
