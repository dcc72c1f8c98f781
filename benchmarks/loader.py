"""Loading for pre-training: decoded, augmented, batched samples per second of one core, all ways side by side.

    python -m benchmarks.loader [--images N] [--size WxH] [--side S] [--turns T] [--batches B] [--save] [FOLDER]

The same pictures (of FOLDER, or made) with the same captions go into our shards, a tar for webdataset, MDS shards for
mosaicml-streaming and one Arrow table as the published code keeps it. All ways run in this process, one thread each,
and take turns of B batches, so that what else runs on the machine meets all of them; a rate is samples per second of
*processor time*, the median over the turns. Every way also tokenises and masks its captions with our tokenizer.

| way | what it does |
|---|---|
| limit | decodes JPEGs that lie in memory, resizes them into a batch; no text: what decoder and resizer allow |
| ours | the training stream, MLM on, ITM off: one picture a sample |
| webdataset, streaming | the libraries as their manuals show: Pillow, torchvision's transforms, normalised floats |
| ..., our decoder | the same with our decoding and resizing, pixels as bytes |
| ours, ITM | the training stream with false pictures for half of the samples |
| reference | whole table mapped, random rows, Pillow, and a second picture for every sample |

What is not installed is left out (`pip install webdataset mosaicml-streaming`).
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from benchmarks.convert import made_picture
from benchmarks.record import add_save, append
from data_tools.shard_format import (
    CAPTION_SCHEMA,
    ROWS_PER_BATCH,
    Manifest,
    ShardInfo,
    SplitInfo,
    shard_name,
    write_manifest,
)
from mt_deepspeed.config import DataConfig, DatasetConfig, ObjectivesConfig, RunConfig, TrainConfig
from mt_deepspeed.config.model import ModelConfig, TextTowerConfig, VisionTowerConfig
from mt_deepspeed.data.collate import pad
from mt_deepspeed.data.images import decode_image
from mt_deepspeed.data.keyed import Purpose, keyed_generator
from mt_deepspeed.data.pipeline import TrainStream
from mt_deepspeed.data.text import CaptionTokenizer, load_tokenizer, train_tokenizer
from mt_deepspeed.data.transforms import ImageTransform
from mt_deepspeed.models.vision_tower import MEAN, STD

BATCH = 32
MAX_TEXT_LEN = 50
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "small",
    "dog",
    "cat",
    "man",
    "woman",
    "street",
    "beach",
    "riding",
    "near",
)
Row = dict[str, Any]
Batches = Iterator[Any]


def made_rows(count: int, width: int, height: int) -> list[Row]:
    """JPEGs of quality 90 with about as many bytes as photographs have, and a caption each."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        data = made_picture(rng, width, height)
        rows.append(row(data, " ".join(rng.choice(WORDS, rng.integers(6, 16))), i))
    return rows


def row(data: bytes, caption: str, number: int) -> Row:
    width, height = Image.open(io.BytesIO(data)).size
    name = f"{number:08d}"
    return {"image": data, "captions": [caption], "image_id": name, "width": width, "height": height}


# Writing the same rows in each layout.


def write_shards(folder: Path, rows: list[Row]) -> None:
    folder.mkdir()
    path = folder / shard_name("train", 0)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, CAPTION_SCHEMA) as writer:
        for first in range(0, len(rows), ROWS_PER_BATCH):
            part = rows[first : first + ROWS_PER_BATCH]
            writer.write_batch(pa.RecordBatch.from_pylist(part, schema=CAPTION_SCHEMA))
    info = ShardInfo(path.name, len(rows), len(rows), path.stat().st_size, "0" * 64)
    write_manifest(
        folder, Manifest("made", "caption", "benchmark", {}, {"train": SplitInfo.of((info,))}, {}, ())
    )


def write_reference_table(path: Path, rows: list[Row]) -> None:
    table = pa.table({"image": [r["image"] for r in rows], "caption": [r["captions"] for r in rows]})
    with pa.OSFile(str(path), "wb") as file, pa.RecordBatchFileWriter(file, table.schema) as writer:
        writer.write_table(table)


def write_tar(path: Path, rows: list[Row]) -> None:
    import webdataset

    with webdataset.TarWriter(str(path)) as writer:
        for r in rows:
            writer.write({"__key__": r["image_id"], "jpg": r["image"], "txt": r["captions"][0]})


def write_mds(folder: Path, rows: list[Row]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "bytes", "text": "str"}) as writer:
        for r in rows:
            writer.write({"image": r["image"], "text": r["captions"][0]})


# The ways. Each yields batches of `BATCH` samples for ever.


class Texts:
    """Tokenises and masks as our stream does, for the other ways."""

    def __init__(self, tokenizer: CaptionTokenizer) -> None:
        self.tokenizer, self.position = tokenizer, itertools.count()

    def __call__(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Ids, masked ids and labels of a batch."""
        texts = [self.tokenizer.encode(caption) for caption in captions]
        length = max(len(text.ids) for text in texts)
        masked = [
            self.tokenizer.mask(text, keyed_generator(0, next(self.position), Purpose.MASK), 0.15, True)
            for text in texts
        ]
        ids = pad([text.ids for text in texts], length, 1)
        return (
            ids,
            pad([m for m, _ in masked], length, 1),
            pad([labels for _, labels in masked], length, -100),
        )


def pillow_transform(side: int) -> Callable[[Image.Image], Tensor]:
    """What the published code and the libraries' manuals do to a picture."""
    bicubic = InterpolationMode.BICUBIC
    return Compose([Resize(side, bicubic), CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])


def our_stream(root: Path, side: int, transform: str, itm: bool = False) -> TrainStream:
    data = DataConfig(
        root=str(root),
        train=(DatasetConfig(path="shards"),),
        tokenizer="tokenizer",
        max_text_len=MAX_TEXT_LEN,
        train_transform=transform,
        num_workers=0,
    )
    vocabulary = load_tokenizer("tokenizer", root, MAX_TEXT_LEN).vocab_size
    model = ModelConfig(
        text=TextTowerConfig(vocab_size=vocabulary), vision=VisionTowerConfig(image_size=side, patch_size=16)
    )
    train = TrainConfig(global_batch_size=BATCH, micro_batch_size=BATCH)
    config = RunConfig(
        model=model, data=data, objectives=ObjectivesConfig(itm_weight=float(itm)), train=train
    )
    return TrainStream(config, 0, 1)


def limit(rows: list[Row], side: int, transform: str) -> Batches:
    """Bare decoding at the picture's size, as in evaluation, and resizing."""
    resize = ImageTransform("clip" if transform == "clip" else "albef", side, train=False)
    generator = np.random.default_rng(0)
    files = itertools.cycle([np.frombuffer(r["image"], np.uint8) for r in rows])
    while True:
        pixels = torch.empty(BATCH, 3, side, side, dtype=torch.uint8)
        for out in pixels:
            out.copy_(resize(decode_image(next(files)), generator))
        yield pixels


def our_picture(side: int, transform: str) -> Callable[[bytes], Tensor]:
    change, position = ImageTransform(transform, side, train=True), itertools.count()

    def picture(data: bytes) -> Tensor:
        generator = keyed_generator(0, next(position), Purpose.IMAGE)
        return change(decode_image(np.frombuffer(data, np.uint8)), generator)

    return picture


def webdataset_way(tar: Path, side: int, texts: Texts, picture: Callable[[bytes], Tensor] | None) -> Batches:
    import webdataset

    data = webdataset.WebDataset(str(tar), shardshuffle=False).repeat().shuffle(200)
    if picture is None:
        data = data.decode("pil").to_tuple("jpg", "txt").map_tuple(pillow_transform(side), lambda text: text)
    else:
        data = data.to_tuple("jpg", "txt").map_tuple(picture, bytes.decode)
    for some in data.batched(BATCH, collation_fn=None, partial=False):
        yield torch.stack([pixels for pixels, _ in some]), texts([caption for _, caption in some])


def streaming_way(
    folder: Path, side: int, texts: Texts, picture: Callable[[bytes], Tensor] | None
) -> Batches:
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    change = pillow_transform(side)
    while True:
        samples = iter(data)
        while len(some := list(itertools.islice(samples, BATCH))) == BATCH:
            if picture is None:
                shown = [change(Image.open(io.BytesIO(one["image"])).convert("RGB")) for one in some]
            else:
                shown = [picture(one["image"]) for one in some]
            yield torch.stack(shown), texts([one["text"] for one in some])


def reference_way(path: Path, side: int, texts: Texts) -> Batches:
    """The published loader: whole table, random rows, every sample with a false picture from anywhere."""
    table = pa.ipc.RecordBatchFileReader(pa.memory_map(str(path))).read_all()
    captions = table["caption"].to_pylist()
    rng, change = np.random.default_rng(0), pillow_transform(side)

    def picture(index: int) -> Tensor:
        data = io.BytesIO(table["image"][index].as_py())
        return change(Image.open(data).convert("RGB"))

    while True:
        chosen = rng.integers(len(table), size=BATCH).tolist()
        shown = [picture(i) for i in chosen]
        false = [picture(int(rng.integers(len(table)))) for _ in chosen]
        yield torch.stack(shown), torch.stack(false), texts([captions[i][0] for i in chosen])


def all_ways(root: Path, rows: list[Row], side: int, transform: str) -> dict[str, Batches]:
    """Name -> batches; the layouts are written below `root`."""
    tokenizer = load_tokenizer("tokenizer", root, MAX_TEXT_LEN)
    ways = {
        "limit": limit(rows, side, transform),
        "ours": our_stream(root, side, transform).steps(0),
        "ours, ITM": our_stream(root, side, transform, itm=True).steps(0),
        "reference": reference_way(root / "reference.arrow", side, Texts(tokenizer)),
    }
    for name, write, way in (
        ("webdataset", write_tar, webdataset_way),
        ("streaming", write_mds, streaming_way),
    ):
        try:
            write(root / name, rows)
        except ImportError as error:
            print(f"without {name}: {error}")
            continue
        ways[name] = way(root / name, side, Texts(tokenizer), None)
        ways[f"{name}, our decoder"] = way(root / name, side, Texts(tokenizer), our_picture(side, transform))
    return ways


# Measuring.


def turns(ways: dict[str, Batches], count: int, batches: int) -> dict[str, list[float]]:
    """Samples per second of processor time, one figure per turn."""
    for way in ways.values():
        next(way)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, way in ways.items():
            start = time.process_time()
            for _ in range(batches):
                next(way)
            rates[name].append(BATCH * batches / (time.process_time() - start))
    return rates


def shares(root: Path, side: int, transform: str, count: int) -> dict[str, float]:
    """Where the processor time of our stream goes, by part, in milliseconds a sample."""
    stream = our_stream(root, side, transform)
    maker: Any = stream._maker
    spent = dict[str, float]()

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        spent[name] = spent.get(name, 0.0) + time.process_time() - start

    for step in range(count // BATCH):
        with timed("plan"):
            (plan,) = stream.plan(step)
        for position, pair in zip(plan.positions.tolist(), plan.pairs.tolist(), strict=True):
            with timed("read"):
                sample = maker.corpus.sample(pair)
                image = maker.corpus.image(sample.dataset, sample.row)
            with timed("decode"):
                pixels = decode_image(image.data, maker._decoded_side(image))
            with timed("resize and augment"):
                maker.transform(pixels, keyed_generator(0, position, Purpose.IMAGE))
            with timed("text"):
                text = maker.tokenizer.encode(sample.caption)
                maker.tokenizer.mask(text, keyed_generator(0, position, Purpose.MASK), 0.15, True)
    return {name: 1000 * seconds / (count // BATCH * BATCH) for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="JPEG files to use instead of made ones")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", default="640x480", help="of made pictures")
    parser.add_argument("--side", type=int, default=288, help="pixels per side in the batch")
    parser.add_argument(
        "--transform", default="clip", help="of our stream; the other ways resize and crop as clip"
    )
    parser.add_argument("--turns", type=int, default=7, help="at least 2")
    parser.add_argument("--batches", type=int, default=2)
    add_save(parser, "loader.csv")
    options = parser.parse_args()
    if options.turns < 2:
        parser.error(f"--turns: found {options.turns}, expected at least 2, since quartiles are reported")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    paths = sorted(options.folder.glob("**/*.jpg"))[: options.images] if options.folder else []
    width, height = map(int, options.size.split("x"))
    rows = [row(path.read_bytes(), path.stem, i) for i, path in enumerate(paths)]
    rows = rows or made_rows(options.images, width, height)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shards(root / "shards", rows)
        write_reference_table(root / "reference.arrow", rows)
        train_tokenizer((r["captions"][0] for r in rows), root / "tokenizer", 400)
        rates = turns(all_ways(root, rows, options.side, options.transform), options.turns, options.batches)
        spent = shares(root, options.side, options.transform, 4 * BATCH)
    report(options, rows, rates, spent)


def report(
    options: argparse.Namespace, rows: list[Row], rates: dict[str, list[float]], spent: dict[str, float]
) -> None:
    size = statistics.mean(len(r["image"]) for r in rows) / 1024
    source = (
        f"{len(rows)} JPEGs, {options.size if not options.folder else options.folder.name}, {size:.0f} KiB"
    )
    print(f"{source}, to {options.side} px, transform {options.transform}; load {os.getloadavg()[0]:.1f}")
    print(f"{'way':28} {'samples/s of a core':>20} {'ours / it':>10}  (quartiles of the ratio)")
    found = []
    for name, values in rates.items():
        base = "ours, ITM" if name == "reference" else "ours"
        ratios = [a / b for a, b in zip(rates[base], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:28} {statistics.median(values):20.0f} {middle:10.2f}  ({low:.2f} to {high:.2f})")
        found.append(
            {
                "pictures": source,
                "side": options.side,
                "transform": options.transform,
                "way": name,
                "samples_per_core_s": f"{statistics.median(values):.1f}",
                "compared": base,
                "ratio": f"{middle:.3f}",
                "ratio_quartiles": f"{low:.3f} {high:.3f}",
            }
        )
    total = sum(spent.values())
    print("ours, by part: " + ", ".join(f"{n} {ms:.2f} ms ({ms / total:.0%})" for n, ms in spent.items()))
    if options.save:
        append(options.save, found)


if __name__ == "__main__":
    main()
