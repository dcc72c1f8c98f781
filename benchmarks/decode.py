"""Decoding and resizing one JPEG: the choices side by side, one thread, in images per second.

    python -m benchmarks.decode [--images N] [--size S] [--repeats R] [--save] [FOLDER]

Without FOLDER, N pictures of smooth noise in COCO's usual size (640 x 480) are made. All ways take turns over the
same bytes in memory, R times; the table shows the median, its ratio to Pillow's way, and how far the pixels are
from Pillow's. `draft` lets libjpeg shrink by 2, 4 or 8 while decoding, which changes the pixels.
"""

import argparse
import io
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

from benchmarks.record import add_save, append
from mt_deepspeed.data.images import decode_image, to_tensor
from mt_deepspeed.data.keyed import Purpose, keyed_generator
from mt_deepspeed.data.transforms import RECIPES, ImageTransform
from mt_deepspeed.models.vision_tower import normalise

Way = Callable[[bytes], torch.Tensor]


def made_pictures(count: int) -> list[bytes]:
    """JPEG files of 640 x 480, quality 90, about as many bytes as photographs have."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 53, 3), dtype=np.uint8)).resize((640, 480), 3)
        pixels = np.asarray(coarse) + rng.normal(0, 6, (480, 640, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def ways(size: int) -> dict[str, Way]:
    """Name -> bytes to [3, S, S] uint8 (decoding alone: to the picture's own size)."""
    transform = ImageTransform("albef", size, train=False)
    generator = keyed_generator(0, 0, Purpose.IMAGE)

    def ours(data: bytes) -> torch.Tensor:
        return transform(decode_image(np.frombuffer(data, np.uint8)), generator)

    def pillow(
        data: bytes, resample: Image.Resampling = Image.Resampling.BICUBIC, draft: bool = False
    ) -> torch.Tensor:
        image = Image.open(io.BytesIO(data))
        if draft:
            image.draft("RGB", (size, size))
        return to_tensor(image.convert("RGB").resize((size, size), resample))

    return {
        "Pillow, bicubic": pillow,
        "Pillow, bilinear": lambda data: pillow(data, Image.Resampling.BILINEAR),
        "Pillow, draft, bicubic": lambda data: pillow(data, draft=True),
        "Pillow, reducing_gap 2": lambda data: to_tensor(
            Image.open(io.BytesIO(data))
            .convert("RGB")
            .resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2)
        ),
        "ours: torchvision, bicubic": ours,
        "ours, with float and norm": lambda data: normalise(ours(data)),
        "only decode, Pillow": lambda data: to_tensor(Image.open(io.BytesIO(data)).convert("RGB")),
        "only decode, ours": lambda data: decode_image(np.frombuffer(data, np.uint8)),
    }


def rates(way: dict[str, Way], files: list[bytes], repeats: int) -> dict[str, float]:
    """Images per second of each way: median over `repeats` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in way}
    for _ in range(repeats):
        for name, run in way.items():
            start = time.perf_counter()
            for data in files:
                run(data)
            seconds[name].append(time.perf_counter() - start)
    return {name: len(files) / statistics.median(values) for name, values in seconds.items()}


def distance(way: dict[str, Way], files: list[bytes]) -> dict[str, tuple[int, float]]:
    """Greatest and mean difference from Pillow's bicubic pixels, in levels of 255."""
    result = {}
    for name in (
        "Pillow, bilinear",
        "Pillow, draft, bicubic",
        "Pillow, reducing_gap 2",
        "ours: torchvision, bicubic",
    ):
        pairs = [(way["Pillow, bicubic"](data).int(), way[name](data).int()) for data in files[:20]]
        gaps = [(a - b).abs().float() for a, b in pairs]
        result[name] = (
            int(max(gap.max() for gap in gaps)),
            statistics.mean(float(gap.mean()) for gap in gaps),
        )
    return result


def transform_rates(files: list[bytes], size: int, repeats: int) -> dict[str, float]:
    """Images per second of every train transform, decoding included."""

    def of(name: str) -> Way:
        transform = ImageTransform(name, size, train=True)
        positions = iter(range(10**9))
        return lambda data: transform(
            decode_image(np.frombuffer(data, np.uint8)), keyed_generator(0, next(positions), Purpose.IMAGE)
        )

    return rates({name: of(name) for name in RECIPES}, files, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="JPEG files to use instead of made ones")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=288, help="pixels per side")
    parser.add_argument("--repeats", type=int, default=5)
    add_save(parser, "decode.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    paths = sorted(options.folder.glob("**/*.jpg"))[: options.images] if options.folder else []
    files = [path.read_bytes() for path in paths] if options.folder else made_pictures(options.images)
    if not files:
        parser.error(f"{options.folder} holds no .jpg file")
    print(
        f"{len(files)} JPEGs of {statistics.mean(map(len, files)) / 1024:.0f} KiB, to {options.size} px, one thread, "
        f"{platform.processor() or platform.machine()}; torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    )
    way = ways(options.size)
    speed, gap = rates(way, files, options.repeats), distance(way, files)
    print(f"{'way':30} {'images/s':>9} {'ratio':>6}  {'max':>3} {'mean':>5}")
    found = []
    for name, rate in speed.items():
        ratio, levels = rate / speed["Pillow, bicubic"], gap.get(name, ("", ""))
        found.append(
            {
                "side": options.size,
                "way": name,
                "images_per_s": f"{rate:.1f}",
                "ratio_to_pillow": f"{ratio:.3f}",
                "largest_difference": levels[0],
                "mean_difference": levels[1],
            }
        )
        far = "{:>3} {:5.2f}".format(*gap[name]) if name in gap else ""
        print(f"{name:30} {rate:9.0f} {rate / speed['Pillow, bicubic']:6.2f}  {far}")
    print(f"\n{'transform, decoding included':30} {'images/s':>9}")
    for name, rate in transform_rates(files, options.size, options.repeats).items():
        print(f"{name:30} {rate:9.0f}")
    if options.save:
        append(options.save, found)


if __name__ == "__main__":
    main()
