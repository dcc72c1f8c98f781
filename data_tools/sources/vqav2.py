"""VQAv2: questions about COCO pictures, with ten people's answers where they are published.

Raw folder: `v2_OpenEnded_mscoco_<set>_questions.json` and `v2_mscoco_<set>_annotations.json` (also in `vqav2/`)
for the sets `train2014`, `val2014`, `test2015`, `test-dev2015`, and the picture folders `train2014/`,
`val2014/`, `test2015/`. One row a picture, its questions in the order of the file. Answers without a label are
left out; questions that then have none count as `no_known_answer`. Sets without annotations keep all questions.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.answers import check_vocabulary, soft_scores, vocabulary
from data_tools.sources.base import AnnotationError, Request, Row, Source, drop, member, text_fault, unique
from data_tools.sources.json_stream import entries

SETS = {"train2014": "train", "val2014": "val", "test2015": "test", "test-dev2015": "test-dev"}
_QUESTIONS = re.compile(r"(?:v2_)?OpenEnded_mscoco_(.+)_questions\.json")
_FOLDERS = {"test-dev2015": "test2015"}


def find(raw: Path) -> list[Path]:
    """For each set that is there its questions, and its annotations where there are some."""
    found = []
    for name in SETS:
        for folder in (raw, raw / "vqav2"):
            questions = folder / f"v2_OpenEnded_mscoco_{name}_questions.json"
            if questions.is_file():
                annotations = folder / f"v2_mscoco_{name}_annotations.json"
                found += [path for path in (questions, annotations) if path.is_file()]
                break
    if not found:
        raise AnnotationError(
            f"{raw}: no VQAv2 questions; expected v2_OpenEnded_mscoco_train2014_questions.json or the like"
        )
    return found


def answers(request: Request) -> list[str]:
    """The majority answers that come often enough, over train and then val."""
    files = [
        path
        for name in SETS
        for path in request.annotations
        if path.name == f"v2_mscoco_{name}_annotations.json"
    ]
    found = (
        member(entry, "multiple_choice_answer", str, where)
        for path in files
        for where, entry in entries(path, "annotations")
    )
    where = f"{', '.join(path.name for path in files) or 'no annotations'}: majority answers (give --answers)"
    return check_vocabulary(vocabulary(found), where)


def rows(request: Request) -> Iterator[Row]:
    """The rows of each set."""
    labels = {answer: label for label, answer in enumerate(request.answers)}
    for path in request.annotations:
        match = _QUESTIONS.fullmatch(path.name)
        if match is None:
            continue
        name = match[1]
        answered = f"v2_mscoco_{name}_annotations.json"
        annotations = [other for other in request.annotations if other.name == answered]
        people = _people(annotations[0]) if annotations else None
        yield from _set_rows(request.images, path, name, people, labels)


def _people(path: Path) -> dict[int, tuple[str, ...]]:
    """question_id -> people's answers."""
    found: dict[int, tuple[str, ...]] = {}
    for where, entry in entries(path, "annotations"):
        question_id = member(entry, "question_id", int, where)
        if question_id in found:
            raise AnnotationError(f"{where}: question_id {question_id} stands in the file twice")
        given = member(entry, "answers", list, where)
        found[question_id] = tuple(
            member(one, "answer", str, f"{where}.answers[{i}]") for i, one in enumerate(given)
        )
    return found


def _set_rows(
    images: Path, path: Path, name: str, people: dict[int, tuple[str, ...]] | None, labels: dict[str, int]
) -> Iterator[Row]:
    split = SETS.get(name, name)
    rows: dict[int, Row] = {}
    seen: set[int] = set()
    for where, entry in entries(path, "questions"):
        image_id = member(entry, "image_id", int, where)
        question_id = member(entry, "question_id", int, where)
        unique(question_id, seen, "question_id", where)
        question = member(entry, "question", str, where).strip()
        if image_id not in rows:
            files = _places(images, name, image_id)
            rows[image_id] = Row(split, str(image_id), (files,), empty_columns(), where)
        row = rows[image_id]
        scores = {} if people is None else soft_scores(people.get(question_id, ()), labels)
        reason = text_fault(question) or ("no_known_answer" if people is not None and not scores else "")
        if reason:
            drop(row, reason)
            continue
        add_question(row, question, question_id, scores, labels)
    yield from rows.values()


def empty_columns() -> dict[str, list[Any]]:
    """The columns of a row without questions."""
    return {name: [] for name in ("questions", "question_ids", "answers", "labels", "scores")}


def add_question(
    row: Row, question: str, question_id: int, scores: dict[str, float], labels: dict[str, int]
) -> None:
    """Appends a question with its answers to the columns of a row."""
    row.columns["questions"].append(question)
    row.columns["question_ids"].append(question_id)
    row.columns["answers"].append(list(scores))
    row.columns["labels"].append([labels[answer] for answer in scores])
    row.columns["scores"].append(list(scores.values()))


def _places(images: Path, name: str, image_id: int) -> tuple[Path, ...]:
    """Where the picture may lie: the 2014 or 2015 name, or the 2017 one."""
    folder = _FOLDERS.get(name, name)
    number = f"{image_id:012d}.jpg"
    later = [images / place / number for place in ("train2017", "val2017") if not folder.startswith("test")]
    return (images / folder / f"COCO_{folder}_{number}", images / folder / number, *later)


SOURCE = Source(
    task="vqa",
    find=find,
    rows=rows,
    published={
        "v2_OpenEnded_mscoco_train2014_questions.json": {"train": (82_774, 435_174)},
        "v2_OpenEnded_mscoco_val2014_questions.json": {"val": (40_503, 210_207)},
        "v2_OpenEnded_mscoco_test2015_questions.json": {"test": (81_434, 447_793)},
        "v2_OpenEnded_mscoco_test-dev2015_questions.json": {"test-dev": (36_807, 107_394)},
    },
    answers=answers,
)
