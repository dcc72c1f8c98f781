"""Looks at the pictures of a row: reads them, judges them, makes them smaller if asked to."""

import errno
import io
import stat
from dataclasses import dataclass
from pathlib import Path

from data_tools.images import MAX_FILE_BYTES, ImageRefused, Picture, check_image
from data_tools.resize import Resize, resized
from data_tools.sources.base import ImageFile, Row, Slice


@dataclass(frozen=True)
class Checked:
    """What became of the pictures of a row: all of them, or the reason for refusing the row."""

    pictures: tuple[Picture, ...]
    reason: str = ""
    detail: str = ""


class PictureReader:
    """Reads pictures; of the files that hold several it keeps the last one open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: io.FileIO | None = None

    def __enter__(self) -> "PictureReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def check(self, row: Row, text_column: str, resize: Resize | None) -> Checked:
        """Reads and checks the pictures of a row that is not left out anyway."""
        if row.refused:
            return Checked((), row.refused)
        if not row.columns[text_column]:
            return Checked((), "no_text")
        try:
            pictures = tuple(check_image(self.read(image)) for image in row.images)
        except ImageRefused as refused:
            return Checked((), refused.reason, refused.detail)
        return Checked(pictures if resize is None else tuple(resized(one, resize) for one in pictures))

    def read(self, image: ImageFile) -> bytes:
        """The bytes of a picture.

        Raises:
            ImageRefused: It is not there, too large or not to be read.
            OSError: A fault of the machine.
        """
        if isinstance(image, tuple):
            return _read_first(image)
        if (len(image) if isinstance(image, bytes) else image.size) > MAX_FILE_BYTES:
            raise ImageRefused("file_too_large")
        return image if isinstance(image, bytes) else self._read_slice(image)

    def _read_slice(self, image: Slice) -> bytes:
        if self._file is None or self._path != image.path:
            if self._file is not None:
                self._file.close()
            self._path, self._file = image.path, io.FileIO(image.path)
        self._file.seek(image.start)
        data = bytearray()
        while len(data) < image.size:
            piece = self._file.read(image.size - len(data))
            if not piece:
                raise OSError(f"{image.path}: became shorter while it was read")
            data += piece
        return bytes(data)


def _read_first(paths: tuple[Path, ...]) -> bytes:
    """The first file that is there."""
    for path in paths:
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ImageRefused("unreadable_file", f"{path}: not a file")
            if found.st_size > MAX_FILE_BYTES:
                raise ImageRefused("file_too_large", str(path))
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file can have such a name
                continue
            if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise ImageRefused("unreadable_file", f"{path}: {error.strerror}") from error
            raise  # a fault of the machine, not of the file
    raise ImageRefused("missing_file", str(paths[0]) if paths else "no file name")
