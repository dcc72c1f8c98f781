"""Looks into a data set: rows as text, and a contact sheet of pictures with their captions."""

import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_tools.images import decode_rgb
from data_tools.shard_file import open_shard
from data_tools.shard_format import IMAGE_COLUMNS, TEXT_COLUMNS, ShardFormatError, read_manifest

_TILE = 192  # pixels
_MARGIN = 8
_COLUMNS = 4
_LINES, _LINE_WIDTH, _LINE_HEIGHT = 9, 34, 13
_TEXTS_SHOWN = 3


def rows(folder: Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a split (or of all), as dictionaries with the split under `split`.

    Raises:
        ShardFormatError: The folder breaks the contract, or there is no such split.
    """
    manifest = read_manifest(folder)
    if split is not None and split not in manifest.splits:
        raise ShardFormatError(f"{folder}: no split {split!r}; there are {sorted(manifest.splits)}")
    for name in [split] if split is not None else sorted(manifest.splits):
        for shard in manifest.splits[name].shards:
            reader = open_shard(folder / shard.file, manifest.task)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for row in range(batch.num_rows):
                    yield {
                        "split": name,
                        **{key: batch.column(key)[row].as_py() for key in batch.schema.names},
                    }


def as_text(row: dict[str, Any], task: str) -> str:
    """One row for people; pictures as their sizes."""
    sizes = "; ".join(f"{row[w]}x{row[h]}, {len(row[i])} bytes" for i, w, h in IMAGE_COLUMNS[task])
    texts = "".join(f"\n    {text}" for text in shown_texts(row, task))
    return f"{row['split']} {row['image_id']}{f' ({sizes})' if sizes else ''}{texts}"


def shown_texts(row: dict[str, Any], task: str) -> list[str]:
    """The texts of a row, each with what its task says about it."""
    texts: list[str] = row[TEXT_COLUMNS[task]]
    if task == "vqa":
        notes = [
            ", ".join(f"{answer} {score:g}" for answer, score in zip(*own, strict=True)) or "(no answers)"
            for own in zip(row["answers"], row["scores"], strict=True)
        ]
    elif task == "nlvr2":
        notes = [("false", "true")[label] for label in row["labels"]]
    elif task == "entailment":
        names = ("contradicts", "neutral to", "entailed by")
        notes = [
            f"{names[label]}: {premise}"
            for label, premise in zip(row["labels"], row["premises"], strict=True)
        ]
    elif task == "class":
        notes = [f"label {label}" for label in row["labels"]]
    elif task == "glue":
        notes = [
            f"{second} -- {label:g}" if second else f"{label:g}"
            for second, label in zip(row["second_sentences"], row["labels"], strict=True)
        ]
    else:
        return texts
    return [f"{text} -- {note}" for text, note in zip(texts, notes, strict=True)]


def contact_sheet(folder: Path, count: int, split: str | None = None) -> Image.Image:
    """A picture of the first `count` rows: image, id and first captions."""
    manifest = read_manifest(folder)
    tiles = [_tile(row, manifest.task) for row in islice(rows(folder, split), count)]
    if not tiles:
        raise ShardFormatError(f"{folder}: holds no rows to draw")
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width, lines * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return sheet


def _tile(row: dict[str, Any], task: str) -> Image.Image:
    tile = Image.new("RGB", (_TILE + 2 * _MARGIN, _TILE + 2 * _MARGIN + _LINES * _LINE_HEIGHT), "white")
    images = [decode_rgb(row[image]) for image, _, _ in IMAGE_COLUMNS[task]]
    room = (_TILE - _MARGIN * (len(images) - 1)) // max(1, len(images))
    for place, image in enumerate(images):
        scale = min(room / image.width, _TILE / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        left = _MARGIN + place * (room + _MARGIN) + (room - size[0]) // 2
        top = _MARGIN + (_TILE - size[1]) // 2
        tile.paste(image.resize(size, smooth), (left, top))
    texts = [row["split"], row["image_id"], *(f"- {text}" for text in shown_texts(row, task)[:_TEXTS_SHOWN])]
    lines = [line for text in texts for line in textwrap.wrap(text, _LINE_WIDTH)][:_LINES]
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default()
    for number, line in enumerate(lines):
        plain = line.encode("latin-1", "replace").decode("latin-1")  # the built-in font has no more letters
        draw.text((_MARGIN, _TILE + 2 * _MARGIN + number * _LINE_HEIGHT - 4), plain, "black", font)
    return tile
