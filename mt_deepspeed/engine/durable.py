"""File operations that survive a crash: data is on disk before its name appears."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK = 1 << 22


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes CPU tensors as a safetensors file and syncs it; returns its `bytes` and `sha256`.

    Not by safetensors' own writer, which holds the interpreter's lock, so that training would stand still, copies
    everything first, and leaves the file to be read again for its hash. The format: length of the header (u64,
    little-endian), header (JSON, padded to 8 bytes), then the tensors, widest elements first, without gaps.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        kind = SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for block in itertools.chain([head], _blocks(ordered)):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(tensors: list[tuple[str, Tensor]]) -> Iterator[memoryview]:
    for _, tensor in tensors:
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        yield from (data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK))


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
