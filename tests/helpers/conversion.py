"""Small conversions: rows with drawn pictures, and what became of them."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.checking import PictureReader
from data_tools.sources import Row
from data_tools.verify import verify
from data_tools.writer import Job


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16 + number % 5, 3), number * 7 % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(sizes: Sequence[tuple[str, int]], bad: int = 7, seed: int = 0) -> list[Row]:
    """Rows of splits; every `bad`-th picture is not one."""
    found = []
    for split, size in sizes:
        for i in range(size):
            data = b"no picture" if i % bad == bad - 1 else picture(i + seed)
            captions = [f"{split} {i} caption {k}" for k in range(i % 3 + 1)]
            found.append(Row(split, f"{i}", (data,), {"captions": captions}, f"rows[{i}]", {}))
    return found


def job(rows: Sequence[Row] | Iterator[Row], folder: Path, policy: str = "skip", **more: Any) -> Job:
    note = folder / "annotations.txt"
    if not note.exists():
        note.write_text("x", "utf-8")
    return Job("test", "caption", rows, folder, (note,), {}, policy, **more)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(row: Row) -> list[bytes]:
    """The bytes of a row's pictures, wherever they lie."""
    with PictureReader() as reader:
        return [reader.read(image) for image in row.images]


def faults(folder: Path) -> list[str]:
    return [fault for _, found in verify(folder, full=True) for fault in found]
