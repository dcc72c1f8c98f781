"""Untrained models of each task with their processor, and a folder of pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mt_deepspeed.config import RunConfig
from mt_deepspeed.data.text import load_tokenizer, train_tokenizer
from mt_deepspeed.pretrained.model import Pretrained
from mt_deepspeed.tasks import build_task
from tests.helpers.datasets import VOCABULARY, make_rows
from tests.helpers.task_runs import ANSWERS, task_config


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of `VOCABULARY` entries."""
    train_tokenizer([text for row in make_rows(40) for text in row["captions"]], folder, VOCABULARY)
    return folder


def tiny_pretrained(
    tokenizer: Path, task: str, config: RunConfig | None = None, **changes: Any
) -> Pretrained:
    """A model of a few thousand random parameters."""
    config = config or task_config(tokenizer.parent, task, **changes)
    torch.manual_seed(3)
    reader = load_tokenizer(str(tokenizer), ".", config.data.max_text_len, special_in_text=True)
    return Pretrained(
        config, build_task(config), reader, {"made": "by a test"}, ANSWERS if task == "vqa" else ()
    )


def write_pictures(folder: Path, count: int) -> list[Path]:
    """`a0.png`, `a1.png`, ... of one colour each."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"a{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        pixels = np.full((20, 24, 3), (number * 60 % 256, 90, 255 - number * 60 % 256), np.uint8)
        Image.fromarray(pixels).save(file)
    return files
