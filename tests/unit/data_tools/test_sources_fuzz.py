"""Damaged annotation files: rows or one clear error, never anything else."""

import random
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.shard_format import SCHEMAS, TEXT_COLUMNS
from data_tools.sources import SOURCES, AnnotationError, Request
from data_tools.synthetic.layouts import LAYOUTS
from data_tools.synthetic.packed_layouts import PACKED_LAYOUTS

TRIALS = 60


def damage(data: bytes, draws: random.Random) -> bytes:
    """Cuts, flips, repeats or mixes up pieces of a file."""
    changed = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(changed) or 1)
        kind = draws.randrange(6)
        if kind == 0:
            del changed[at:]
        elif kind == 1 and changed:
            changed[at] ^= 1 << draws.randrange(8)
        elif kind == 2:
            changed[at : at + draws.randint(1, 40)] = b""
        elif kind == 3:
            start = draws.randrange(len(data))
            changed[at:at] = data[start : start + draws.randint(1, 200)]
        elif kind == 4:
            changed[at:at] = draws.choice(
                [b"null", b"NaN", b'"', b"{", b"]", b"\0", b"\xff", b"../", b"\n", b"1e999"]
            )
        else:
            changed[at : at + 1] = draws.choice([b"0", b"-1", b"true", b"[]", b"\\ud800", b",", b":"])
    return bytes(changed)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(PACKED_LAYOUTS) | {"table"}))
def test_damaged_annotations(layout: str, tmp_path: Path) -> None:
    world = ["--num-images", "24", "--image-size", "32", "--workers", "1", "--layout", layout]
    assert main(["synth", "--out", str(tmp_path), *world]) == 0
    raw, source = tmp_path / layout, SOURCES[layout.removesuffix("-official")]
    files = source.find(raw)
    whole = {path: path.read_bytes() for path in files}
    columns = {name for name in SCHEMAS[source.task].names if name != "image_id"}
    draws = random.Random(layout)
    faults = 0
    for _ in range(TRIALS):
        path = draws.choice(files)
        path.write_bytes(damage(whole[path], draws))
        try:
            for row in source.rows(Request(raw, files, answers=("yes", "no", "red", "2"))):
                assert set(row.columns) < columns
                assert len({len(values) for values in row.columns.values()}) == 1
                for text in row.columns[TEXT_COLUMNS[source.task]]:
                    assert text.encode("utf-8")
                for image in row.images:
                    assert isinstance(image, tuple)
                    assert all(raw in file.parents and ".." not in file.parts for file in image)
        except AnnotationError as error:
            faults += 1
            message = str(error)
            assert path.name in message, message
            assert len(message) < 1000
        path.write_bytes(whole[path])
    assert faults > TRIALS / 10
