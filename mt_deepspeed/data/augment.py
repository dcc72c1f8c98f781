"""Random image operations: RandAugment (arXiv 1909.13719) in the two forms of the published code."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]
Operation = Callable[[Image.Image, float], Image.Image]

_BLACK, _GREY = (0, 0, 0), (128, 128, 128)
_NEAREST, _BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR


def rand_augment(level: int, count: int = 2) -> Augment:
    """RandAugment as UDA has it (arXiv 1904.12848): every drawn operation is applied.

    Args:
        level: Strength from 0 to 30.
        count: Operations per picture, drawn with replacement.
    """
    share = level / 30
    operations: list[tuple[Operation, float, bool]] = [
        (lambda image, _: ImageOps.autocontrast(image), 0, False),
        (lambda image, _: ImageOps.equalize(image), 0, False),
        (lambda image, value: _rotate(image, value, _NEAREST, _BLACK), 30 * share, True),
        (lambda image, value: ImageOps.posterize(image, max(1, int(value))), 4 * share, False),
        (lambda image, value: ImageOps.solarize(image, int(np.ceil(value))), 256 * share, False),
        (_solarize_add, 110 * share, False),
        *((operation, 0.1 + 1.8 * share, False) for operation in _ENHANCE.values()),
        *((operation, 0.3 * share, True) for operation in _shears(_NEAREST, _BLACK)),
        *((operation, 100 * share, True) for operation in _shifts(_NEAREST, _BLACK)),
    ]
    return _several(operations, count, chance=1.0)


def random_augment(level: int, colours: bool, count: int = 2) -> Augment:
    """RandomAugment as BLIP has it (arXiv 2201.12086): every drawn operation is applied half of the time.

    Args:
        level: Strength from 0 to 10.
        colours: Draw from solarize, colour, contrast and posterize as well.
        count: Operations per picture, drawn with replacement.
    """
    share = level / 10
    enhance = 0.1 + 1.8 * share
    operations: list[tuple[Operation, float, bool]] = [
        (lambda image, _: image, 0, False),
        (lambda image, _: ImageOps.autocontrast(image), 0, False),
        (_ENHANCE["brightness"], enhance, False),
        (_ENHANCE["sharpness"], enhance, False),
        (lambda image, _: ImageOps.equalize(image), 0, False),
        *((operation, 0.3 * share, True) for operation in _shears(_BILINEAR, _GREY)),
        *((operation, 10 * share, True) for operation in _shifts(_BILINEAR, _GREY)),
        (lambda image, value: _rotate(image, value, _BILINEAR, _GREY), 30 * share, True),
    ]
    if colours:
        operations += [
            (lambda image, value: ImageOps.solarize(image, int(value)), int(256 * share), False),
            (_ENHANCE["colour"], enhance, False),
            (_ENHANCE["contrast"], enhance, False),
            (lambda image, value: ImageOps.posterize(image, int(value)), int(4 * share), False),
        ]
    return _several(operations, count, chance=0.5)


def _several(operations: Sequence[tuple[Operation, float, bool]], count: int, chance: float) -> Augment:
    """Draws `count` of the (operation, value, value takes a random sign)."""

    def augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        for number in generator.integers(len(operations), size=count):
            applied, negative = generator.random(2) < (chance, 0.5)
            operation, value, signed = operations[number]
            if applied:
                image = operation(image, -value if signed and negative else value)
        return image

    return augment


_ENHANCE: dict[str, Operation] = {
    "colour": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    "brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
}


def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    brighter = image.point(lambda level: min(255, level + int(value)))
    return ImageOps.solarize(brighter, 128)


def _rotate(image: Image.Image, degrees: float, how: Image.Resampling, fill: tuple[int, ...]) -> Image.Image:
    return image.rotate(degrees, how, fillcolor=fill)


def _shears(how: Image.Resampling, fill: tuple[int, ...]) -> tuple[Operation, Operation]:
    return (
        lambda image, value: _warp(image, (1, value, 0, 0, 1, 0), how, fill),
        lambda image, value: _warp(image, (1, 0, 0, value, 1, 0), how, fill),
    )


def _shifts(how: Image.Resampling, fill: tuple[int, ...]) -> tuple[Operation, Operation]:
    return (
        lambda image, value: _warp(image, (1, 0, value, 0, 1, 0), how, fill),
        lambda image, value: _warp(image, (1, 0, 0, 0, 1, value), how, fill),
    )


def _warp(
    image: Image.Image, matrix: tuple[float, ...], how: Image.Resampling, fill: tuple[int, ...]
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=fill)
