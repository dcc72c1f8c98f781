"""SNLI-VE: does a Flickr30k picture entail a sentence?

Raw folder: `snli_ve_{train,dev,test}.jsonl` (also in `snli_ve/`, `data/`) and the pictures in `flickr30k-images/`.
One row a picture, its sentence pairs in the order of the file. Pairs without agreement (label "-") count as
`no_label`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.base import AnnotationError, Request, Row, Source, drop, inside, member, text_fault
from data_tools.sources.nlvr2 import parse_line
from data_tools.sources.tables import lines

_NAME = re.compile(r"snli_ve_([a-z]+)\.jsonl")
_LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}
_IDS = ("Flickr30K_ID", "Flikr30kID")  # the official generator's key and its older spelling
_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


def find(raw: Path) -> list[Path]:
    """All sets that are there."""
    names = [f"snli_ve_{split}.jsonl" for split in ("train", "dev", "test")]
    places = [[raw / folder / name for folder in (".", "snli_ve", "data")] for name in names]
    found = [path for place in places for path in [path for path in place if path.is_file()][:1]]
    if not found:
        raise AnnotationError(f"{raw}: no SNLI-VE pairs; expected snli_ve_train.jsonl or the like")
    return found


def rows(request: Request) -> Iterator[Row]:
    """The rows of each set; a file named otherwise is train."""
    for path in request.annotations:
        match = _NAME.fullmatch(path.name)
        split = match[1] if match else "train"
        found: dict[str, Row] = {}
        for where, line in lines(path):
            if not line.strip():
                continue
            record = parse_line(line, where)
            key = next((key for key in _IDS if isinstance(record, dict) and key in record), _IDS[0])
            photo = inside(member(record, key, str, where).removesuffix(".jpg"), where)
            if photo not in found:
                files = tuple(request.images / folder / f"{photo}.jpg" for folder in _FOLDERS)
                columns: dict[str, list[object]] = {"hypotheses": [], "premises": [], "labels": []}
                found[photo] = Row(split, f"{photo}.jpg", (files,), columns, where)
            row = found[photo]
            premise = member(record, "sentence1", str, where).strip()
            hypothesis = member(record, "sentence2", str, where).strip()
            label = member(record, "gold_label", str, where)
            if label not in _LABELS and label != "-":
                expected = f"one of {sorted(_LABELS)} or '-'"
                raise AnnotationError(
                    f"{where}: field 'gold_label': found {label!r:.80}, expected {expected}"
                )
            reason = text_fault(hypothesis) or text_fault(premise) or ("no_label" if label == "-" else "")
            if reason:
                drop(row, reason)
                continue
            row.columns["hypotheses"].append(hypothesis)
            row.columns["premises"].append(premise)
            row.columns["labels"].append(_LABELS[label])
        yield from found.values()


SOURCE = Source(
    task="entailment",
    find=find,
    rows=rows,
    published={
        "snli_ve_train.jsonl": {"train": (29_783, 529_527)},
        "snli_ve_dev.jsonl": {"dev": (1_000, 17_858)},
        "snli_ve_test.jsonl": {"test": (1_000, 17_901)},
    },
)
