"""What is asked of a model: rows of a JSONL file or of the command line, checked before any work."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SHOWN = 20
"""Wrong rows named in one error."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

RESULTS = {
    "fill-mask": ("masks", "error"),
    "answer": ("answers", "error"),
    "entail": ("label", "probabilities", "error"),
    "compare": ("label", "probabilities", "error"),
}
"""Keys that results add to a row."""

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A text about one picture, or about two."""

    images: tuple[Path, ...]
    text: str
    given: dict[str, Any]
    """The row as it was given; results are added to it."""


def question(row: Any, ability: str, folder: Path) -> Question:
    """One row, checked.

    Args:
        row: `{"image": FILE, "text": TEXT, ...}`; for `compare` two files.
        ability: What is asked, a key of `model.ABILITIES`.
        folder: Where relative picture files start.

    Raises:
        ValueError: A key is missing, of another kind or has the name of a result, a picture file is not there, or
            a text lacks its `<mask>`.
    """
    text = text_of(row)
    for key in RESULTS[ability]:
        if key in row:
            raise ValueError(f"{key}: {ability} writes its result under this name; rename the row's own")
    files = row.get("image")
    count = 2 if ability == "compare" else 1
    wanted = "a list of two files, left and right" if count == 2 else "a file"
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or len(files) != count or not all(isinstance(f, str) for f in files):
        raise ValueError(f"image: found {row.get('image')!r}, expected {wanted}")
    images = tuple(folder / file for file in files)
    for image in images:
        if not image.is_file():
            raise ValueError(f"image: no file {image}")
    if ability == "fill-mask" and "<mask>" not in text:
        raise ValueError(f"text: found no <mask> in {text!r}, expected at least one")
    return Question(images, text, row)


def text_of(row: Any) -> str:
    """The text of a row.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {row!r}, expected an object with its keys in quotes")
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text: found {text!r}, expected a text")
    return text


def _parsed(line: bytes) -> Any:
    """A line of JSON whose strings can all be written again: half a surrogate pair could not."""
    row = json.loads(line)
    json.dumps(row, ensure_ascii=False).encode()
    return row


def read_rows(file: Path, check: Callable[[Any], T]) -> list[T]:
    """Every row of a JSONL file, checked; empty lines are passed over.

    Raises:
        ValueError: Rows that are no JSON or that `check` refuses, each with file and line; or there is no row.
        OSError: The file cannot be read.
    """
    rows: list[T] = []
    wrong: list[str] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(check(_parsed(line)))
            except json.JSONDecodeError as error:
                wrong.append(f"{file}:{number}: not JSON: {error}")
            except UnicodeError as error:
                wrong.append(f"{file}:{number}: not UTF-8: {error}")
            except ValueError as error:
                wrong.append(f"{file}:{number}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        listed = "\n  ".join(wrong[:SHOWN] + more)
        raise ValueError(f"{len(wrong)} of {len(wrong) + len(rows)} rows cannot be used:\n  {listed}")
    if not rows:
        raise ValueError(f"{file}: found no row, expected one JSON object a line")
    return rows


def pictures_in(places: Sequence[Path]) -> list[Path]:
    """Picture files: those given, and all below the folders given, in order of their names.

    Raises:
        ValueError: A place is not there, or a folder holds no pictures.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            below = sorted(_pictures(place.rglob("*")))
            if not below:
                raise ValueError(f"{place}: found no pictures ({', '.join(SUFFIXES)})")
            found += below
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place}: no such file or folder")
    return found


def _pictures(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
