"""Questions, statements and sentence pairs about scenes, with their true answers.

Yes and no are drawn equally often, colours, shapes and counts as the scenes have them, and statements of every
form are as often true as false, so that a text alone says little about its answer. Of the three relations of
sentences the form of a text tells two apart at most: blind to the picture, two in three can be right.
"""

import dataclasses
from collections.abc import Callable

from data_tools.synthetic.captions import write_captions
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.lexicon import COLOURS, COUNTS, OPPOSITE, SHAPES, SIZES, TEXTURES
from data_tools.synthetic.world import Group, Scene, relation

NUM_PEOPLE = 10
_SURE = (10, 10, 9, 9, 8, 7, 6)  # how many of ten people give the true answer


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its true answer, and the answers people could mistake it for."""

    text: str
    answer: str
    others: tuple[str, ...]


def ask(scene: Scene, draw: Draw, count: int) -> list[Question]:
    """`count` different questions about a scene (fewer if it has no more to ask)."""
    kinds: tuple[Callable[[Scene, Draw], Question | None], ...] = (
        _colour,
        _shape,
        _number,
        _texture,
        _there,
        _place,
    )
    found: dict[str, Question] = {}
    for _ in range(8 * count):
        question = draw.choice(kinds)(scene, draw)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


def answer_as_people(question: Question, draw: Draw) -> list[str]:
    """Ten answers; the true one is always the most frequent."""
    sure = draw.choice(_SURE)
    wrong = [draw.choice(question.others) for _ in range(NUM_PEOPLE - sure)]
    return draw.sample([question.answer] * sure + wrong, NUM_PEOPLE)


def _question(text: str, answer: str, answers: tuple[str, ...]) -> Question:
    return Question(text, answer, tuple(other for other in answers if other != answer))


def _are(group: Group) -> str:
    return f"is the {group.shape}" if group.count == 1 else f"are the {SHAPES[group.shape]}"


def _colour(scene: Scene, draw: Draw) -> Question:
    group = draw.choice(scene.groups)
    return _question(f"What color {_are(group)}?", group.colour, tuple(COLOURS))


def _shape(scene: Scene, draw: Draw) -> Question:
    group = draw.choice(scene.groups)
    return _question(f"What shape is {group.colour}?", group.shape, tuple(SHAPES))


def _number(scene: Scene, draw: Draw) -> Question:
    group = draw.choice(scene.groups)
    numbers = tuple(str(number + 1) for number in range(len(COUNTS)))
    return _question(f"How many {group.colour} {SHAPES[group.shape]} are there?", str(group.count), numbers)


def _texture(scene: Scene, draw: Draw) -> Question:
    group = draw.choice(scene.groups)
    if draw.chance(0.5):
        return _question(
            f"What is the pattern of the {group.colour} {SHAPES[group.shape]}?", group.texture, TEXTURES
        )
    return _question(f"What size {_are(group)}?", group.size, SIZES)


def _there(scene: Scene, draw: Draw) -> Question:
    group = draw.choice(scene.groups)
    true = draw.chance(0.5)
    colour = group.colour if true else _another(tuple(COLOURS), group.colour, draw)
    return _question(f"Is there a {colour} {group.shape}?", "yes" if true else "no", ("yes", "no"))


def _place(scene: Scene, draw: Draw) -> Question | None:
    if len(scene.groups) < 2:
        return None
    a, b = draw.sample(scene.groups, 2)
    words = relation(a, b)
    if not words:
        return None
    word = draw.choice(words)
    true = draw.chance(0.5)
    said = word if true else OPPOSITE[word]
    side = f"{said} of" if said in ("left", "right") else said
    answer = "yes" if true else "no"
    return _question(
        f"{_are(a).capitalize()} {side} the {b.colour} {SHAPES[b.shape]}?", answer, ("yes", "no")
    )


def _another(words: tuple[str, ...], word: str, draw: Draw) -> str:
    return draw.choice([other for other in words if other != word])


# Statements about two pictures, in the words of captions.


def state(left: Scene, right: Scene, draw: Draw, count: int) -> list[tuple[str, bool]]:
    """`count` different statements about a pair of pictures and whether they are true.

    A form is used where the pair allows both a true and a false statement of it, one of which is drawn.
    """
    found: dict[str, bool] = {}
    while len(found) < count:
        form = draw.choice((_side, _colour_of_side, _both, _one))
        statements: dict[bool, str] = {}
        for _ in range(8):
            text, true = form(left, right, draw)
            statements.setdefault(true, text)
        if len(statements) == 2:
            true = draw.chance(0.5)
            found.setdefault(statements[true], true)
    return list(found.items())


def _holds(scene: Scene, colour: str, shape: str, count: int) -> bool:
    return any((g.colour, g.shape, g.count) == (colour, shape, count) for g in scene.groups)


def _side(left: Scene, right: Scene, draw: Draw) -> tuple[str, bool]:
    side, scene = draw.choice((("left", left), ("right", right)))
    group = draw.choice(draw.choice((left, right)).groups)
    number = COUNTS[group.count - 1]
    shape = group.shape if group.count == 1 else SHAPES[group.shape]
    text = f"the {side} picture has {number} {group.colour} {shape} in it"
    return text, _holds(scene, group.colour, group.shape, group.count)


def _colour_of_side(left: Scene, right: Scene, draw: Draw) -> tuple[str, bool]:
    side, scene = draw.choice((("left", left), ("right", right)))
    colour = draw.choice(draw.choice((left, right)).groups).colour
    return f"there is something {colour} in the {side} picture", any(g.colour == colour for g in scene.groups)


def _both(left: Scene, right: Scene, draw: Draw) -> tuple[str, bool]:
    group = draw.choice(draw.choice((left, right)).groups)
    if draw.chance(0.5):
        true = all(any(g.colour == group.colour for g in scene.groups) for scene in (left, right))
        return f"there is something {group.colour} in both pictures", true
    true = all(any(g.shape == group.shape for g in scene.groups) for scene in (left, right))
    return f"there are {SHAPES[group.shape]} in both pictures", true


def _one(left: Scene, right: Scene, draw: Draw) -> tuple[str, bool]:
    group = draw.choice(draw.choice((left, right)).groups)
    colour = draw.choice((group.colour, _another(tuple(COLOURS), group.colour, draw)))
    true = any(any((g.colour, g.shape) == (colour, group.shape) for g in s.groups) for s in (left, right))
    return f"at least one of the pictures has a {colour} {group.shape} in it", true


# Sentence pairs: what a picture entails, contradicts, or leaves open.

_OPEN = (
    "someone likes the {} best",
    "the {} was drawn in the morning",
    "a child has painted the {}",
    "the {} will be moved soon",
)


def relate(scene: Scene, draw: Draw) -> list[tuple[str, str, str]]:
    """(premise, hypothesis, label), one of each label.

    A hypothesis describes a group, or says of it what no picture shows. Of a group that is there the former is
    entailed and the latter open; of one that is not, here of another colour, either is a contradiction.
    """
    (premise,) = write_captions(scene, draw, 1)
    group = draw.choice(scene.groups)
    false = dataclasses.replace(group, colour=_another(tuple(COLOURS), group.colour, draw))
    return [
        (premise, _described(group, draw), "entailment"),
        (premise, draw.choice((_described, _open))(false, draw), "contradiction"),
        (premise, _open(group, draw), "neutral"),
    ]


def _described(group: Group, draw: Draw) -> str:
    return write_captions(Scene((group,), background=0), draw, 1)[0]


def _open(group: Group, draw: Draw) -> str:
    shape = group.shape if group.count == 1 else SHAPES[group.shape]
    return draw.choice(_OPEN).format(f"{group.colour} {shape}")
