"""The `.arrow` files of the published ViLT, METER, BridgeTower and ManagerTower code.

Arrow IPC files; the columns tell the task, the file name data set, split and number: `coco_caption_karpathy_val`,
`conceptual_caption_train_12`, `sbu_3`, `vg` (both train), `vqav2_test-dev`, `vqav2_train_fix`, `nlvr2_dev`, ...
Pictures and texts are taken in the order of the files. NLVR2's files lack the number of each statement in its
identifier: they are counted from 0; SNLI-VE's lack the name of the picture: file and row stand for it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.sources.answers import check_vocabulary
from data_tools.sources.base import (
    AnnotationError,
    Request,
    Row,
    Slice,
    Source,
    clean_texts,
    drop,
    text_fault,
)
from data_tools.sources.vqav2 import add_question, empty_columns

_SPLITS = (
    *("train", "restval", "val", "test", "trainable_val", "rest_val"),
    *("dev", "test1", "test-dev", "balanced_dev", "balanced_test1", "unbalanced_dev", "unbalanced_test1"),
)
_NAME = re.compile(rf"(.+?)(?:_({'|'.join(_SPLITS)}))?(_fix)?(?:_(\d+))?")
_TASKS = {
    "caption": ("image", "caption", "image_id"),
    "vqa": ("image", "questions", "question_id", "answers", "answer_labels", "answer_scores", "image_id"),
    "nlvr2": ("image_0", "image_1", "questions", "answers", "identifier"),
    "entailment": ("image", "sentences", "labels"),
}
_TRUTH = {"true": 1, "false": 0}

Record = dict[str, Any]


def _place(path: Path) -> tuple[str, int, int]:
    """(data set, place of the split, number) from the name of a file."""
    match = _NAME.fullmatch(path.stem)
    assert match is not None
    return match[1] + (match[3] or ""), _SPLITS.index(match[2] or "train"), int(match[4] or 0)


def find(raw: Path) -> list[Path]:
    """All files directly in the folder, which must be of one data set and without gaps."""
    found = sorted(raw.glob("*.arrow"), key=_place)
    if not found:
        raise AnnotationError(
            f"{raw}: no .arrow files; expected coco_caption_karpathy_train.arrow or the like"
        )
    names = sorted({_place(path)[0] for path in found})
    if len(names) > 1:
        raise AnnotationError(
            f"{raw}: files of {len(names)} data sets ({', '.join(names)}); choose one, such as "
            f"--annotations '{names[0]}*.arrow'"
        )
    numbers: dict[int, list[int]] = {}
    for path in found:
        numbers.setdefault(_place(path)[1], []).append(_place(path)[2])
    for split, there in numbers.items():
        missing = sorted(set(range(max(there))) - set(there))
        if missing:
            raise AnnotationError(
                f"{raw}: {names[0]}, {_SPLITS[split]}: number {missing[0]} of {max(there) + 1} files is missing; "
                "name the files with --annotations to do without it"
            )
    return found


def task(request: Request) -> str:
    """The task that the columns of all files tell."""
    tasks = {path: _task(path) for path in request.annotations}
    known = {path: name for path, name in tasks.items() if name}
    if not known:
        raise AnnotationError("the .arrow files hold no rows")
    if len(set(known.values())) > 1:
        (one, first), (other, second) = list({name: path for path, name in known.items()}.items())[:2]
        raise AnnotationError(f"{first} is of task {one}, {second} of {other}; convert them one by one")
    return next(iter(known.values()))


def _task(path: Path) -> str:
    """The task of one file; empty for one without rows, whose columns may be of any type."""
    reader, _ = _open(path)
    names = set(reader.schema.names)
    for name, columns in _TASKS.items():
        if names >= set(columns):
            return name
    if next(_batches(path), None) is None:
        return ""
    expected = "; or ".join(", ".join(columns) for columns in _TASKS.values())
    raise AnnotationError(f"{path}: columns {sorted(names)!r:.300}; expected {expected}")


def _open(path: Path) -> tuple[Any, Any]:
    """The reader of a file, and the buffer that is the whole file, mapped."""
    try:
        whole = pa.memory_map(str(path)).read_buffer()
        reader = pa.ipc.open_file(whole)
        _ = reader.schema.names  # which need not be UTF-8
        return reader, whole
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: not a readable Arrow file, such as one cut short: {error}") from error


def _batches(path: Path) -> Iterator[tuple[Any, Any]]:
    """(record batch with rows, whole file)."""
    reader, whole = _open(path)
    for number in range(reader.num_record_batches):
        try:
            batch = reader.get_batch(number)
            batch.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise AnnotationError(f"{path}: record batch {number}: damaged: {error}") from error
        if batch.num_rows:
            yield batch, whole


def answers(request: Request) -> list[str]:
    """The answers in the order of the labels that the files give them; none if the task is another."""
    if task(request) != "vqa":
        return []
    pairs: set[tuple[int, str]] = set()
    for path in request.annotations:
        for batch, _ in _batches(path):
            given, numbers = (_leaves(batch.column(name)) for name in ("answers", "answer_labels"))
            if len(given) != len(numbers):
                raise AnnotationError(
                    f"{path}: {len(given)} answers with {len(numbers)} labels; expected equal"
                )
            found = list(zip(numbers, given, strict=True))
            if not all(isinstance(label, int) and isinstance(answer, str) for label, answer in found):
                raise AnnotationError(f"{path}: answers and labels of another type than text and integer")
            pairs.update(found)
    where = ", ".join(path.name for path in request.annotations)
    wrong = [label for label, count in Counter(label for label, _ in pairs).items() if count > 1]
    labels = {label for label, _ in pairs}
    missing = sorted(set(range(max(labels, default=0) + 1)) - labels)
    if wrong or missing or not pairs:
        fault = f"label {wrong[0]} has several answers" if wrong else f"label {missing[0]} has no answer"
        raise AnnotationError(f"{where}: {fault} in these files; give --answers")
    return check_vocabulary([answer for _, answer in sorted(pairs)], where)


def _leaves(column: Any) -> list[Any]:
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    found: list[Any] = column.to_pylist()
    return found


def rows(request: Request) -> Iterator[Row]:
    """One row a row."""
    name = task(request)
    make: Callable[[Record, str, str, str], Row] = _MAKE[name]
    if name == "vqa":
        make = partial(_vqa, labels={answer: label for label, answer in enumerate(request.answers)})
    for path in sorted(request.annotations, key=lambda path: _place(path)[1:]):
        split, number = _SPLITS[_place(path)[1]], 0
        for batch, whole in _batches(path):
            columns = [_values(batch.column(key), path, whole) for key in _TASKS[name]]
            for values in zip(*columns, strict=True):
                record = dict(zip(_TASKS[name], values, strict=True))
                yield make(record, split, f"{path}: row {number}", f"{path.stem}/{number}")
                number += 1


def _values(column: Any, path: Path, whole: Any) -> Iterator[Any]:
    """The values of a column; of pictures their places in the file, if it is not compressed."""
    is_small = column.type == pa.binary()
    if is_small or column.type == pa.large_binary():
        _, offsets, data = column.buffers()
        first = data.address - whole.address if data is not None else -1
        if 0 <= first <= whole.size - data.size:
            ends = np.frombuffer(offsets, np.int32 if is_small else np.int64)[column.offset :].tolist()
            for valid, start, end in zip(column.is_valid().to_pylist(), ends, ends[1:], strict=False):
                yield Slice(path, first + start, end - start) if valid else None
            return
    yield from (value.as_py() for value in column)


def _caption(record: Record, split: str, where: str, _: str) -> Row:
    captions, dropped = clean_texts(_list(record, "caption", str, where))
    image_id = str(record["image_id"])
    return Row(split, image_id, (_image(record, "image", where),), {"captions": captions}, where, dropped)


def _vqa(record: Record, split: str, where: str, _: str, labels: dict[str, int]) -> Row:
    row = Row(split, str(record["image_id"]), (_image(record, "image", where),), empty_columns(), where)
    questions = _list(record, "questions", str, where)
    ids = _list(record, "question_id", int, where)
    given = [_list(record, key, list, where) for key in ("answers", "answer_labels", "answer_scores")]
    given = [column or [[]] * len(questions) for column in given]  # sets without answers have empty lists
    answered = bool(record["answers"])
    if any(len(column) != len(questions) for column in (ids, *given)):
        raise AnnotationError(f"{where}: expected an id, answers, labels and scores for each question")
    for question, question_id, own, numbers, scores in zip(questions, ids, *given, strict=True):
        if [labels.get(answer) for answer in own] != numbers or len(set(own)) != len(own):
            raise AnnotationError(
                f"{where}: question {question_id}: answers {own!r:.80} with labels {numbers!r:.80}; "
                "expected each once, with its label in the vocabulary (--answers)"
            )
        if len(scores) != len(own) or not all(isinstance(s, (int, float)) and 0 <= s <= 1 for s in scores):
            raise AnnotationError(f"{where}: question {question_id}: scores {scores!r:.80}; expected 0 to 1")
        question = question.strip()
        reason = text_fault(question) or ("no_known_answer" if answered and not own else "")
        if reason:
            drop(row, reason)
        else:
            add_question(row, question, question_id, dict(zip(own, scores, strict=True)), labels)
    return row


def _nlvr2(record: Record, split: str, where: str, _: str) -> Row:
    identifier = str(record["identifier"])
    statements, truths = (_list(record, key, (str, bool), where) for key in ("questions", "answers"))
    columns: Record = {"statements": [], "identifiers": [], "labels": []}
    images = tuple(_image(record, key, where) for key in ("image_0", "image_1"))
    row = Row(split, identifier, images, columns, where)
    if len(statements) != len(truths) or not {str(truth).lower() for truth in truths} <= set(_TRUTH):
        raise AnnotationError(f"{where}: answers {truths!r:.80}; expected True or False for each statement")
    for number, (statement, truth) in enumerate(zip(statements, truths, strict=True)):
        statement = str(statement).strip()
        reason = text_fault(statement)
        if reason:
            drop(row, reason)
            continue
        columns["statements"].append(statement)
        columns["identifiers"].append(f"{identifier}-{number}")
        columns["labels"].append(_TRUTH[str(truth).lower()])
    return row


def _entailment(record: Record, split: str, where: str, name: str) -> Row:
    columns: Record = {"hypotheses": [], "premises": [], "labels": []}
    row = Row(split, name, (_image(record, "image", where),), columns, where)
    pairs, labels = _list(record, "sentences", list, where), _list(record, "labels", int, where)
    if len(pairs) != len(labels) or not set(labels) <= {0, 1, 2}:
        raise AnnotationError(
            f"{where}: labels {labels!r:.80}; expected 0, 1 or 2 for each pair of sentences"
        )
    for pair, label in zip(pairs, labels, strict=True):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise AnnotationError(f"{where}: sentences {pair!r:.80}; expected premise and hypothesis")
        premise, hypothesis = (text.strip() for text in pair)
        reason = text_fault(hypothesis) or text_fault(premise)
        if reason:
            drop(row, reason)
            continue
        columns["hypotheses"].append(hypothesis)
        columns["premises"].append(premise)
        columns["labels"].append(label)
    return row


_MAKE: dict[str, Callable[..., Row]] = {
    "caption": _caption,
    "vqa": _vqa,
    "nlvr2": _nlvr2,
    "entailment": _entailment,
}


def _image(record: Record, key: str, where: str) -> bytes | Slice:
    value = record[key]
    if value is not None and not isinstance(value, (bytes, Slice)):
        raise AnnotationError(f"{where}: {key}: found {value!r:.80}, expected the bytes of a picture")
    return value or b""


def _list(record: Record, key: str, kind: type | tuple[type, ...], where: str) -> list[Any]:
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(one, kind) for one in value):
        raise AnnotationError(f"{where}: {key}: found {value!r:.80}, expected a list of the usual type")
    return value


_PUBLISHED: dict[str, tuple[str, int | None, int | None]] = {
    "coco_caption_karpathy_train": ("train", 82_783, 414_113),
    "coco_caption_karpathy_restval": ("restval", 30_504, 152_634),
    "coco_caption_karpathy_val": ("val", 5_000, 25_010),
    "coco_caption_karpathy_test": ("test", 5_000, 25_010),
    "f30k_caption_karpathy_train": ("train", 29_000, 145_000),
    "f30k_caption_karpathy_val": ("val", 1_014, 5_070),
    "f30k_caption_karpathy_test": ("test", 1_000, 5_000),
    "conceptual_caption_train_0": ("train", 3_318_333, 3_318_333),  # all files of the split
    "conceptual_caption_val_0": ("val", 15_840, 15_840),
    "sbu_0": ("train", 1_000_000, 1_000_000),
    "vg": ("train", 108_077, None),
    "vqav2_train_fix": ("train", 82_774, 435_174),
    "vqav2_val_fix": ("val", 40_503, 210_207),
    "vgqa_train": ("train", None, 846_015),
    "vgqa_val": ("val", None, 85_851),
    "nlvr2_train": ("train", 46_724, 86_373),
    "nlvr2_dev": ("dev", 3_491, 6_982),
    "nlvr2_test1": ("test1", 3_484, 6_967),
    "snli_train": ("train", 29_783, 529_527),
    "snli_dev": ("dev", 1_000, 17_858),
    "snli_test": ("test", 1_000, 17_901),
}

SOURCE = Source(
    task="",
    find=find,
    rows=rows,
    published={f"{name}.arrow": {split: (n, k)} for name, (split, n, k) in _PUBLISHED.items()},
    answers=answers,
    task_of=task,
)
