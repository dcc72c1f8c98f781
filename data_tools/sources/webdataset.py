"""Tar files of samples: members that share a name up to its first dot, a picture and `.txt` or `.json`.

What webdataset and img2dataset write. Tars are read from beginning to end, nothing is unpacked, and only plain
files in them are looked at. A `.json` brings its caption under `caption` or `text` (or the name given).
"""

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from data_tools.images import MAX_FILE_BYTES
from data_tools.sources.base import AnnotationError, Request, Row, Slice, Source, clean_texts
from data_tools.sources.pairs import IMAGE_SUFFIXES
from data_tools.sources.table import CAPTION_COLUMNS

TEXT_SUFFIXES = ("txt", "json")
MAX_TEXT_MEMBER_BYTES = 1 << 20


def find(raw: Path) -> list[Path]:
    """All tars below the folder, in the order of their names."""
    found = sorted(path for path in raw.rglob("*") if path.name.endswith((".tar", ".tar.gz", ".tgz")))
    if not found:
        raise AnnotationError(f"{raw}: no tar files; expected some ending in .tar, .tar.gz or .tgz")
    return found


def rows(request: Request) -> Iterator[Row]:
    """One row a sample that has a picture, all in split `train`."""
    for path in request.annotations:
        for key, group in groupby(_members(path), key=lambda member: member[0]):
            members = {suffix: data for _, suffix, data in group}
            where = f"{path}: sample {key}"
            image = next((members[s[1:]] for s in IMAGE_SUFFIXES if s[1:] in members), ())
            texts = {s: data for s, data in members.items() if isinstance(data, bytes) and s in TEXT_SUFFIXES}
            captions, dropped = clean_texts(_texts(texts, request.caption_column, where))
            yield Row("train", key, (image,), {"captions": captions}, where, dropped)


def _members(path: Path) -> Iterator[tuple[str, str, bytes | Slice]]:
    """(key, suffix, data) of the plain files of a tar; data are cut behind the limits.

    Pictures of an uncompressed tar are only pointed to.
    """
    try:
        tar, is_plain = _open(path)
        with tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or all that have come are kept
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                suffix = suffix.lower()
                if not member.isfile() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if suffix in TEXT_SUFFIXES:
                    yield key, suffix, _read(tar, member, MAX_TEXT_MEMBER_BYTES)
                elif f".{suffix}" in IMAGE_SUFFIXES:
                    if is_plain and not member.issparse():
                        yield key, suffix, Slice(path, member.offset_data, member.size)
                    else:
                        yield key, suffix, _read(tar, member, MAX_FILE_BYTES)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise AnnotationError(f"{path}: not a readable tar file to its end: {error}") from error


def _open(path: Path) -> tuple[tarfile.TarFile, bool]:
    """The tar, and whether its members lie in the file as they are."""
    try:
        return tarfile.open(path, "r:"), True
    except tarfile.ReadError:  # compressed, or no tar
        return tarfile.open(path, "r|*"), False


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    """The data of a member, at most one byte more than the limit."""
    file = tar.extractfile(member)
    assert file is not None
    return file.read(limit + 1)


def _texts(members: dict[str, bytes], column: str | None, where: str) -> list[str]:
    for suffix in TEXT_SUFFIXES:
        if len(members.get(suffix, b"")) > MAX_TEXT_MEMBER_BYTES:
            raise AnnotationError(f"{where}.{suffix}: longer than {MAX_TEXT_MEMBER_BYTES} bytes")
    try:
        if "txt" in members and column is None:
            return [line for line in members["txt"].decode("utf-8").splitlines() if line.strip()]
        if "json" not in members:
            return []
        record: Any = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{where}: text: {error}") from error
    if not isinstance(record, dict):
        raise AnnotationError(f"{where}.json: found {record!r:.80}, expected an object")
    names = [column] if column is not None else list(CAPTION_COLUMNS)
    texts: Any = next((record[name] for name in names if record.get(name) is not None), [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise AnnotationError(f"{where}.json: caption: found {texts!r:.80}, expected a text or texts")
    return texts


SOURCE = Source("caption", find, rows)
