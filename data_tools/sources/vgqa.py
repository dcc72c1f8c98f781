"""Visual Genome questions, kept if their answer is in the vocabulary of VQAv2 (`--answers`).

Raw folder: `question_answers.json` (also in `annotations/`), the picture folders as for `vg`, and a file that gives
the splits, `vgqa/ids.json` or `vgqa/coco_ids.json` ({"train": [image ids], "val": [...], "test": [...]}; its test
joins val, pictures in none count as `no_split`). Without such a file all pictures are train. Of a picture, a
question that was answered in different ways is left out (`ambiguous_answer`), a repeated one is kept once.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.answers import normal_answer
from data_tools.sources.base import (
    AnnotationError,
    Request,
    Row,
    Source,
    drop,
    first_existing,
    member,
    text_fault,
    unique,
)
from data_tools.sources.json_stream import entries
from data_tools.sources.vg import FOLDERS
from data_tools.sources.vqav2 import add_question, empty_columns


def find(raw: Path) -> list[Path]:
    """The questions, and the splits if they are there."""
    names = ("question_answers.json", "annotations/question_answers.json")
    splits = [raw / "vgqa" / "ids.json", raw / "ids.json"]
    return [
        first_existing(raw, names, "Visual Genome questions"),
        *[path for path in splits if path.is_file()][:1],
    ]


def rows(request: Request) -> Iterator[Row]:
    """One row a picture."""
    if not request.answers:
        raise AnnotationError(
            "vgqa has no answer vocabulary of its own; give --answers (such as VQAv2's shards)"
        )
    labels = {answer: label for label, answer in enumerate(request.answers)}
    lists = [path for path in request.annotations if path.name.endswith("ids.json")]
    split_of = _splits(lists[0]) if lists else None
    for split in ("train", "val") if split_of is not None else ("train",):
        for path in request.annotations:
            if path in lists:
                continue
            seen: set[int] = set()
            for where, entry in entries(path):
                image_id = member(entry, "id", int, where)
                unique(image_id, seen, "image id", where)
                own = split_of.get(image_id, "") if split_of is not None else "train"
                if own == split or (not own and split == "train"):
                    yield _row(
                        request.images, split, image_id, entry, labels, where, "" if own else "no_split"
                    )


def _row(
    images: Path, split: str, image_id: int, entry: object, labels: dict[str, int], where: str, refused: str
) -> Row:
    files = tuple(images / folder / f"{image_id}.jpg" for folder in FOLDERS)
    row = Row(split, str(image_id), (files,), empty_columns(), where, refused=refused)
    found: list[tuple[str, int, str]] = []
    for number, one in enumerate(member(entry, "qas", list, where)):
        place = f"{where}.qas[{number}]"
        question = member(one, "question", str, place).strip()
        answer = normal_answer(member(one, "answer", str, place))
        reason = text_fault(question) or ("" if answer in labels else "no_known_answer")
        if reason:
            drop(row, reason)
        else:
            found.append((question, member(one, "qa_id", int, place), answer))
    given: dict[str, set[str]] = {}
    for question, _, answer in found:
        given.setdefault(question, set()).add(answer)
    kept: set[str] = set()
    for question, question_id, answer in found:
        if len(given[question]) > 1:
            drop(row, "ambiguous_answer")
        elif question in kept:
            drop(row, "duplicate_text")
        else:
            kept.add(question)
            add_question(row, question, question_id, {answer: 1.0}, labels)
    return row


def _splits(path: Path) -> dict[int, str]:
    """Image id -> split."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: cannot be read as JSON: {error}") from error
    found: dict[int, str] = {}
    for name, split in (("train", "train"), ("val", "val"), ("test", "val")):
        for number, image_id in enumerate(member(tree, name, list, str(path))):
            if type(image_id) is not int or image_id in found:
                raise AnnotationError(
                    f"{path}: {name}[{number}]: found {image_id!r:.80}, expected a new image id"
                )
            found[image_id] = split
    return found


SOURCE = Source(
    "vqa", find, rows, {"question_answers.json": {"train": (None, 846_015), "val": (None, 85_851)}}
)
