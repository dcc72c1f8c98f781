"""Start-up, memory, shuffling and reading as a data set grows.

    python -m benchmarks.read_pattern index [--pairs N] [--save]
    python -m benchmarks.read_pattern shuffle [--save]

`index` writes N pairs with pictures of a few bytes (so the index and the captions are those of real data, the pictures
are not), opens them as training does, and walks through them in the order of the stream; a process of its own reports
seconds and private memory. `shuffle` needs no files: from the arithmetic of the order alone it counts what a node reads
and how well batches are mixed, for data sets of 4 million, 100 million and 2 billion pictures of 100 kB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

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
from mt_deepspeed.config import DatasetConfig
from mt_deepspeed.data.corpus import Corpus
from mt_deepspeed.data.order import SampleOrder, micro_batches
from mt_deepspeed.data.shuffle import BLOCK_BYTES, pairs_per_block

ROWS_PER_SHARD = 5120  # as many pictures of 100 kB as a shard of 512 MiB holds
PICTURE_BYTES = 100_000
GLOBAL_BATCH = 4096


def write_pairs(folder: Path, pairs: int) -> None:
    """A data set of one caption a picture; all shards have the same content, under different names."""
    folder.mkdir()
    rows = min(pairs, ROWS_PER_SHARD)
    captions = [f"a caption of about the usual length for picture {i}" for i in range(rows)]
    ids = [f"{i:09d}.jpg" for i in range(rows)]
    sides = pa.array([640] * rows, pa.int32())
    columns = [
        pa.array([b"picture"] * rows, pa.large_binary()),
        pa.array([[caption] for caption in captions], CAPTION_SCHEMA.field("captions").type),
        pa.array(ids),
        sides,
        sides,
    ]
    table = pa.Table.from_arrays(columns, schema=CAPTION_SCHEMA)
    first = folder / shard_name("train", 0)
    with pa.OSFile(str(first), "wb") as file, pa.ipc.new_file(file, CAPTION_SCHEMA) as writer:
        writer.write_table(table, ROWS_PER_BATCH)
    infos = []
    for number in range(pairs // rows):
        name = shard_name("train", number)
        if number:
            os.link(first, folder / name)
        infos.append(ShardInfo(name, rows, rows, first.stat().st_size, f"{number:064x}"))
    splits = {"train": SplitInfo.of(tuple(infos))}
    write_manifest(folder, Manifest("simulated", "caption", "benchmark", {}, splits, {}, ()))


def private_mib() -> float:
    """Memory of this process that is no file and shared with nobody, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def walk(folder: str) -> dict[str, float]:
    """Opens a data set and reads captions and pictures of a whole pass in stream order, in this process."""
    before, cpu, wall = private_mib(), time.process_time(), time.perf_counter()
    corpus = Corpus((DatasetConfig(path=folder),), ".", "data.train")
    corpus.check(0, 1)
    order = SampleOrder(corpus.sizes, corpus.blocks, None, corpus.digest, 0)
    order.locate(np.arange(GLOBAL_BATCH))
    found = {"start_cpu_s": time.process_time() - cpu, "start_s": time.perf_counter() - wall}
    found["start_mib"] = private_mib() - before
    before = private_mib()
    for start in range(0, min(corpus.num_pairs, 25 * GLOBAL_BATCH), GLOBAL_BATCH):
        pairs = order.locate(np.arange(start, start + GLOBAL_BATCH) % corpus.num_pairs).found.index
        corpus.caption_bytes(pairs)
        for pair in pairs[::8].tolist():
            sample = corpus.sample(pair)
            corpus.image(sample.dataset, sample.row).data.sum()
    return found | {"pass_mib": private_mib() - before}


def index(pairs: list[int]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for count in pairs:
            folder = Path(root) / str(count)
            write_pairs(folder, count)
            command = [sys.executable, "-m", "benchmarks.read_pattern", "walk", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"pairs": count} | {name: f"{value:.2f}" for name, value in found.items()})
            print(rows[-1], flush=True)
    return rows


def node_pattern(pictures: int, nodes: int) -> dict[str, Any]:
    """What the first of the nodes reads over a window, and how mixed a global batch is."""
    block = pairs_per_block(pictures, pictures * PICTURE_BYTES)
    order = SampleOrder([pictures], [block], None, "data", 0)
    used: dict[int, int] = {}
    same = []
    steps = order.num_pairs // order._shuffles[0].num_windows // GLOBAL_BATCH
    for step in range(steps):
        positions = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        found = order.locate(positions).found
        _, counts = np.unique(found.start, return_counts=True)
        same.append((counts * (counts - 1)).sum() / (GLOBAL_BATCH * (GLOBAL_BATCH - 1)))
        own = micro_batches(found.depth, None, GLOBAL_BATCH // nodes, 0, nodes).ravel()
        for start in found.start[own].tolist():
            used[start] = used.get(start, 0) + 1
    read = len(used) * BLOCK_BYTES / (steps * GLOBAL_BATCH / nodes)
    return {
        "pictures": pictures,
        "nodes": nodes,
        "pairs_per_block": block,
        "windows": order._shuffles[0].num_windows,
        "bytes_per_read": BLOCK_BYTES,
        "bytes_read_per_sample": round(read),
        "used_share_of_a_block": f"{np.mean(list(used.values())) / block:.2f}",
        "sequential_share": f"{1 - PICTURE_BYTES / BLOCK_BYTES:.3f}",
        "same_block_share": f"{np.mean(same):.2e}",
        "same_block_share_uniform": f"{block / pictures:.2e}",
    }


def shuffle() -> list[dict[str, Any]]:
    rows = []
    for pictures in (400_000, 4_000_000, 100_000_000, 2_000_000_000):
        for nodes in (1, 8, 32):
            rows.append(node_pattern(pictures, nodes))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("index", "shuffle"):
        add_save(commands.add_parser(name), f"read_{name}.csv")
    commands.choices["index"].add_argument(
        "--pairs", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000]
    )
    commands.add_parser("walk", help="a part of `index`, for this script itself").add_argument("folder")
    options = parser.parse_args()
    if options.what == "walk":
        print(json.dumps(walk(options.folder)))
        return
    rows = index(options.pairs) if options.what == "index" else shuffle()
    if options.save:
        append(options.save, rows)


if __name__ == "__main__":
    main()
