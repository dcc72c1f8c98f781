"""True sentences about a scene, in varied wording, from a small closed set of words.

A caption names some parts of its picture: groups with their count, colour and shape (these always), size and
texture (sometimes), where a group lies, or how two groups lie to each other. A noun phrase with a number
counts all objects of its colour and shape.
"""

from data_tools.synthetic.draw import Draw
from data_tools.synthetic.lexicon import COUNTS, RELATIONS, SHAPES
from data_tools.synthetic.world import GRID, Box, Group, Scene, object_boxes, relation

MIN_WORDS, MAX_WORDS = 5, 16

_INTRODUCTIONS = ("a picture of", "a drawing of", "we see", "here we can see", "the picture shows", "look at")
_ROWS = {0: "top", GRID - 1: "bottom"}
_COLUMNS = {0: "left", GRID - 1: "right"}


def write_captions(scene: Scene, draw: Draw, count: int) -> list[str]:
    """`count` different captions of `MIN_WORDS` to `MAX_WORDS` words, naming as many parts as there are."""
    captions: dict[str, None] = {}
    facts: list[tuple[Group, ...]] = []
    while len(captions) < count:
        if not facts:  # every part has been named: begin again, with other words
            facts = _facts(scene, draw)
        caption = _sentence(facts.pop(), draw)
        if MIN_WORDS <= len(caption.split()) <= MAX_WORDS:
            captions.setdefault(caption)
    return list(captions)


def write_regions(scene: Scene, draw: Draw, image_size: int) -> list[tuple[str, Box]]:
    """Short phrases about parts of the picture, each with its box (x, y, width, height) in pixels.

    One for each object (equal objects may get equal phrases), one for each group.
    """
    regions = []
    for group in scene.groups:
        boxes = object_boxes(group, image_size)
        for box in boxes:
            article = draw.choice(("a ", "", ""))
            regions.append((article + _attributes(group, draw) + group.shape, box))
        if group.count > 1:
            regions.append((noun_phrase(group, draw), _around(boxes)))
        else:
            regions.append((f"the {group.shape} is {group.colour}", boxes[0]))
    return regions


def _facts(scene: Scene, draw: Draw) -> list[tuple[Group, ...]]:
    """What a sentence can be about: one group, an ordered pair, three groups; in random order."""
    groups = draw.sample(scene.groups, len(scene.groups))
    singles: list[tuple[Group, ...]] = [(group,) for group in groups]
    pairs = [(a, b) for a in groups for b in groups if a is not b]
    facts = [*singles, *draw.sample(pairs, min(len(pairs), 3))]
    if len(groups) > 2:
        facts.append(tuple(groups[:3]))
    return draw.sample(facts, len(facts))


def _sentence(fact: tuple[Group, ...], draw: Draw) -> str:
    if len(fact) == 1:
        return draw.choice((_exists, _placed, _placed, _described, _numbered))(fact[0], draw)
    if len(fact) == 2:
        return _related(fact[0], fact[1], draw)
    nouns = [noun_phrase(group, draw, detail=0.1) for group in fact]
    return f"{draw.choice(_INTRODUCTIONS)} {nouns[0]} and {nouns[1]} and {nouns[2]}"


def _attributes(group: Group, draw: Draw, detail: float = 0.3) -> str:
    size = f"{group.size} " if draw.chance(detail) else ""
    texture = f"{group.texture} " if draw.chance(detail) else ""
    return f"{size}{texture}{group.colour} "


def noun_phrase(group: Group, draw: Draw, detail: float = 0.3) -> str:
    """Such as "a large red circle", "one red circle", "two dotted red circles"."""
    attributes = _attributes(group, draw, detail)
    if group.count == 1:
        return draw.choice(("a", "one")) + f" {attributes}{group.shape}"
    return f"{COUNTS[group.count - 1]} {attributes}{SHAPES[group.shape]}"


def _is(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def _named(group: Group) -> str:
    return f"{group.shape if group.count == 1 else SHAPES[group.shape]} {_is(group)}"


def _exists(group: Group, draw: Draw) -> str:
    noun = noun_phrase(group, draw, detail=0.5)
    form = draw.below(3)
    if form == 0:
        return f"{draw.choice(_INTRODUCTIONS)} {noun}"
    if form == 1:
        return f"there {_is(group)} {noun} in the picture"
    return f"the picture has {noun} in it"


def _described(group: Group, draw: Draw) -> str:
    detail = draw.choice((group.size, group.texture))
    if draw.chance(0.5):
        return f"the {_named(group)} {group.colour} and {detail}"
    return f"the {_named(group)} {detail} and {group.colour}"


def _numbered(group: Group, draw: Draw) -> str:
    return f"the number of {group.colour} {SHAPES[group.shape]} is {COUNTS[group.count - 1]}"


def _placed(group: Group, draw: Draw) -> str:
    place = _place(group)
    if place is None:
        return _exists(group, draw)
    noun = noun_phrase(group, draw)
    form = draw.below(3)
    if form == 0:
        return f"{place} there {_is(group)} {noun}"
    if form == 1:
        return f"{noun} {place} of the picture"
    return f"there {_is(group)} {noun} {place}"


def _place(group: Group) -> str | None:
    """Where all objects of a group lie, such as "in the top left corner"; None if there is no word for it."""
    rows = {row for row, _ in group.cells}
    columns = {column for _, column in group.cells}
    row = _ROWS.get(next(iter(rows))) if len(rows) == 1 else None
    column = _COLUMNS.get(next(iter(columns))) if len(columns) == 1 else None
    if row and column:
        return f"in the {row} {column} corner"
    if row:
        return f"at the {row}"
    if column:
        return f"on the {column}"
    if rows == columns == {GRID // 2}:
        return "in the centre"
    return None


def _related(a: Group, b: Group, draw: Draw) -> str:
    words = relation(a, b)
    if not words or draw.chance(0.15):
        return f"{draw.choice(_INTRODUCTIONS)} {noun_phrase(a, draw)} and {noun_phrase(b, draw)}"
    word = draw.choice(words)
    first, second = noun_phrase(a, draw), noun_phrase(b, draw)
    sideways = word in RELATIONS[:2]
    form = draw.below(3)
    if form == 0:
        between = f"to the {word} of" if sideways else word
        return f"{first} {between} {second}"
    if form == 1:
        between = f"{word} of" if sideways else word
        return f"{first} {_is(a)} {between} {second}"
    start = f"{word} of" if sideways else word
    return f"{start} {second} there {_is(a)} {first}"


def _around(boxes: list[Box]) -> Box:
    """The smallest box around boxes."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top
