"""Files that appear whole or not at all."""

import hashlib
import os
from pathlib import Path

HASH_BLOCK_BYTES = 1 << 20


def hash_file(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def temporary_path(path: Path) -> Path:
    """Where a file lies while it is being written, beside `path` so that the rename stays on one disk."""
    return path.with_name(f".{path.name}.tmp")


def publish(path: Path) -> None:
    """Makes a finished temporary file durable and gives it its name in one step."""
    temporary = temporary_path(path)
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Makes what a file holds durable."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a crash leaves the old file or the new one, never a part."""
    temporary_path(path).write_bytes(data)
    publish(path)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable; systems without folder handles need nothing."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
