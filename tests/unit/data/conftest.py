"""Small shard folders for the tests of the data room, written straight with pyarrow."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_tools.shard_format import (
    CAPTION_SCHEMA,
    Manifest,
    ShardInfo,
    SplitInfo,
    shard_name,
    write_manifest,
)

WORDS = ["a", "red", "blue", "small", "round", "cube", "ball", "near", "above", "left", "of", "the", "two"]
Row = dict[str, Any]


def encode_image(seed: int, size: tuple[int, int] = (24, 20), kind: str = "JPEG") -> bytes:
    """A file of noise in a plain colour, (width, height) pixels."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.integers(0, 256, 3) + rng.normal(0, 9, (size[1], size[0], 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows with one to four captions of one to nine words, and images of several shapes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        captions = [" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(rng.integers(1, 5))]
        size = (int(rng.integers(16, 40)), int(rng.integers(16, 40)))
        rows.append(
            {
                "image": encode_image(seed + i, size, "PNG" if i % 5 == 0 else "JPEG"),
                "captions": [f"{caption} {i} {k}" for k, caption in enumerate(captions)],
                "image_id": f"picture-{seed}-{i}.jpg",
                "width": size[0],
                "height": size[1],
            }
        )
    return rows


def write_dataset(
    folder: Path, splits: Mapping[str, Sequence[Row]], rows_per_shard: int = 10, rows_per_batch: int = 4
) -> Path:
    """Writes a data set folder as the shard contract says, with small shards and record batches."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for split, rows in splits.items():
        shards: list[ShardInfo] = []
        for start in range(0, len(rows), rows_per_shard):
            part = rows[start : start + rows_per_shard]
            path = folder / shard_name(split, len(shards))
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, CAPTION_SCHEMA) as writer:
                for first in range(0, len(part), rows_per_batch):
                    batch = part[first : first + rows_per_batch]
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=CAPTION_SCHEMA))
            data = path.read_bytes()
            texts = sum(len(row["captions"]) for row in part)
            shards.append(ShardInfo(path.name, len(part), texts, len(data), hashlib.sha256(data).hexdigest()))
        described[split] = SplitInfo.of(tuple(shards))
    write_manifest(folder, Manifest(folder.name, "caption", "test", {}, described, {}, ()))
    return folder


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Row]]:
    return make_rows


@pytest.fixture(scope="session")
def dataset_writer() -> Callable[..., Path]:
    return write_dataset


@pytest.fixture(scope="session")
def image_encoder() -> Callable[..., bytes]:
    return encode_image
