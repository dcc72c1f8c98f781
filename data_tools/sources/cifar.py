"""CIFAR-10 and CIFAR-100: pictures of 32 x 32 pixels, each of one class, in the official binary version.

Raw folder: `cifar-10-batches-bin/` with `data_batch_1.bin` to `data_batch_5.bin`, `test_batch.bin` and
`batches.meta.txt`; `cifar-100-binary/` with `train.bin`, `test.bin` and `fine_label_names.txt` (or these files
themselves). One row a picture, stored as PNG, so no pixel changes. Of CIFAR-100's two labels the fine one is kept.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.sources.answers import check_vocabulary
from data_tools.sources.base import AnnotationError, Request, Row, Source
from data_tools.sources.tables import lines

SIDE = 32
_PIXEL_BYTES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """How one of the two is laid out.

    Attributes:
        folder: What the official archive unpacks to.
        files: File -> split, in the order of the rows.
        names: File of the class names, one a line.
        num_classes: Names and labels.
        label_bytes: Bytes before the pixels of a record; the last one is the label.
    """

    folder: str
    files: dict[str, str]
    names: str
    num_classes: int
    label_bytes: int


def find(layout: Layout, raw: Path) -> list[Path]:
    """The names, then all batches; a data set that is there in part is refused."""
    folder = raw / layout.folder if (raw / layout.folder).is_dir() else raw
    found = [folder / name for name in (layout.names, *layout.files)]
    for path in found:
        if not path.is_file():
            raise AnnotationError(
                f"{path}: not there; expected {layout.names} and {', '.join(layout.files)} of the binary version in "
                f"{raw / layout.folder}"
            )
    return found


def class_names(layout: Layout, request: Request) -> list[str]:
    """The names of the classes in the order of their labels."""
    files = [path for path in request.annotations if path.name == layout.names]
    if not files:
        raise AnnotationError(f"--annotations: {layout.names} is missing, expected the names of the classes")
    names = [line.strip() for _, line in lines(files[0]) if line.strip()]
    if len(names) != layout.num_classes:
        raise AnnotationError(f"{files[0]}: {len(names)} names, expected {layout.num_classes}, one a line")
    return check_vocabulary(names, str(files[0]))


def rows(layout: Layout, request: Request) -> Iterator[Row]:
    """One row a picture, in the order of the files."""
    if len(request.answers) != layout.num_classes:
        raise AnnotationError(f"--answers: {len(request.answers)} classes, expected {layout.num_classes}")
    for path in request.annotations:
        if path.name == layout.names:
            continue
        if path.name not in layout.files:
            raise AnnotationError(f"{path}: expected one of {', '.join(layout.files)}")
        for number, (label, pixels) in enumerate(_records(path, layout)):
            columns = {"classes": [request.answers[label]], "labels": [label]}
            image_id = f"{path.name}:{number}"
            where = f"{path}: record {number}"
            yield Row(layout.files[path.name], image_id, (_png(pixels),), columns, where)


def _records(path: Path, layout: Layout) -> Iterator[tuple[int, bytes]]:
    """(label, pixels) of every record."""
    size = layout.label_bytes + _PIXEL_BYTES
    try:
        with path.open("rb") as file:
            number = 0
            while record := file.read(size):
                where = f"{path}: record {number}"
                if len(record) != size:
                    raise AnnotationError(f"{where}: cut short: {len(record)} bytes, expected {size}")
                label = record[layout.label_bytes - 1]
                if label >= layout.num_classes:
                    raise AnnotationError(
                        f"{where}: label: found {label}, expected 0 to {layout.num_classes - 1}"
                    )
                yield label, record[layout.label_bytes :]
                number += 1
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror})") from error
    if not number:
        raise AnnotationError(f"{path}: empty, expected records of {size} bytes")


def _png(pixels: bytes) -> bytes:
    """PNG of red, green and blue planes, row by row."""
    planes = np.frombuffer(pixels, np.uint8).reshape(3, SIDE, SIDE)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _source(layout: Layout) -> Source:
    first = {split: file for file, split in reversed(layout.files.items())}
    counts = {"train": (50_000, 50_000), "test": (10_000, 10_000)}
    return Source(
        task="class",
        find=partial(find, layout),
        rows=partial(rows, layout),
        published={file: {split: counts[split]} for split, file in first.items()},
        answers=partial(class_names, layout),
    )


CIFAR10 = _source(
    Layout(
        folder="cifar-10-batches-bin",
        files={**{f"data_batch_{number}.bin": "train" for number in range(1, 6)}, "test_batch.bin": "test"},
        names="batches.meta.txt",
        num_classes=10,
        label_bytes=1,
    )
)
CIFAR100 = _source(
    Layout(
        folder="cifar-100-binary",
        files={"train.bin": "train", "test.bin": "test"},
        names="fine_label_names.txt",
        num_classes=100,
        label_bytes=2,
    )
)
