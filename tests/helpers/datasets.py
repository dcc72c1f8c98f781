"""Small shard folders, written straight with pyarrow, and streams over them."""

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_tools.shard_format import (
    SCHEMAS,
    TEXT_COLUMNS,
    Manifest,
    ShardInfo,
    SplitInfo,
    shard_name,
    write_manifest,
)
from mt_deepspeed.config.model import ModelConfig, TextTowerConfig, VisionTowerConfig
from mt_deepspeed.config.run import DataConfig, DatasetConfig, ObjectivesConfig, RunConfig, TrainConfig
from mt_deepspeed.data.collate import Batch
from mt_deepspeed.data.pipeline import TrainStream
from mt_deepspeed.data.text import train_tokenizer

VOCABULARY = 320

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
    folder: Path,
    splits: Mapping[str, Sequence[Row]],
    rows_per_shard: int = 10,
    rows_per_batch: int = 4,
    task: str = "caption",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a data set folder as the shard contract says, with small shards and record batches."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = SCHEMAS[task]
    described = {}
    for split, rows in splits.items():
        shards: list[ShardInfo] = []
        for start in range(0, len(rows), rows_per_shard):
            part = rows[start : start + rows_per_shard]
            path = folder / shard_name(split, len(shards))
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for first in range(0, len(part), rows_per_batch):
                    batch = part[first : first + rows_per_batch]
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            data = path.read_bytes()
            texts = sum(len(row[TEXT_COLUMNS[task]]) for row in part)
            shards.append(ShardInfo(path.name, len(part), texts, len(data), hashlib.sha256(data).hexdigest()))
        described[split] = SplitInfo.of(tuple(shards))
    write_manifest(folder, Manifest(folder.name, task, "test", options or {}, described, {}, ()))
    return folder


def write_root(root: Path) -> Path:
    """Data sets `one` (train, val) and `two` (train, extra), and a tokenizer."""
    write_dataset(root / "one", {"train": make_rows(23), "val": make_rows(7, seed=50)})
    write_dataset(root / "two", {"train": make_rows(11, seed=100), "extra": make_rows(3, seed=150)})
    captions = [caption for row in make_rows(40) for caption in row["captions"]]
    train_tokenizer(captions, root / "tokenizer", VOCABULARY)
    return root


def configuration(root: Path, **changes: Any) -> RunConfig:
    """A small run; `changes` name fields of the data, objectives and train sections."""
    sections: dict[str, Any] = {
        "data": DataConfig(
            root=str(root),
            train=(DatasetConfig(path="one"), DatasetConfig(path="two", splits=("train", "extra"))),
            eval=(DatasetConfig(path="one", splits=("val",)),),
            tokenizer="tokenizer",
            max_text_len=12,
            num_workers=0,
            train_transform="albef_randaug",
        ),
        "objectives": ObjectivesConfig(),
        "train": TrainConfig(global_batch_size=8, micro_batch_size=2, seed=3),
    }
    for name, section in sections.items():
        fields = {field.name for field in dataclasses.fields(section)}
        own = {key: value for key, value in changes.items() if key in fields}
        sections[name] = dataclasses.replace(section, **own)
    model = ModelConfig(
        text=TextTowerConfig(vocab_size=VOCABULARY, max_positions=40),
        vision=VisionTowerConfig(image_size=16, patch_size=8),
    )
    return RunConfig(model=model, **sections)


def take(
    config: RunConfig, first_step: int, steps: int, rank: int = 0, world_size: int = 1
) -> list[list[Batch]]:
    """The micro-batches of one rank in some steps."""
    stream = TrainStream(config, rank, world_size)
    result = list(itertools.islice(stream.steps(first_step), steps))
    stream.close()
    return result
