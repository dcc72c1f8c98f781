"""Tar files of samples: members that share a name up to its first dot, a picture and `.txt` or `.json`.

What webdataset and img2dataset write. Tars are read from beginning to end, nothing is unpacked, and only plain
files in them are looked at. A `.json` brings its caption under `caption` or `text` (or the name given).
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from data_tools.sources.base import AnnotationError, Request, Row, Source, clean_texts
from data_tools.sources.pairs import IMAGE_SUFFIXES
from data_tools.sources.table import CAPTION_COLUMNS

MAX_MEMBER_BYTES = 128 << 20
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
            image = next((members[s[1:]] for s in IMAGE_SUFFIXES if s[1:] in members), None)
            captions, dropped = clean_texts(_texts(members, request.caption_column, where))
            if image is None:
                yield Row("train", key, ((),), {"captions": captions}, where, dropped)
            elif len(image) > MAX_MEMBER_BYTES:
                yield Row("train", key, ((),), {"captions": captions}, where, dropped, "file_too_large")
            else:
                yield Row("train", key, (image,), {"captions": captions}, where, dropped)


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, suffix, data) of the plain files of a tar; data are cut behind the limits."""
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                suffix = suffix.lower()
                if not member.isfile() or not stem:
                    continue
                is_text = suffix in ("txt", "json")
                if not is_text and f".{suffix}" not in IMAGE_SUFFIXES:
                    continue
                file = tar.extractfile(member)
                assert file is not None
                limit = MAX_TEXT_MEMBER_BYTES if is_text else MAX_MEMBER_BYTES
                yield f"{folder}/{stem}" if folder else stem, suffix, file.read(limit + 1)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AnnotationError(f"{path}: not a readable tar file to its end: {error}") from error


def _texts(members: dict[str, bytes], column: str | None, where: str) -> list[str]:
    for suffix in ("txt", "json"):
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
