"""File operations that survive a crash: data is on disk before its name appears.

Checkpoints are written by a thread beside training, so `safetensors` must let go of the interpreter's lock while it
writes. Older versions hold it; 0.8.0 is the oldest this was tested with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_BLOCK = 1 << 22


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes CPU tensors as a safetensors file and syncs it; returns its `bytes` and `sha256`.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync(path)
    return fingerprint(path)


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Writes JSON and syncs it; returns the file's `bytes` and `sha256`."""
    return write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Writes text and syncs it; returns the file's `bytes` and `sha256`."""
    path.write_text(text, encoding="utf-8")
    sync(path)
    return fingerprint(path)


def replace_text(path: Path, text: str) -> None:
    """Replaces a small file at once: readers see the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    write_text(temporary, text)
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Renames within a folder and syncs the folder."""
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that a half-deleted one never looks whole: renamed first."""
    doomed = path.with_name(f".deleting-{path.name}")
    if path.exists():
        if doomed.exists():
            shutil.rmtree(doomed)
        os.replace(path, doomed)
    if doomed.exists():
        shutil.rmtree(doomed)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
