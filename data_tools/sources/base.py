"""What every source yields, and the checks that sources share. Nothing here knows how shards are written."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Slice:
    """A picture that lies in a file with others, such as an uncompressed tar: `size` bytes from `start` on."""

    path: Path
    start: int
    size: int


ImageFile = tuple[Path, ...] | Slice | bytes
"""Where a picture is: files of which the first that exists is meant, a piece of one, or the bytes themselves."""


class AnnotationError(ValueError):
    """An annotation file that cannot be used as it is: names the file, the position and the field."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row a shard is to hold, before its pictures have been looked at.

    Attributes:
        split: Split it belongs to. All rows of a split come one after another.
        image_id: Name of the picture in its data set.
        images: The pictures of the row.
        columns: Values of the task's other columns, such as `{"captions": [...]}`.
        where: Where the row stands in its annotation file, for messages.
        dropped: Reason -> number of texts of the row left out.
        refused: Why the whole row must be left out whatever its pictures are; empty if it need not.
    """

    split: str
    image_id: str
    images: tuple[ImageFile, ...]
    columns: dict[str, Any]
    where: str
    dropped: dict[str, int] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Request:
    """What a source is asked for.

    Attributes:
        images: Folder below which the pictures lie in the official layout.
        annotations: Files to read, in order.
        path_column: Name of the column with the picture's path, where a table may name it as it likes.
        caption_column: Likewise of the caption.
        answers: The answers that have a label, in the order of their labels.
    """

    images: Path
    annotations: Sequence[Path]
    path_column: str | None = None
    caption_column: str | None = None
    answers: Sequence[str] = ()


Published = tuple[int | None, int | None]


@dataclass(frozen=True)
class Source:
    """How a data set is read.

    Attributes:
        task: Task of its rows, a key of `shard_format.SCHEMAS`; empty if it depends on the files.
        find: raw folder -> its annotation files; raises `AnnotationError` if they are not there.
        rows: Yields the rows of a request.
        answers: The answer vocabulary that the annotation files of a request give; None: the task has none.
        task_of: The task of the files of a request, where it depends on them.
        published: Annotation file -> split -> (images, texts) as usually counted, for `stats`; None where no
            number is known.
    """

    task: str
    find: Callable[[Path], list[Path]]
    rows: Callable[[Request], Iterator[Row]]
    published: Mapping[str, Mapping[str, Published]] = field(default_factory=dict)
    answers: Callable[[Request], list[str]] | None = None
    task_of: Callable[[Request], str] | None = None


def first_existing(raw: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` below `raw` that exists.

    Raises:
        AnnotationError: None does.
    """
    for name in names:
        if (raw / name).is_file():
            return raw / name
    raise AnnotationError(f"{raw}: no {what} found; expected one of {', '.join(names)} in this folder")


def member(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[key]`, which must be of type `kind`.

    Raises:
        AnnotationError: `record` is no object, lacks the key, or holds another type there.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(_KIND_NAMES[one] for one in kinds)
    if not isinstance(record, dict):
        raise AnnotationError(f"{where}: found {record!r:.80}, expected an object with the field {key!r}")
    if key not in record:
        raise AnnotationError(
            f"{where}: field {key!r} is missing; found {sorted(record)}, expected {expected}"
        )
    value = record[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        raise AnnotationError(f"{where}: field {key!r}: found {value!r:.80}, expected {expected}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise AnnotationError(f"{where}: field {key!r}: found {value!r:.80}, expected an integer of 64 bits")
    return value


_KIND_NAMES = {str: "a text", int: "an integer", list: "a list", dict: "an object", bool: "true or false"}


def clean_texts(texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Texts without outer white space, without duplicates, in order, and how many were left out and why.

    Reasons: `empty_text`, `long_text` (over `MAX_TEXT_BYTES`), `bad_text` (half of a surrogate pair, or a
    control character), `duplicate_text`.
    """
    kept: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    for text in texts:
        text = text.strip()
        reason = text_fault(text) or ("duplicate_text" if text in kept else "")
        if reason:
            dropped[reason] += 1
        else:
            kept[text] = None
    return list(kept), dict(dropped)


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def text_fault(text: str) -> str:
    """Why a text without outer white space must be left out; empty if it need not."""
    if not text:
        return "empty_text"
    if _CONTROL.search(text):
        return "bad_text"
    if len(text) > MAX_TEXT_BYTES or len(text.encode("utf-8")) > MAX_TEXT_BYTES:
        return "long_text"
    return ""


def is_inside(name: str) -> bool:
    """Whether a path from an annotation file leads to a place below the folder it is joined to."""
    odd = name.startswith("/") or "\\" in name or _DRIVE.match(name) or _CONTROL.search(name)
    return not odd and not {"..", ".", ""} & set(name.split("/"))


_DRIVE = re.compile("[A-Za-z]:")


def inside(name: str, where: str) -> str:
    """`name`, made sure to lead nowhere else.

    Raises:
        AnnotationError: It is absolute, empty, goes up, or holds characters no file name has.
    """
    if not is_inside(name):
        raise AnnotationError(f"{where}: path {name!r:.200} may leave the raw folder; expected a plain name")
    return name


def drop(row: Row, reason: str) -> None:
    """Counts a text of the row that is left out."""
    row.dropped[reason] = row.dropped.get(reason, 0) + 1


def unique(identity: object, seen: set[Any], what: str, where: str) -> None:
    """Notes that `identity` has come.

    Raises:
        AnnotationError: It has come before.
    """
    if identity in seen:
        raise AnnotationError(f"{where}: {what} {identity!r} stands in the file twice; expected each once")
    seen.add(identity)
