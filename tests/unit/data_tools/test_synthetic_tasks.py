"""Questions, statements and entailment are read back against their scenes; every layout converts."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import peek
from data_tools.cli import main
from data_tools.shard_format import SplitInfo, read_manifest
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.generate import scene_of
from data_tools.synthetic.layouts import LAYOUTS
from data_tools.synthetic.lexicon import COLOURS, COUNTS, SHAPES
from data_tools.synthetic.questions import NUM_PEOPLE, answer_as_people, ask, relate, state
from data_tools.synthetic.world import Group, Scene, object_boxes

SINGULAR = {**{one: one for one in SHAPES}, **{many: one for one, many in SHAPES.items()}}
SEEDS = st.integers(0, 2**40)


def groups(scene: Scene, **wanted: object) -> list[Group]:
    return [g for g in scene.groups if all(getattr(g, name) == value for name, value in wanted.items())]


def only(scene: Scene, word: str) -> Group:
    (group,) = groups(scene, shape=SINGULAR[word])
    return group


def lies(word: str, a: Group, b: Group) -> bool:
    axis = 0 if word in ("left", "right") else 1
    first, second = (a, b) if word in ("left", "above") else (b, a)
    last = max(box[axis] + box[2] for box in object_boxes(first, 64))
    return last <= min(box[axis] for box in object_boxes(second, 64))


def true_answer(question: str, scene: Scene) -> str:
    if match := re.fullmatch(r"What (color|size) (is|are) the (\w+)\?", question):
        group = only(scene, match[3])
        return group.colour if match[1] == "color" else group.size
    if match := re.fullmatch(r"What shape is (\w+)\?", question):
        return groups(scene, colour=match[1])[0].shape
    if match := re.fullmatch(r"How many (\w+) (\w+) are there\?", question):
        return str(sum(g.count for g in groups(scene, colour=match[1], shape=SINGULAR[match[2]])))
    if match := re.fullmatch(r"What is the pattern of the (\w+) (\w+)\?", question):
        return groups(scene, colour=match[1], shape=SINGULAR[match[2]])[0].texture
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        return "yes" if groups(scene, colour=match[1], shape=match[2]) else "no"
    match = re.fullmatch(r"(Is|Are) the (\w+) (left|right|above|below)( of)? the (\w+) (\w+)\?", question)
    assert match is not None, question
    (other,) = groups(scene, colour=match[5], shape=SINGULAR[match[6]])
    return "yes" if lies(match[3], only(scene, match[2]), other) else "no"


@settings(max_examples=150, deadline=None)
@given(number=SEEDS)
def test_questions_have_their_answers(number: int) -> None:
    scene = scene_of("vqav2", 0, number)
    questions = ask(scene, Draw(number), 5)
    assert len({question.text for question in questions}) == len(questions) == 5
    for question in questions:
        assert question.answer == true_answer(question.text, scene), question.text
        assert question.answer not in question.others
        people = Counter(answer_as_people(question, Draw(number, question.text)))
        assert people.total() == NUM_PEOPLE
        assert people.most_common(1)[0][0] == question.answer
        assert set(people) <= {question.answer, *question.others}


def truth(statement: str, left: Scene, right: Scene) -> bool:
    side = {"left": left, "right": right}
    if match := re.fullmatch(r"the (left|right) picture has (\w+) (\w+) (\w+) in it", statement):
        found = groups(side[match[1]], colour=match[3], shape=SINGULAR[match[4]])
        assert (match[4] in SHAPES) == (match[2] == "one")
        return sum(g.count for g in found) == COUNTS.index(match[2]) + 1
    if match := re.fullmatch(r"there is something (\w+) in the (left|right) picture", statement):
        return bool(groups(side[match[2]], colour=match[1]))
    if match := re.fullmatch(r"there is something (\w+) in both pictures", statement):
        return all(groups(scene, colour=match[1]) for scene in side.values())
    if match := re.fullmatch(r"there are (\w+) in both pictures", statement):
        return all(groups(scene, shape=SINGULAR[match[1]]) for scene in side.values())
    if match := re.fullmatch(r"at least one of the pictures has a (\w+) (\w+) in it", statement):
        return any(groups(scene, colour=match[1], shape=match[2]) for scene in side.values())
    raise AssertionError(statement)


@settings(max_examples=150, deadline=None)
@given(number=SEEDS)
def test_statements_are_as_true_as_they_say(number: int) -> None:
    left, right = scene_of("nlvr2", 0, 2 * number), scene_of("nlvr2", 0, 2 * number + 1)
    statements = state(left, right, Draw(number), 2)
    assert len({text for text, _ in statements}) == 2
    for text, true in statements:
        assert truth(text, left, right) == true, text


@settings(max_examples=100, deadline=None)
@given(number=SEEDS)
def test_hypotheses_speak_of_what_is_there_unless_they_contradict(number: int) -> None:
    scene = scene_of("snli_ve", 0, number)
    triples = relate(scene, Draw(number))
    assert [label for _, _, label in triples] == ["entailment", "contradiction", "neutral"]
    for _, hypothesis, label in triples:
        words = hypothesis.split()
        colour = next(word for word in words if word in COLOURS)
        shape = next(SINGULAR[word] for word in words if word in SINGULAR)
        assert groups(scene, shape=shape)
        assert bool(groups(scene, colour=colour, shape=shape)) == (label != "contradiction"), hypothesis


def test_the_form_of_a_question_gives_little_away() -> None:
    words = re.compile("|".join(rf"\b{word}\b" for word in [*SINGULAR, *COLOURS]))
    found: dict[str, Counter[str]] = {}
    for i in range(1000):
        for question in ask(scene_of("vqav2", 1, i), Draw(i), 5):
            found.setdefault(words.sub("_", question.text), Counter())[question.answer] += 1
    best = sum(max(answers.values()) for answers in found.values())
    assert best < 0.36 * sum(answers.total() for answers in found.values())


OPEN = re.compile("someone likes|was drawn|a child has|will be moved")


def test_the_form_of_a_hypothesis_gives_two_in_three_at_most() -> None:
    triples = [one for i in range(600) for one in relate(scene_of("snli_ve", 1, i), Draw(i))]
    found = Counter((label, OPEN.search(hypothesis) is not None) for _, hypothesis, label in triples)
    assert found["entailment", True] == found["neutral", False] == 0
    assert 0.8 < found["contradiction", True] / found["contradiction", False] < 1.25


def test_statements_of_every_form_are_as_often_true_as_false() -> None:
    forms = (
        r"^the .* in it",
        "something .* (left|right)",
        "something .* both",
        "s in both",
        "at least",
    )
    found: Counter[tuple[str, bool]] = Counter()
    for i in range(1500):
        left, right = scene_of("nlvr2", 1, 2 * i), scene_of("nlvr2", 1, 2 * i + 1)
        for text, true in state(left, right, Draw(i), 2):
            found[next(form for form in forms if re.search(form, text)), true] += 1
    for form in forms:
        yes, no = found[form, True], found[form, False]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5, form


def test_answers_are_even() -> None:
    asked = [q for i in range(600) for q in ask(scene_of("vqav2", 1, i), Draw(i), 5)]
    answers = Counter(question.answer for question in asked)
    assert 0.8 < answers["yes"] / answers["no"] < 1.25
    colours = [answers[colour] for colour in COLOURS]
    assert max(colours) < 1.7 * min(colours)


NUMBER = 40
TEXTS = {"vqav2": 5, "vgqa": 5, "nlvr2": 2, "snli_ve": 3, "cc3m": 1, "cc12m": 1, "sbu": 1}
TEXTS |= {"pairs": 2, "table": 2, "webdataset": 1, "img2dataset": 1}


SPLITS = {"coco": 4, "coco-official": 2, "reference-arrow": 4, "cc3m": 2, "vgqa": 2}
SPLITS |= dict.fromkeys(("vg", "cc12m", "sbu", "pairs", "table", "webdataset", "img2dataset"), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts(layout: str, tmp_path: Path) -> None:
    world = ["--num-images", str(NUMBER), "--image-size", "32", "--workers", "1", "--layout", layout]
    assert main(["synth", "--out", str(tmp_path / "raw"), *world]) == 0
    words = [*COLOURS, *SHAPES, "1", "2", "3", "4", "yes", "no", "plain", "striped", "dotted", "checkered"]
    more = ["--answers", str(tmp_path / "answers.json")] if layout in ("vqav2", "vgqa") else []
    answers = '["small", "large", ' + ", ".join(f'"{word}"' for word in words) + "]"
    (tmp_path / "answers.json").write_text(answers, "utf-8")
    out = tmp_path / "out"
    raw = str(tmp_path / "raw" / layout)
    source = layout.removesuffix("-official")
    assert main(["convert", source, "--raw", raw, "--out", str(out), "--workers", "1", *more]) == 0
    assert main(["verify", str(out), "--full", "--workers", "1"]) == 0
    manifest = read_manifest(out)
    splits: dict[str, SplitInfo] = {n: info for n, info in manifest.splits.items() if n != "test-dev"}
    assert sum(info.rows for info in splits.values()) == NUMBER
    if layout != "vg":  # whose regions repeat
        assert sum(info.texts for info in splits.values()) == NUMBER * TEXTS.get(layout, 5)
        assert manifest.dropped == {}
    assert len(splits) == SPLITS.get(layout, 3)
    assert peek.contact_sheet(out, 5).width > 400
    row = next(peek.rows(out, "train"))
    (text, *_) = peek.shown_texts(row, manifest.task)
    notes = {"vqa": r".*\? -- \w+ [01].*", "nlvr2": r".* -- (true|false)", "entailment": r".* -- \w+.*: .*"}
    assert re.fullmatch(notes.get(manifest.task, r"[^-]+"), text), text
