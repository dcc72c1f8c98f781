"""Converting: speed beside a bare decode loop and beside one process with its table in memory, memory, resizing.

    python -m benchmarks.convert speed  [--images N] [--workers 1 2] [--repeats R] [--save]
    python -m benchmarks.convert memory [--sizes 1000 10000 100000] [--save]
    python -m benchmarks.convert resize [--photos FOLDER] [--save]

Pictures are made: 300 different JPEGs of 500 x 375, hard-linked to as many names as asked for, in CC3M's layout.
Every way runs in a process of its own; the ways take turns, `--repeats` times, and the table shows medians and the
median of the ratios within a turn. CPU seconds, which other load on the machine hardly changes, stand beside the
wall's.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.record import add_save, append
from data_tools.images import check_image, decode_rgb
from data_tools.resize import Resize, resized

DISTINCT = 300
TSV = "Train_GCC-training.tsv"


def made_picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of smooth noise, quality 90: about as many bytes as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_raw(folder: Path, count: int) -> Path:
    """CC3M's layout with `count` pictures."""
    rng = np.random.default_rng(0)
    images = folder / "train_image"
    images.mkdir(parents=True)
    with (folder / TSV).open("w") as table:
        for number in range(count):
            path = images / f"{number}.jpg"
            if number < DISTINCT:
                path.write_bytes(made_picture(rng, 500, 375))
            else:
                os.link(images / f"{number % DISTINCT}.jpg", path)
            table.write(f"a picture of thing number {number}\thttp://example.com/{number}.jpg\n")
    return folder


# The ways. Each returns nothing; it is timed by `run_one`.


def decode_files(paths: list[Path]) -> None:
    for path in paths:
        decode_rgb(path.read_bytes())


def bare_decode(raw: Path, out: Path, workers: int) -> None:
    """Nothing but reading and decoding to RGB, the files shared out among processes."""
    paths = sorted((raw / "train_image").iterdir())
    if workers == 1:
        decode_files(paths)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(decode_files, [paths[i::workers] for i in range(workers)], chunksize=1)


def ours(raw: Path, out: Path, workers: int) -> None:
    from data_tools.cli import main

    options = ["--raw", str(raw), "--out", str(out), "--workers", str(workers), "--policy", "error"]
    if main(["convert", "cc3m", *options]) != 0:
        raise SystemExit("convert failed")


def table_in_memory(raw: Path, out: Path, workers: int, check: bool = False) -> None:
    """The published converters' way: one process, shuffled files, 100,000 rows in memory, one table a file.

    Lists stand for their data frames, which would take more memory still. They do not look into the pictures.
    """
    with (raw / TSV).open() as table:
        captions = [line.split("\t")[0] for line in table]
    paths = sorted((raw / "train_image").iterdir())
    random.Random(0).shuffle(paths)
    out.mkdir()
    for shard in range(len(paths) // 100_000 + 1):
        rows = []
        for path in paths[shard * 100_000 : (shard + 1) * 100_000]:
            data = path.read_bytes()
            if check:
                decode_rgb(data)
            rows.append([data, [captions[int(path.stem)]], path.stem, "cc"])
        columns = zip(*rows, strict=True) if rows else [[]] * 4
        names = ["image", "caption", "image_id", "split"]
        frame = pa.table(dict(zip(names, map(list, columns), strict=True)))
        with (
            pa.OSFile(str(out / f"{shard}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, frame.schema) as file,
        ):
            file.write_table(frame)


WAYS: dict[str, Callable[[Path, Path, int], None]] = {
    "bare decode loop": bare_decode,
    "ours, all pictures checked": ours,
    "table in memory, nothing checked": table_in_memory,
    "table in memory, pictures decoded": lambda raw, out, workers: table_in_memory(raw, out, workers, True),
}


def run_one(name: str, raw: Path, workers: int) -> dict[str, float]:
    """Runs a way in this process: wall and CPU seconds, greatest resident memory in MB, children apart."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
        out = Path(folder) / "out"
        WAYS[name](raw, out, workers)
        wall = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": wall,
        "cpu_s": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "main_mb": own.ru_maxrss / 1000,
        "worker_mb": children.ru_maxrss / 1000,
    }


def run(name: str, raw: Path, workers: int) -> dict[str, float]:
    """Runs a way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.convert", "one", name, str(raw), str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# The three measurements. Each returns rows for the table and the csv file.


def speed(folder: Path, images: int, workers: list[int], repeats: int) -> list[dict[str, object]]:
    raw = make_raw(folder / "raw", images)
    turns = [(name, n) for n in workers for name in ("bare decode loop", "ours, all pictures checked")]
    turns += [(name, 1) for name in WAYS if name.startswith("table")]
    found: dict[tuple[str, int], list[dict[str, float]]] = {turn: [] for turn in turns}
    for _ in range(repeats):
        for turn in turns:
            found[turn].append(run(turn[0], raw, turn[1]))
    rows = []
    for (name, n), all_runs in found.items():
        bare = found["bare decode loop", n]

        def ratio(
            key: str, runs: list[dict[str, float]] = all_runs, bare: list[dict[str, float]] = bare
        ) -> float:
            return statistics.median(b[key] / r[key] for b, r in zip(bare, runs, strict=True))

        rows.append(
            {
                "way": name,
                "workers": n,
                "images": images,
                "images_per_s": round(images / statistics.median(r["wall_s"] for r in all_runs)),
                "images_per_cpu_s": round(images / statistics.median(r["cpu_s"] for r in all_runs)),
                "ratio_to_bare": round(ratio("wall_s"), 2),
                "cpu_ratio_to_bare": round(ratio("cpu_s"), 2),
            }
        )
    return rows


def memory(folder: Path, sizes: list[int], most_in_memory: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for size in sizes:
        raw = make_raw(folder / f"raw{size}", size)
        for name in ("ours, all pictures checked", "table in memory, nothing checked"):
            if name.startswith("table") and size > most_in_memory:
                continue
            workers = 2 if name.startswith("ours") else 1
            found = run(name, raw, workers)
            rows.append(
                {
                    "way": name,
                    "workers": workers,
                    "images": size,
                    "images_per_s": round(size / found["wall_s"]),
                    "main_mb": round(found["main_mb"]),
                    "worker_mb": round(found["worker_mb"]) if workers > 1 else 0,
                }
            )
            print(rows[-1], flush=True)
        shutil.rmtree(raw)
    return rows


def resize(
    photos: list[bytes], choices: list[tuple[int, int]], size: int, repeats: int
) -> list[dict[str, object]]:
    """What resizing at conversion does to bytes, speed and to the pixels training sees at `size` x `size`."""

    def seconds(action: Callable[[bytes], object], files: list[bytes]) -> float:
        start = time.process_time()
        for data in files:
            action(data)
        return time.process_time() - start

    def seen(data: bytes) -> np.ndarray:
        image = decode_rgb(data).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image, np.float64)

    def quality(a: bytes, b: bytes) -> float:
        return float(10 * np.log10(255**2 / max(1e-9, np.square(seen(a) - seen(b)).mean())))

    pictures = [check_image(data) for data in photos]
    total = sum(map(len, photos))
    rows: list[dict[str, object]] = []
    for side, q in choices:
        setting = Resize(side, q)
        stored = [resized(picture, setting).data for picture in pictures]

        def convert(data: bytes, setting: Resize = setting) -> None:
            resized(check_image(data), setting)

        turns = [
            (
                seconds(convert, photos) / seconds(check_image, photos),
                seconds(decode_rgb, stored) / seconds(decode_rgb, photos),
            )
            for _ in range(repeats)
        ]
        converting, decoding = (statistics.median(ratios) for ratios in zip(*turns, strict=True))
        psnr = [quality(a, b) for a, b in zip(photos, stored, strict=True) if a is not b]
        rows.append(
            {
                "way": f"--resize-short-side {side} --quality {q}",
                "images": len(photos),
                "resized": sum(a is not b for a, b in zip(photos, stored, strict=True)),
                "bytes_ratio": round(sum(map(len, stored)) / total, 2),
                "convert_cpu_ratio": round(converting, 1),
                "decode_cpu_ratio": round(decoding, 2),
                "psnr_db_median": round(statistics.median(psnr), 1) if psnr else "-",
                "psnr_db_min": round(min(psnr), 1) if psnr else "-",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    own = commands.add_parser("speed")
    own.add_argument("--images", type=int, default=6000)
    own.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    own.add_argument("--repeats", type=int, default=5)
    own = commands.add_parser("memory")
    own.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    own.add_argument("--most-in-memory", type=int, default=20_000, help="pictures for the table in memory")
    own = commands.add_parser("resize")
    own.add_argument("--photos", type=Path, help="folder of JPEG files; default: made ones of 640 x 480")
    own.add_argument("--size", type=int, default=288, help="pixels a side that training sees")
    own.add_argument("--repeats", type=int, default=3)
    for own in commands.choices.values():
        add_save(own, "convert.csv")
    one = commands.add_parser("one", help="a single run of a way, for this script itself")
    one.add_argument("name", choices=WAYS)
    one.add_argument("raw", type=Path)
    one.add_argument("workers", type=int)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(run_one(options.name, options.raw, options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "speed":
            rows = speed(Path(folder), options.images, options.workers, options.repeats)
        elif options.what == "memory":
            rows = memory(Path(folder), options.sizes, options.most_in_memory)
        else:
            rng = np.random.default_rng(0)
            paths = sorted(options.photos.rglob("*.jpg")) if options.photos else []
            photos = [path.read_bytes() for path in paths] or [made_picture(rng, 640, 480) for _ in range(40)]
            choices = [(384, 90), (384, 95), (384, 80), (288, 90)]
            rows = resize(photos, choices, options.size, options.repeats)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        append(options.save, [{"results": json.dumps(row)} for row in rows])


if __name__ == "__main__":
    main()
