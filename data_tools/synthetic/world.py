"""Scenes: which groups of objects there are and where, and their picture.

A scene lies on a grid of 3 x 3 cells. One to four groups of one to four equal objects share it, groups of
different colour and shape. The grid is cut by straight lines until each group has a part of its own, so that
groups lie left of, right of, above or below each other. All arithmetic is in integers: the same scene is the
same picture on every platform.
"""

import dataclasses
import functools

import numpy as np

from data_tools.synthetic.draw import Draw
from data_tools.synthetic.lexicon import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES

GRID = 3
NUM_GROUPS = (1,) * 3 + (2,) * 4 + (3,) * 2 + (4,)
"""Numbers of groups, as often as they are to be drawn."""

OBJECTS = (1,) * 5 + (2,) * 4 + (3,) * 4 + (4,) * 5
"""Numbers of objects in a group, likewise; many objects fit less often, so four is drawn more often."""

SIDE_OF_64 = {"small": 14, "large": 20}
"""Side of an object's box in 64ths of the picture's side."""

MIN_IMAGE_SIZE = 32
_SUPERSAMPLE = 4

Cell = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal objects.

    Attributes:
        cells: (row, column) of each object in the grid.
        jitter: (down, right) of each object inside its cell, in 256ths of the free room.
    """

    colour: str
    shape: str
    size: str
    texture: str
    cells: tuple[Cell, ...]
    jitter: tuple[Cell, ...]

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.cells)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything a picture shows; `background` indexes `BACKGROUNDS`."""

    groups: tuple[Group, ...]
    background: int


def sample_scene(draw: Draw) -> Scene:
    """Draws a scene; every attribute is independent of every other as far as all fit on the grid."""
    num_groups = draw.choice(NUM_GROUPS)
    colours = draw.sample(list(COLOURS), num_groups)
    shapes = draw.sample(list(SHAPES), num_groups)
    cells = None
    while cells is None:
        counts = [draw.choice(OBJECTS) for _ in range(num_groups)]
        cells = _place(counts, (0, 0, GRID, GRID), draw)
    groups = tuple(
        Group(
            colour,
            shape,
            draw.choice(SIZES),
            draw.choice(TEXTURES),
            tuple(own),
            tuple((draw.below(256), draw.below(256)) for _ in own),
        )
        for colour, shape, own in zip(colours, shapes, cells, strict=True)
    )
    return Scene(groups, draw.below(len(BACKGROUNDS)))


def _place(counts: list[int], part: Box, draw: Draw) -> list[list[Cell]] | None:
    """Cells for each group inside `part` = (top, left, bottom, right) of the grid, or None if too tight."""
    top, left, bottom, right = part
    cells = [(row, column) for row in range(top, bottom) for column in range(left, right)]
    if sum(counts) > len(cells):
        return None
    if len(counts) == 1:
        return [draw.sample(cells, counts[0])]
    middle = len(counts) // 2
    cuts = [((top, left, y, right), (y, left, bottom, right)) for y in range(top + 1, bottom)]
    cuts += [((top, left, bottom, x), (top, x, bottom, right)) for x in range(left + 1, right)]
    for first, second in draw.sample(cuts, len(cuts)):
        one = _place(counts[:middle], first, draw)
        two = _place(counts[middle:], second, draw) if one is not None else None
        if one is not None and two is not None:
            return one + two
    return None


def relation(a: Group, b: Group) -> list[str]:
    """Where `a` lies, seen from `b`: those of left, right, above and below that hold for every object."""
    rows_a, columns_a = zip(*a.cells, strict=True)
    rows_b, columns_b = zip(*b.cells, strict=True)
    holds = {
        "left": max(columns_a) < min(columns_b),
        "right": min(columns_a) > max(columns_b),
        "above": max(rows_a) < min(rows_b),
        "below": min(rows_a) > max(rows_b),
    }
    return [word for word, true in holds.items() if true]


def object_boxes(group: Group, image_size: int) -> list[Box]:
    """(x, y, width, height) in pixels of each object of a group."""
    side = image_size * SIDE_OF_64[group.size] // 64
    boxes = []
    for (row, column), (down, right) in zip(group.cells, group.jitter, strict=True):
        y, x = row * image_size // GRID, column * image_size // GRID
        room_y = (row + 1) * image_size // GRID - y - side
        room_x = (column + 1) * image_size // GRID - x - side
        boxes.append((x + right * (room_x + 1) // 256, y + down * (room_y + 1) // 256, side, side))
    return boxes


def render(scene: Scene, image_size: int) -> np.ndarray:
    """The picture of a scene: uint8 `[image_size, image_size, 3]`, RGB."""
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image size {image_size}: the world's shapes need at least {MIN_IMAGE_SIZE} pixels")
    picture = np.empty((image_size, image_size, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for group in scene.groups:
        boxes = object_boxes(group, image_size)
        alpha, colour = _stamp(group.colour, group.shape, group.texture, boxes[0][2])
        for x, y, width, height in boxes:
            part = picture[y : y + height, x : x + width]
            part[:] = (part * (256 - alpha) + colour * alpha) >> 8
    return picture


@functools.cache
def _stamp(colour: str, shape: str, texture: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage [side, side, 1] in 256ths and colour [side, side, 3] of one object, both int32."""
    fine = _shape_mask(shape, side * _SUPERSAMPLE)
    blocks = fine.reshape(side, _SUPERSAMPLE, side, _SUPERSAMPLE)
    alpha = blocks.sum(axis=(1, 3), dtype=np.int32) * (256 // _SUPERSAMPLE**2)
    full = np.array(COLOURS[colour], np.int32)
    light = (full + 255) // 2
    pattern = _texture(texture, side)[..., None]
    return alpha[..., None], np.where(pattern, light, full)


def _shape_mask(shape: str, n: int) -> np.ndarray:
    """Bool [n, n]: which points of the box belong to the shape. Coordinates run from -n to n."""
    line = 2 * np.arange(n, dtype=np.int64) + 1 - n
    v, u = line[:, None], line[None, :]
    radius2 = u * u + v * v
    if shape == "circle":
        return radius2 <= n * n
    if shape == "square":
        return np.maximum(abs(u), abs(v)) * 10 <= 9 * n
    if shape == "triangle":
        return (2 * abs(u) <= v + n) & (10 * v <= 9 * n)
    if shape == "diamond":
        return abs(u) + abs(v) <= n
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) * 3 <= n) & (np.maximum(abs(u), abs(v)) <= n)
    if shape == "ring":
        return (radius2 <= n * n) & (4 * radius2 >= n * n)
    if shape == "star":  # inside at least four of the five lines of a pentagram, a little fatter than true
        normals = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
        inside = sum((x * u + y * v <= 400 * n).astype(np.int64) for x, y in normals)
        return (inside >= 4) & (radius2 <= n * n)
    if shape == "moon":
        return (radius2 <= n * n) & ((5 * u - 3 * n) ** 2 + (5 * v) ** 2 > 16 * n * n)
    raise ValueError(f"shape {shape!r}: expected one of {list(SHAPES)}")


def _texture(texture: str, side: int) -> np.ndarray:
    """Bool [side, side]: where the texture is light."""
    bands = 7 if texture == "dotted" else 5  # over the object, whatever its size
    line = np.arange(side) * bands // side % 2
    y, x = line[:, None], line[None, :]
    if texture == "plain":
        return np.zeros((side, side), bool)
    if texture == "striped":
        return np.broadcast_to(y == 1, (side, side))
    if texture == "dotted":
        return (y == 1) & (x == 1)
    if texture == "checkered":
        return (y + x) == 1
    raise ValueError(f"texture {texture!r}: expected one of {list(TEXTURES)}")
