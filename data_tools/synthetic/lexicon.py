"""The words of the procedural world.

No colour, shape, size or texture starts with a vowel, so that "a" gives nothing away, and each is one word.
"""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30),
    "green": (30, 150, 40),
    "blue": (25, 60, 225),
    "yellow": (240, 200, 0),
    "purple": (140, 25, 180),
    "cyan": (0, 190, 215),
    "pink": (255, 120, 190),
    "black": (15, 15, 15),
}
SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "diamond": "diamonds",
    "cross": "crosses",
    "ring": "rings",
    "star": "stars",
    "moon": "moons",
}
"""Singular -> plural."""

SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
COUNTS = ("one", "two", "three", "four")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

BACKGROUNDS = (
    (250, 250, 250),
    (226, 226, 226),
    (240, 230, 212),
    (214, 230, 242),
    (220, 240, 220),
    (242, 222, 236),
)


def visual_words() -> dict[str, list[str]]:
    """The words that only the picture decides, by kind, as they stand in captions."""
    return {
        "colour": list(COLOURS),
        "shape": [*SHAPES, *SHAPES.values()],
        "count": list(COUNTS),
        "relation": list(RELATIONS),
    }
