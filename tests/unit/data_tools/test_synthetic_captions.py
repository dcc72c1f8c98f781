"""Every caption is read back against its scene by a small parser that shares no code with the writer."""

import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.synthetic.captions import MAX_WORDS, MIN_WORDS, write_captions, write_regions
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.generate import scene_of
from data_tools.synthetic.lexicon import COLOURS, SHAPES, SIZES, TEXTURES, visual_words
from data_tools.synthetic.world import Group, Scene, object_boxes

NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SINGULAR = {**{word: word for word in SHAPES}, **{many: one for one, many in SHAPES.items()}}
NOUN = re.compile(
    rf"(?P<number>a|one|two|three|four) ((?P<size>{'|'.join(SIZES)}) )?((?P<texture>{'|'.join(TEXTURES)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(sorted(SINGULAR, key=len, reverse=True))})\b"
)


def group_of(scene: Scene, found: dict[str, str | None]) -> Group:
    """The one group of the scene that a noun phrase names; fails if it tells anything untrue."""
    shape = SINGULAR[str(found["shape"])]
    (group,) = [g for g in scene.groups if g.shape == shape]
    for field in ("size", "texture", "colour"):
        assert found.get(field) in (None, getattr(group, field))
    if found.get("number") is not None:
        assert NUMBERS[str(found["number"])] == group.count
        assert (found["shape"] == shape) == (group.count == 1), "singular or plural"
    return group


def boxes_hold(word: str, a: Group, b: Group) -> bool:
    """Whether `a` is left of / right of / above / below `b`, by the pixels of their objects."""
    axis = 0 if word in ("left", "right") else 1
    first, second = (a, b) if word in ("left", "above") else (b, a)
    ends = [box[axis] + box[2] for box in object_boxes(first, 64)]
    starts = [box[axis] for box in object_boxes(second, 64)]
    return max(ends) <= min(starts)


def check_place(text: str, group: Group) -> None:
    boxes = object_boxes(group, 64)
    middles = [(x + w / 2, y + h / 2) for x, y, w, h in boxes]
    for word, axis, low, high in (
        ("left", 0, 0, 22),
        ("right", 0, 42, 64),
        ("top", 1, 0, 22),
        ("bottom", 1, 42, 64),
    ):
        if word in text.split():
            assert all(low <= middle[axis] <= high for middle in middles), text
    if "centre" in text.split():
        assert all(22 <= x <= 42 and 22 <= y <= 42 for x, y in middles)


def check_caption(caption: str, scene: Scene) -> None:
    described = re.fullmatch(r"the (\w+) (is|are) (\w+)( and (\w+))?", caption)
    numbered = re.fullmatch(r"the number of (\w+) (\w+) is (\w+)", caption)
    if described:
        group = group_of(scene, {"shape": described[1]})
        assert (described[1] in SHAPES) == (group.count == 1) == (described[2] == "is")
        words = {described[3], described[5]} - {None}
        assert words <= {group.colour, group.size, group.texture}
        return
    if numbered:
        group = group_of(scene, {"colour": numbered[1], "shape": numbered[2]})
        assert NUMBERS[numbered[3]] == group.count
        return
    found = list(NOUN.finditer(caption))
    assert found, f"nothing is said in {caption!r}"
    groups = [group_of(scene, match.groupdict()) for match in found]
    rest = NOUN.sub("N", caption)
    relation = re.fullmatch(r"N ((is|are) )?(to the )?(left|right|above|below)( of)? N", rest)
    turned = re.fullmatch(r"(left|right|above|below)( of)? N there (is|are) N", rest)
    if relation:
        assert boxes_hold(relation[4], groups[0], groups[1])
    elif turned:
        assert boxes_hold(turned[1], groups[1], groups[0])
    elif len(groups) == 1:
        check_place(rest, groups[0])
    else:
        assert re.fullmatch(r"[a-z ]+ N( and N)+", rest), rest
        assert not {"left", "right", "above", "below", "top", "bottom"} & set(rest.split())
    assert len({id(group) for group in groups}) == len(groups)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40), count=st.integers(1, 6))
def test_captions_are_true_short_and_different(seed: int, index: int, count: int) -> None:
    scene = scene_of("coco", seed, index)
    captions = write_captions(scene, Draw("text", seed, index), count)
    assert len(captions) == len(set(captions)) == count
    for caption in captions:
        check_caption(caption, scene)
        assert MIN_WORDS <= len(caption.split()) <= MAX_WORDS


@settings(max_examples=100, deadline=None)
@given(index=st.integers(0, 2**40))
def test_region_phrases_are_true_of_their_boxes(index: int) -> None:
    scene = scene_of("vg", 0, index)
    regions = write_regions(scene, Draw(index), 64)
    assert len(regions) == sum(group.count + 1 for group in scene.groups)
    for phrase, (x, y, width, height) in regions:
        assert x >= 0
        assert y >= 0
        assert x + width <= 64
        assert y + height <= 64
        single = re.fullmatch(r"(a )?((small|large) )?((\w+) )?(\w+) (\w+)", phrase)
        if NOUN.fullmatch(phrase) and not phrase.startswith("a "):
            group = group_of(scene, NOUN.fullmatch(phrase).groupdict())  # type: ignore[union-attr]
            inside = object_boxes(group, 64)
            assert all(x <= u and y <= v and u + w <= x + width for u, v, w, _ in inside)
        elif phrase.startswith("the "):
            check_caption(phrase, scene)
        else:
            assert single is not None
            found = {"size": single[3], "texture": single[5], "colour": single[6], "shape": single[7]}
            assert (x, y, width, height) in object_boxes(group_of(scene, found), 64)


def test_the_parser_notices_a_lie() -> None:
    scene = scene_of("coco", 0, 0)
    group = scene.groups[0]
    wrong = next(colour for colour in COLOURS if colour != group.colour)
    with pytest.raises(AssertionError):
        check_caption(f"the number of {wrong} {SHAPES[group.shape]} is one", scene)


def corpus() -> list[list[str]]:
    scenes = [(index, scene_of("coco", 3, index)) for index in range(3000)]
    return [c.split() for index, scene in scenes for c in write_captions(scene, Draw("text", index), 5)]


def test_words_are_few_and_balanced_and_text_alone_does_not_give_them_away() -> None:
    captions = corpus()
    counts = Counter(word for caption in captions for word in caption)
    assert len(counts) < 120
    words = visual_words()
    listed = [word for kind in words.values() for word in kind]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(counts), "every visual word is used"
    for kind, most in (("colour", 1.25), ("count", 1.6)):
        uses = [counts[word] for word in words[kind]]
        assert max(uses) < most * min(uses), kind
    for forms in (list(SHAPES), list(SHAPES.values())):
        uses = [counts[word] for word in forms]
        assert max(uses) < 1.35 * min(uses)
    # The best guess from the two words on each side, learnt on one half, tried on the other.
    middle = len(captions) // 2
    accuracy = guess_from_neighbours(captions[:middle], captions[middle:], words)
    assert accuracy["colour"] < 0.17
    assert accuracy["shape"] < 0.20
    assert accuracy["count"] < 0.45
    assert accuracy["relation"] < 0.65


def guess_from_neighbours(
    train: list[list[str]], test: list[list[str]], words: dict[str, list[str]]
) -> dict[str, float]:
    kind_of = {word: kind for kind, members in words.items() for word in members}

    def contexts(caption: list[str]) -> list[tuple[str, list[tuple[str, ...]]]]:
        padded = ["^", "^", *caption, "$", "$"]
        found = []
        for i, word in enumerate(caption, 2):
            if word in kind_of:
                near = (padded[i - 1], padded[i + 1])
                found.append((word, [(padded[i - 2], *near, padded[i + 2]), near, near[:1], near[1:], ()]))
        return found

    seen: dict[tuple[int, tuple[str, ...]], Counter[str]] = defaultdict(Counter)
    for caption in train:
        for word, keys in contexts(caption):
            for level, key in enumerate(keys):
                seen[level, key][word] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for caption in test:
        for word, keys in contexts(caption):
            known = next(seen[i, k] for i, k in enumerate(keys) if sum(seen[i, k].values()) >= 20)
            total[kind_of[word]] += 1
            right[kind_of[word]] += known.most_common(1)[0][0] == word
    return {kind: right[kind] / total[kind] for kind in total}
