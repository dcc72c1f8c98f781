"""Reads the entries of large JSON lists one at a time, with the position of every fault.

Annotation files reach a gigabyte; parsed whole they would take several in memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.base import AnnotationError

BLOCK = 1 << 20
MAX_ENTRY = 64 << 20  # characters of one entry
_EDGE = 4096
_SPACE = " \t\r\n"


def entries(path: Path, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (position, entry) for each entry of a list.

    Args:
        path: A JSON file.
        key: The list is this member of the outermost object; None: the file is the list.

    Yields:
        A position such as `FILE: images[12]`, for messages, and the parsed entry.

    Raises:
        AnnotationError: The file is not JSON, or not of that form; names line and column.
    """
    with _Reader(path) as reader:
        if key is None:
            yield from reader.items("entry ")
            return
        found = False
        for name in reader.names():
            if name == key:
                if found:
                    raise reader.fault(f"the member {key!r} stands in the object twice")
                found = True
                yield from reader.items(key)
            else:
                reader.skip()
        if not found:
            raise AnnotationError(
                f"{path}: field {key!r} is missing; expected an object with a list of that name"
            )


class _Reader:
    """A window on a JSON text: `_text` from the current value on, `_at` the place in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text, self._at = "", 0
        self._line, self._column = 1, 1  # of the start of _text
        self._ended = False
        self._decoder = json.JSONDecoder()

    def __enter__(self) -> "_Reader":
        try:
            self._file = self._path.open(encoding="utf-8-sig")
        except OSError as error:
            raise AnnotationError(f"{self._path}: cannot be read ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def items(self, name: str) -> Iterator[tuple[str, Any]]:
        """The entries of the list that starts here."""
        number = 0
        self.expect("[", f"the start of the list {name.strip()!r}")
        if self.peek() == "]":
            self.expect("]", "")
            return
        while True:
            where = f"{self._path}: {name}[{number}]"
            yield where, self.value(where)
            number += 1
            if self.peek() == "]":
                self.expect("]", "")
                return
            self.expect(",", f"',' or ']' after {name}[{number - 1}]")

    def names(self) -> Iterator[str]:
        """The member names of the object that starts here; the caller reads each value before the next."""
        self.expect("{", "the start of an object")
        if self.peek() == "}":
            return
        while True:
            name = self.value(f"{self._path}: member name")
            if not isinstance(name, str):
                raise self.fault(f"found {name!r:.80}, expected a member name")
            self.expect(":", f"':' after {name!r:.80}")
            yield name
            if self.peek() == "}":
                return
            self.expect(",", f"',' or '}}' after the member {name!r:.80}")

    def skip(self) -> None:
        """Passes over one value, lists entry by entry."""
        if self.peek() == "[":
            for _ in self.items("a list that is not needed"):
                pass
        else:
            self.value(str(self._path))

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def expect(self, character: str, what: str) -> None:
        found = self.peek()
        if found != character:
            raise self.fault(
                f"found {found!r}, expected {what}" if found else f"the file ends; expected {what}"
            )
        self._at += 1

    def value(self, where: str) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # An error well before the edge of the window does not come from the edge.
                cut = error.pos > len(self._text) - _EDGE or error.msg.startswith("Unterminated string")
                if cut and self._more():
                    continue
                raise self.fault(f"{where}: {error.msg}", error.pos) from error
            except RecursionError as error:
                raise self.fault(f"{where}: nested too deep") from error
            except ValueError as error:  # such as an integer of thousands of digits
                raise self.fault(f"{where}: {error}") from error
            if end + 3 <= len(self._text) or not self._more():  # a number at the edge may go on: "e+5"
                self._at = end
                return value

    def _more(self) -> bool:
        """Reads on; False at the end of the file. Doubles the window while one value does not fit."""
        if self._ended:
            return False
        kept = len(self._text) - self._at
        if kept > MAX_ENTRY:
            raise self.fault(f"an entry is longer than {MAX_ENTRY >> 20} Mi characters, or not closed")
        try:
            text = self._file.read(max(BLOCK, kept))
        except UnicodeDecodeError as error:
            raise self.fault(f"not UTF-8 somewhere behind this place: {error.reason}") from error
        if not text:
            self._ended = True
            return False
        passed = self._text[: self._at]
        self._line, self._column = _advance(self._line, self._column, passed)
        self._text, self._at = self._text[self._at :] + text, 0
        return True

    def fault(self, message: str, at: int | None = None) -> AnnotationError:
        before = self._text[: self._at if at is None else at]
        line, column = _advance(self._line, self._column, before)
        return AnnotationError(f"{self._path}: line {line} column {column}: {message}")


def _advance(line: int, column: int, text: str) -> tuple[int, int]:
    """Line and column behind `text`, which begins at (line, column)."""
    lines = text.count("\n")
    return line + lines, len(text) - text.rfind("\n") if lines else column + len(text)
