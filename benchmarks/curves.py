"""Does the fused manager aggregation change how a model learns? Loss curves beside plain autograd.

    python -m benchmarks.curves --shards SHARDS --backends reference [--steps 200] [--save]

Trains the quickstart's model with the managers' noise on the shards of `launchers/quickstart.sh`, first with the
formula differentiated by autograd and its noise in memory (`plain`), then with each backend of the operator, which
makes the noise inside and again in backward. Weights, batches and noise are the same: the curves differ by rounding
alone, which training amplifies. `other` is `plain` with other noise, to show how much noise by itself moves a curve.
Rows are the differences to `plain` per 50 steps; `--save` adds them to `benchmarks/results/curves.csv` and draws
`docs/images/curves.png`. The GPU is used if there is one.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.record import add_save, append, picture_folder
from mt_deepspeed.config import load_config
from mt_deepspeed.kernels.manager_aggregation import dispatch
from mt_deepspeed.models import two_tower
from mt_deepspeed.models.managers import draw_seed

PART = 50
"""Steps that a row of the table covers."""


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """Managers compute as `way` says: `plain`, `other` or a backend's name."""
    if way in ("plain", "other"):
        moved = 0 if way == "plain" else 12345
        with (
            patch.object(dispatch, "by_autograd", lambda *_: True),
            patch.object(two_tower, "draw_seed", lambda device: draw_seed(device) ^ moved),
        ):
            yield
    else:
        with patch.dict(os.environ, {"MT_KERNELS": way}):
            yield


def curve(way: str, options: argparse.Namespace, place: Any) -> list[float]:
    """The loss of each step."""
    from mt_deepspeed.data.pipeline import TrainStream
    from mt_deepspeed.engine.build import build
    from mt_deepspeed.engine.optim import lr_factor, set_learning_rates
    from mt_deepspeed.tasks import build_task

    with tempfile.TemporaryDirectory() as folder, computed_by(way):
        changes = [f"run_dir={folder}", f"data.root={options.shards}", "model.link.noise=true", *options.set]
        config = load_config("quickstart", [], changes)
        torch.manual_seed(0)
        session = build(config, {"zero_optimization": {"stage": 0}}, build_task(config), place)
        session.engine.train()
        steps = TrainStream(config, 0, 1).steps(0)
        losses = []
        for step in range(options.steps):
            rate = lr_factor(step, config.optim, config.train.max_steps)
            set_learning_rates(session.optimizer, rate)
            losses.append(session.stepper.step(step, next(steps), {"save": False}).loss)
        session.engine.destroy()
    return losses


def table(curves: dict[str, list[float]]) -> list[dict[str, object]]:
    """Mean loss of each part and its largest distance from `plain` in a step."""
    rows: list[dict[str, object]] = []
    for way, losses in curves.items():
        for first in range(0, len(losses), PART):
            part, plain = losses[first : first + PART], curves["plain"][first : first + PART]
            rows.append(
                {
                    "way": way,
                    "steps": f"{first + 1}-{first + len(part)}",
                    "loss": f"{statistics.mean(part):.5f}",
                    "mean_minus_plain": f"{statistics.mean(part) - statistics.mean(plain):.1e}",
                    "largest_difference": f"{max(abs(a - b) for a, b in zip(part, plain, strict=True)):.1e}",
                }
            )
    return rows


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Losses above, distance from `plain` below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    for number, (way, losses) in enumerate(curves.items()):
        style = "-" if way == "plain" else "--"
        top.plot(losses, style, color=f"C{number}", label=way, linewidth=1.2)
        if way != "plain":
            differences = [max(abs(a - b), 1e-8) for a, b in zip(losses, curves["plain"], strict=True)]
            bottom.semilogy(differences, color=f"C{number}", label=way, linewidth=1)
    top.set_ylabel("loss")
    top.legend()
    bottom.set_ylabel("|loss - plain|")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True, help="made by launchers/quickstart.sh")
    parser.add_argument("--backends", nargs="+", default=["reference"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the run"
    )
    add_save(parser, "curves.csv")
    options = parser.parse_args()
    from mt_deepspeed.engine import launch

    place = launch.init()
    curves = {way: curve(way, options, place) for way in ("plain", *options.backends, "other")}
    rows = table(curves)
    for row in rows:
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        append(options.save, rows)
        draw(curves, picture_folder(options.save) / "curves.png")
    launch.shutdown()


if __name__ == "__main__":
    main()
