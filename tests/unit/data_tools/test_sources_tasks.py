"""Questions, statements and entailment."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_tools.cli import main
from data_tools.shard_format import TEXT_COLUMNS, read_manifest
from data_tools.sources import SOURCES, AnnotationError, Request, Row
from data_tools.sources.answers import MIN_COUNT, normal_answer, read_vocabulary, soft_scores, vocabulary


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def rows(name: str, raw: Path, answers: tuple[str, ...] = ()) -> list[Row]:
    source = SOURCES[name]
    return list(source.rows(Request(raw, source.find(raw), answers=answers)))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1,000", "1000"),
        ("u.s.", "us"),
        ("yes/no", "yes no"),
        ("red, white", "red white"),
        ("it's 3.5", "it's 3.5"),
        ("none", "0"),
        ("Two dogs.", "2 dogs"),
        ("Dont", "don't"),
        ("the a an", ""),
        ("ten (10)", "10 10"),
        ("a/ b/c", "bc"),  # a mark beside a space anywhere deletes them all
        ("1,5/x", "15x"),  # and so does a comma between digits
        ("Im", "im"),  # the toolkit's key has a capital letter and never fits
        ("x" + "." * 40, "x" + "." * 8),  # 32 at most
    ],
)
def test_normal_answers(answer: str, expected: str) -> None:
    assert normal_answer(answer) == expected


def test_vocabulary_and_scores() -> None:
    majority = ["yes"] * MIN_COUNT + ["no"] * (MIN_COUNT - 1) + ["Two"] * 4 + ["2"] * 5
    assert vocabulary(majority) == ["yes", "2"]
    assert vocabulary(["c"] * 9 + ["b"] * 9) == ["c", "b"]
    people = ["2", "yes", "two", "no", "yes", "Two.", "maybe", "yes", "yes", "yes"]
    assert soft_scores(people, {"yes": 0, "2": 1, "maybe": 2}) == {"2": 0.9, "yes": 1.0, "maybe": 0.3}
    assert soft_scores(["a"] * 10, {"yes": 0}) == {}


def test_vocabulary_files(tmp_path: Path) -> None:
    write(tmp_path / "list.json", ["yes", "no"])
    write(tmp_path / "object.json", {"no": 1, "yes": 0})
    for name in ("list.json", "object.json"):
        assert read_vocabulary(tmp_path / name) == ["yes", "no"]
    for content in (["yes", "yes"], [], [1], {"yes": 1}, {"yes": 0, "no": 0}, "{"):
        write(tmp_path / "bad.json", content)
        with pytest.raises(AnnotationError, match=r"bad\.json"):
            read_vocabulary(tmp_path / "bad.json")


def vqa_files(raw: Path) -> None:
    def people(number: int, *given: str) -> dict[str, Any]:
        answers = [{"answer": answer, "answer_id": i} for i, answer in enumerate(given)]
        return {"question_id": number, "answers": answers, "multiple_choice_answer": given[0], "image_id": 0}

    questions = [
        {"image_id": 7, "question_id": 70, "question": "What colour?"},
        {"image_id": 5, "question_id": 50, "question": "How many?"},
        {"image_id": 7, "question_id": 71, "question": "Really? "},
        {"image_id": 7, "question_id": 72, "question": "Why?"},
    ]
    answered = [
        people(72, *["because"] * 10),
        people(50, *["two"] * 3, *["3"] * 7),
        people(70, *["red"] * 10),
        people(71, *["yes"] * 8, *["no"] * 2),
    ]
    answered += [people(1000 + i, "red") for i in range(9)] + [people(2000 + i, "Yes") for i in range(9)]
    write(raw / "vqav2" / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    write(raw / "vqav2" / "v2_mscoco_train2014_annotations.json", {"annotations": answered})
    write(raw / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions[:1]})


def test_vqav2(tmp_path: Path) -> None:
    vqa_files(tmp_path)
    source = SOURCES["vqav2"]
    assert source.answers is not None
    assert source.answers(Request(tmp_path, source.find(tmp_path))) == ["red", "yes"]
    found = rows("vqav2", tmp_path, ("red", "yes", "no", "3"))
    assert [(row.split, row.image_id, row.dropped) for row in found] == [
        ("train", "7", {"no_known_answer": 1}),
        ("train", "5", {}),
        ("test-dev", "7", {}),
    ]
    assert found[0].columns == {
        "questions": ["What colour?", "Really?"],
        "question_ids": [70, 71],
        "answers": [["red"], ["yes", "no"]],
        "labels": [[0], [1, 2]],
        "scores": [[1.0], [1.0, 0.6]],
    }
    assert found[1].columns["answers"] == [["3"]]
    assert found[2].columns["answers"] == [[]]
    first = [files[0] for files in (row.images[0] for row in found) if isinstance(files, tuple)]
    assert [path.relative_to(tmp_path).as_posix() for path in first] == [
        "train2014/COCO_train2014_000000000007.jpg",
        "train2014/COCO_train2014_000000000005.jpg",
        "test2015/COCO_test2015_000000000007.jpg",
    ]


def test_vgqa(tmp_path: Path) -> None:
    def qas(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
        return [{"qa_id": i, "question": q, "answer": a, "image_id": 0} for i, (q, a) in enumerate(pairs)]

    asked = [
        {"id": 1, "qas": qas(("Who?", "A dog."), ("Who?", "dog"), ("What?", "Red."), ("What?", "Blue"))},
        {"id": 2, "qas": qas(("Where?", "here"))},
        {"id": 3, "qas": qas(("Where?", "Red"))},
        {"id": 4, "qas": []},
    ]
    write(tmp_path / "question_answers.json", asked)
    answers = ("dog", "red", "blue")
    found = rows("vgqa", tmp_path, answers)
    assert [(row.split, row.image_id, row.dropped) for row in found] == [
        ("train", "1", {"ambiguous_answer": 2, "duplicate_text": 1}),
        ("train", "2", {"no_known_answer": 1}),
        ("train", "3", {}),
        ("train", "4", {}),
    ]
    assert found[0].columns["questions"] == ["Who?"]
    assert found[0].columns["labels"] == [[0]]
    write(tmp_path / "vgqa" / "ids.json", {"train": [1], "val": [3], "test": [4]})
    splits = [(row.split, row.image_id, row.refused) for row in rows("vgqa", tmp_path, answers)]
    assert splits == [("train", "1", ""), ("train", "2", "no_split"), ("val", "3", ""), ("val", "4", "")]
    with pytest.raises(AnnotationError, match="--answers"):
        rows("vgqa", tmp_path)


def test_nlvr2(tmp_path: Path) -> None:
    def line(identifier: str, label: object, **more: Any) -> str:
        return json.dumps({"identifier": identifier, "sentence": f"S {identifier} ", "label": label, **more})

    train = [line("train-1-0-0", "True", directory=39), line("train-2-0-0", "False", directory=4)]
    write(tmp_path / "data" / "train.json", "\n".join([*train, line("train-1-0-1", "False", directory=39)]))
    write(tmp_path / "data" / "balanced" / "balanced_dev.json", line("dev-9-1-0", True))
    found = rows("nlvr2", tmp_path)
    assert [(row.split, row.image_id) for row in found] == [
        ("train", "train-1-0"),
        ("train", "train-2-0"),
        ("balanced_dev", "dev-9-1"),
    ]
    assert found[0].columns == {
        "statements": ["S train-1-0-0", "S train-1-0-1"],
        "identifiers": ["train-1-0-0", "train-1-0-1"],
        "labels": [1, 0],
    }
    names = ["images/train/39/train-1-0-img0.png", "images/train/39/train-1-0-img1.png"]
    assert found[0].images == tuple((tmp_path / name,) for name in names)
    assert found[2].images[0] == (tmp_path / "images/dev/dev-9-1-img0.png",)


def test_snli_ve(tmp_path: Path) -> None:
    def line(photo: str, hypothesis: str, label: str, key: str = "Flickr30K_ID") -> str:
        return json.dumps({key: photo, "sentence1": "P ", "sentence2": hypothesis, "gold_label": label})

    lines = [
        line("1", "a", "entailment"),
        line("2", "b", "neutral"),
        line("1.jpg", "c", "contradiction", "Flikr30kID"),
        line("1", "d", "-"),
    ]
    write(tmp_path / "snli_ve_dev.jsonl", "\n".join(lines))
    first, second = rows("snli_ve", tmp_path)
    assert (first.split, first.image_id, first.dropped) == ("dev", "1.jpg", {"no_label": 1})
    assert first.columns == {"hypotheses": ["a", "c"], "premises": ["P", "P"], "labels": [2, 0]}
    assert second.columns["labels"] == [1]
    assert first.images == (tuple(tmp_path / f / "1.jpg" for f in FLICKR),)


FLICKR = ("flickr30k-images", "flickr30k_images", "images")


@pytest.mark.parametrize(
    ("name", "file", "content", "parts"),
    [
        (
            "nlvr2",
            "dev.json",
            '{"identifier": "dev-1-0-0", "sentence": "a", "label": 3}',
            ["line 1", "'label'"],
        ),
        ("nlvr2", "dev.json", '{"identifier": "x", "sentence": "a", "label": "True"}', ["line 1", "'x'"]),
        ("nlvr2", "dev.json", '{"identifier": "../x-1", "sentence": "a", "label": "True"}', ["'images/../"]),
        (
            "nlvr2",
            "train.json",
            '{"identifier": "train-1-0-0", "sentence": "a", "label": "True"}',
            ["line 1", "'directory' is missing"],
        ),
        (
            "snli_ve",
            "snli_ve_dev.jsonl",
            '\n{"Flickr30K_ID": "1", "sentence1": "", "sentence2": "b", "gold_label": "maybe"}',
            ["line 2", "'gold_label'", "'maybe'"],
        ),
        ("snli_ve", "snli_ve_dev.jsonl", '{"x": 1}', ["line 1", "'Flickr30K_ID' is missing"]),
        (
            "vqav2",
            "v2_OpenEnded_mscoco_val2014_questions.json",
            {"questions": [{"image_id": 1, "question_id": 1, "question": "a"}] * 2},
            ["questions[1]", "question_id 1", "twice"],
        ),
    ],
)
def test_broken_annotations_are_named(
    name: str, file: str, content: Any, parts: list[str], tmp_path: Path
) -> None:
    write(tmp_path / file, content)
    with pytest.raises(AnnotationError) as caught:
        rows(name, tmp_path, ("yes",))
    for part in [file, *parts]:
        assert part in str(caught.value)


def test_vqa_shards_carry_their_vocabulary(tmp_path: Path) -> None:
    world = ["synth", "--out", str(tmp_path), "--layout", "coco", "--num-images", "20", "--image-size", "32"]
    assert main([*world, "--workers", "1"]) == 0
    vqa_files(tmp_path / "coco")
    out = tmp_path / "out"
    convert = ["convert", "vqav2", "--raw", str(tmp_path / "coco"), "--out", str(out), "--workers", "1"]
    assert main(convert) == 0
    manifest = read_manifest(out)
    assert manifest.task == "vqa"
    assert manifest.options["answers"] == read_vocabulary(out) == ["red", "yes"]
    assert manifest.dropped == {"missing_file": 1, "no_known_answer": 2, "no_text": 1}
    table = pa.ipc.open_file(str(out / "train-00000.arrow")).read_all().to_pylist()
    assert [row[TEXT_COLUMNS["vqa"]] for row in table] == [["What colour?", "Really?"]]
    assert main(["verify", str(out), "--full", "--workers", "1"]) == 0
    assert main(["stats", str(out)]) == 0
    assert main(["peek", str(out), "--png", str(tmp_path / "a.png")]) == 0
