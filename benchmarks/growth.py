"""How a step's cost grows with batch, text length, resolution and number of managed layers.

    python -m benchmarks.growth [--save]

Forward and backward of pre-training, in float32 on the CPU, of a model that is small enough to be tried at 22 points:
towers of 6 layers, 3 cross-modal layers, all 256 wide, pictures of 224 px, 2 samples, texts of 16 tokens, 6 managed
layers; one of these changes at a time. `ours` beside `plain` (`benchmarks.plain_step`; here with the same texts).
Seconds are processor time, the smallest of several rounds in which both take turns; memory is the most bytes alive
at once besides parameters and gradients, counted as in `benchmarks.step_counts`. `steepest` is the largest ratio
between growth of the time and growth of the operations from one point to the next: 1.0 means time follows operations.
`--save` adds rows to `benchmarks/results/growth.csv` and draws `docs/images/growth.png`.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.batches import make_batch
from benchmarks.record import add_save, append, picture_folder
from benchmarks.step_counts import WITHOUT_FILES, PlainTask, on_fake_tensors
from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.planning.activations import peak_bytes
from mt_deepspeed.tasks import build_task

BASE = {"batch": 2, "text tokens": 16, "pixels a side": 224, "managed layers": 6}
AXES = {
    "batch": (1, 2, 3, 4, 6, 8),
    "text tokens": (8, 16, 32, 64, 96),
    "pixels a side": (224, 288, 384, 480, 576),
    "managed layers": (1, 2, 3, 4, 5, 6),
}
SIZES = [
    *(f"model.text.{key}" for key in ("num_layers=6", "hidden_size=256", "num_heads=4", "intermediate_size=1024")),
    *(f"model.vision.{key}" for key in ("num_layers=6", "width=256", "num_heads=4")),
    *(f"model.cross_modal.{key}" for key in ("num_layers=3", "hidden_size=256", "num_heads=4")),
    *("model.cross_modal.intermediate_size=1024", "model.text.vocab_size=8192", "train.precision=fp32"),
]  # fmt: skip
Point = dict[str, Any]


def configuration(point: dict[str, int]) -> RunConfig:
    """The small model at one point."""
    managed = point["managed layers"]
    changes = [
        f"model.vision.image_size={point['pixels a side']}",
        f"model.link.num_text_experts={managed}",
        f"model.link.num_image_experts={managed}",
        f"data.max_text_len={point['text tokens']}",
    ]
    return load_config("managertower-base", [], [*WITHOUT_FILES, *SIZES, *changes])


def measure(point: dict[str, int], rounds: int) -> dict[str, Point]:
    """Seconds, MiB and GFLOP of both systems."""
    config = configuration(point)
    size, tokens = point["batch"], point["text tokens"]
    torch.manual_seed(0)
    task: Any = build_task(config).train()
    systems = {"ours": task, "plain": PlainTask(task, config)}
    found: dict[str, Point] = {name: {"seconds": float("inf")} for name in systems}
    batch = make_batch(config, size, 0, tokens)
    for _ in range(rounds + 1):
        for name, system in systems.items():
            start = time.process_time()
            losses, _ = system(batch)
            sum(losses.values()).backward()
            found[name]["seconds"] = min(found[name]["seconds"], time.process_time() - start)
            task.zero_grad()
    for name in systems:
        mode, fake_task, fake_batch = on_fake_tensors(config, size, tokens)
        with mode:
            module = fake_task if name == "ours" else PlainTask(fake_task, config)
            peak = peak_bytes(module, fake_batch, "fp32")
            with FlopCounterMode(display=False) as counter:
                losses, _ = module(fake_batch)
                sum(losses.values()).backward()
        found[name] |= {"mib": peak / 2**20, "gflop": counter.get_total_flops() / 1e9}
    return found


def steepest(points: list[Point]) -> float:
    """Largest growth of seconds relative to growth of operations, from one point to the next."""
    return max(
        (after["seconds"] / before["seconds"]) / (after["gflop"] / before["gflop"])
        for before, after in pairwise(points)
    )


def draw(found: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Time above, memory below; a column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, len(AXES), figsize=(13, 6), sharex="col")
    for column, (axis, systems) in enumerate(found.items()):
        for key, label, plot in (("seconds", "processor seconds", rows[0]), ("mib", "MiB", rows[1])):
            for number, (name, points) in enumerate(systems.items()):
                values = [point[key] for point in points]
                plot[column].plot(AXES[axis], values, "o-", color=f"C{number}", label=name, markersize=4)
            plot[column].set_ylim(bottom=0)
            plot[0].set_ylabel(label)
        rows[1][column].set_xlabel(axis)
    rows[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    add_save(parser, "growth.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, list[Point]]] = {}
    rows: list[dict[str, object]] = []
    for axis in options.axes:
        found[axis] = {"ours": [], "plain": []}
        for value in AXES[axis]:
            for name, point in measure({**BASE, axis: value}, options.rounds).items():
                found[axis][name].append(point)
                rows.append(
                    {
                        "axis": axis,
                        "value": value,
                        "system": name,
                        "seconds": f"{point['seconds']:.4g}",
                        "mib": f"{point['mib']:.1f}",
                        "gflop": f"{point['gflop']:.2f}",
                    }
                )
                print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        for name, points in found[axis].items():
            print(f"{axis}, {name}: steepest {steepest(points):.2f}")
    if options.save:
        append(options.save, rows)
        draw(found, picture_folder(options.save) / "growth.png")


if __name__ == "__main__":
    main()
