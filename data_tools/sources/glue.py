"""GLUE: sentences, or pairs of them, with a class or a score. No pictures.

Raw folder: `CoLA/`, `SST-2/`, `MRPC/`, `QQP/`, `STS-B/`, `MNLI/`, `QNLI/`, `RTE/` as the official archives unpack
(also in `glue_data/`); those that are there become splits of one data set: `cola-train`, `cola-dev`, ...,
`mnli-dev_matched`, `mnli-dev_mismatched`. MRPC may be Microsoft's `msr_paraphrase_train.txt` with GLUE's `dev_ids.tsv`
instead. `test.tsv` has no labels and stays out. One row a line, with all of its text between two tabs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.sources.base import AnnotationError, Published, Request, Row, Source, drop, text_fault
from data_tools.sources.tables import lines

_TRAIN_AND_DEV = ("train", "dev")
_MSR_TRAIN, _MSR_DEV_IDS = "msr_paraphrase_train.txt", "dev_ids.tsv"
_HIGHEST_SCORE = 5.0


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        folder: Its folder.
        columns: Names of the columns of the first sentence, the second one (None: there is none) and the label.
        classes: Labels as the file spells them, in the order of their numbers; empty: a score.
        sets: Names of its files, without `.tsv`.
        header: The columns of files without a header line; empty: they have one.
    """

    folder: str
    columns: tuple[str, str | None, str]
    classes: tuple[str, ...] = ("0", "1")
    sets: tuple[str, ...] = _TRAIN_AND_DEV
    header: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", ("sentence", None, "label"), header=("source", "label", "star", "sentence")),
    "sst2": Task("SST-2", ("sentence", None, "label")),
    "mrpc": Task("MRPC", ("#1 String", "#2 String", "Quality")),
    "qqp": Task("QQP", ("question1", "question2", "is_duplicate")),
    "stsb": Task("STS-B", ("sentence1", "sentence2", "score"), classes=()),
    "mnli": Task(
        "MNLI",
        ("sentence1", "sentence2", "gold_label"),
        classes=("contradiction", "neutral", "entailment"),
        sets=("train", "dev_matched", "dev_mismatched"),
    ),
    "qnli": Task("QNLI", ("question", "sentence", "label"), classes=_ENTAILMENT),
    "rte": Task("RTE", ("sentence1", "sentence2", "label"), classes=_ENTAILMENT),
}
_NAMES = {task.folder: name for name, task in TASKS.items()}


def find(raw: Path) -> list[Path]:
    """All sets of all tasks that are there."""
    base = raw / "glue_data" if (raw / "glue_data").is_dir() else raw
    found = []
    for task in TASKS.values():
        names = [f"{one}.tsv" for one in task.sets]
        if task.folder == "MRPC" and not (base / task.folder / "train.tsv").is_file():
            names = [_MSR_TRAIN, _MSR_DEV_IDS]
        found += [base / task.folder / name for name in names if (base / task.folder / name).is_file()]
    if not found:
        raise AnnotationError(f"{raw}: no GLUE tasks; expected CoLA/train.tsv or the like")
    return found


def rows(request: Request) -> Iterator[Row]:
    """The rows of each file."""
    for path in request.annotations:
        name = _NAMES.get(path.parent.name)
        if name is None:
            raise AnnotationError(f"{path}: folder {path.parent.name!r}: expected one of {', '.join(_NAMES)}")
        if path.name == _MSR_TRAIN:
            yield from _microsoft_rows(path)
        elif path.stem in TASKS[name].sets:
            yield from (row for row, _ in _rows(path, name, path.stem))
        elif path.name != _MSR_DEV_IDS:
            raise AnnotationError(f"{path}: expected {', '.join(f'{one}.tsv' for one in TASKS[name].sets)}")


def _microsoft_rows(path: Path) -> Iterator[Row]:
    """The training set of MRPC as GLUE cuts it: the pairs of ids that a file beside it lists are its dev set."""
    ids = path.with_name(_MSR_DEV_IDS)
    listed = {tuple(line.split("\t")) for _, line in lines(ids)} if ids.is_file() else set()
    for split in _TRAIN_AND_DEV if listed else ("train",):
        for row, record in _rows(path, "mrpc", split):
            if ((record["#1 ID"], record["#2 ID"]) in listed) == (split == "dev"):
                yield row


def _rows(path: Path, name: str, split: str) -> Iterator[tuple[Row, dict[str, str]]]:
    """Each row with the fields of its line by column."""
    task = TASKS[name]
    header = task.header
    for number, (where, line) in enumerate(lines(path), 1):
        fields = line.split("\t")
        if not header:
            header = _header(fields, task, path)
            continue
        if not line:
            continue
        columns: dict[str, list[object]] = {"sentences": [], "second_sentences": [], "labels": []}
        row = Row(f"{name}-{split}", f"{task.folder}/{path.name}:{number}", (), columns, where)
        if name == "qqp" and len(fields) < len(header):  # the official file has questions with line breaks
            drop(row, "cut_line")
            yield row, {}
            continue
        if len(fields) != len(header):
            raise AnnotationError(
                f"{where}: {len(fields)} fields, expected {len(header)}: {', '.join(header)}"
            )
        record = dict(zip(header, fields, strict=True))
        _fill(row, record, task)
        yield row, record


def _fill(row: Row, record: dict[str, str], task: Task) -> None:
    """Puts sentences and label into a row, unless a sentence cannot be used."""
    first, second, label = task.columns
    texts = [record[first].strip(), *([record[second].strip()] if second is not None else [])]
    value = _label(record[label], task, label, row.where)
    for fault in filter(None, map(text_fault, texts)):
        drop(row, fault)
        return
    row.columns["sentences"].append(texts[0])
    row.columns["second_sentences"].append(texts[1] if second is not None else "")
    row.columns["labels"].append(value)


def _header(fields: list[str], task: Task, path: Path) -> tuple[str, ...]:
    wanted = {column for column in task.columns if column is not None}
    if task.folder == "MRPC":
        wanted |= {"#1 ID", "#2 ID"}
    if not wanted <= set(fields):
        raise AnnotationError(
            f"{path}: line 1: columns {fields!r:.300}; expected {', '.join(sorted(wanted))}"
        )
    return tuple(fields)


def _label(text: str, task: Task, column: str, where: str) -> float:
    """The number of a class, or a score."""
    if task.classes:
        if text in task.classes:
            return float(task.classes.index(text))
        raise AnnotationError(
            f"{where}: field {column!r}: found {text!r:.80}, expected one of {', '.join(task.classes)}"
        )
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= _HIGHEST_SCORE:
        raise AnnotationError(f"{where}: field {column!r}: found {text!r:.80}, expected a number from 0 to 5")
    return score


_COUNTS: dict[str, dict[str, int]] = {
    "train.tsv": {
        "cola-train": 8_551,
        "sst2-train": 67_349,
        "mrpc-train": 3_668,
        "qqp-train": 363_846,
        "stsb-train": 5_749,
        "mnli-train": 392_702,
        "qnli-train": 104_743,
        "rte-train": 2_490,
    },
    "dev.tsv": {
        "cola-dev": 1_043,
        "sst2-dev": 872,
        "mrpc-dev": 408,
        "qqp-dev": 40_430,
        "stsb-dev": 1_500,
        "qnli-dev": 5_463,
        "rte-dev": 277,
    },
    "dev_matched.tsv": {"mnli-dev_matched": 9_815},
    "dev_mismatched.tsv": {"mnli-dev_mismatched": 9_832},
    _MSR_TRAIN: {"mrpc-train": 3_668, "mrpc-dev": 408},
}


def _published() -> dict[str, dict[str, Published]]:
    return {file: {split: (n, n) for split, n in counts.items()} for file, counts in _COUNTS.items()}


SOURCE = Source(task="glue", find=find, rows=rows, published=_published())
