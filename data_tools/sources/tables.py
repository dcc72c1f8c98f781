"""Text files of one record a line."""

from collections.abc import Iterator
from pathlib import Path

from data_tools.sources.base import AnnotationError

MAX_LINE_BYTES = 16 << 20


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (position, line without its end) for each line of a UTF-8 file; empty lines keep their number.

    Raises:
        AnnotationError: The file cannot be read, or a line is too long or not UTF-8.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(data) > MAX_LINE_BYTES:
                raise AnnotationError(
                    f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; expected one record a line"
                )
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise AnnotationError(
                    f"{where} column {error.start + 1}: not UTF-8: {error.reason}"
                ) from error
            yield where, text.rstrip("\r\n")
