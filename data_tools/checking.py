"""What worker processes do with the pictures of rows: read them, judge them, make them smaller if asked to."""

import errno
import stat
from dataclasses import dataclass

from data_tools.images import MAX_FILE_BYTES, ImageRefused, Picture, check_image
from data_tools.resize import Resize, resized
from data_tools.sources.base import ImageFile


@dataclass(frozen=True)
class Checked:
    """What became of the pictures of a row: all of them, or the reason for refusing the row."""

    pictures: tuple[Picture, ...]
    reason: str = ""
    detail: str = ""


def check_rows(chunk: list[tuple[ImageFile, ...] | None], resize: Resize | None) -> list[Checked]:
    """Reads and checks the pictures of rows; None stands for a row that is left out anyway."""
    return [Checked((), "no_text") if images is None else _check_row(images, resize) for images in chunk]


def _check_row(images: tuple[ImageFile, ...], resize: Resize | None) -> Checked:
    try:
        pictures = tuple(check_image(_read(image)) for image in images)
    except ImageRefused as refused:
        return Checked((), refused.reason, refused.detail)
    return Checked(pictures if resize is None else tuple(resized(one, resize) for one in pictures))


def _read(image: ImageFile) -> bytes:
    if isinstance(image, bytes):
        return image
    for path in image:
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
    raise ImageRefused("missing_file", str(image[0]) if image else "no file name")
