"""Predicts step time, efficiency, data rate and failures from 8 to 1,024 GPUs.

    python -m benchmarks.scaling [--gpu h200] [--mfu 0.35] [--inside 450] [--between 400 50 12.5] [--save]

Nothing here is measured. Counted on the real models: parameters, FLOPs, bytes that the ranks exchange. Assumed, and
printed: the share of the GPU's peak that is reached, the links, how much communication hides behind the backward
pass, bytes per picture, and how often a GPU fails. `--save` adds rows and draws docs/images/scaling-*.png.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import add_save, append, picture_folder
from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.engine.gpus import GPUS
from mt_deepspeed.planning.communication import Network, step_traffic
from mt_deepspeed.planning.states import ModelSize, checkpoint_bytes, model_size, task_figures

GPUS_PER_NODE = 8
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
BACKWARD_SHARE = 2 / 3
"""Of a step's arithmetic; gradients of ZeRO stages 0 to 2 travel during that of the last micro-batch."""
HIDDEN = 0.8
"""Share of the backward pass that communication can hide behind: the last bucket has nothing left to hide behind."""
PICTURE_BYTES = 100_000
GPU_HOURS_PER_FAILURE = 50_000
"""419 unexpected stops in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, section 3.3.4)."""
SAVE_S = 30.0
RESTART_S = 300.0
TWO_BILLION = [  # a ViT of the size of CLIP's ViT-g, RoBERTa large, ten cross-modal layers
    "model.vision.width=1408",
    "model.vision.num_layers=40",
    "model.vision.num_heads=16",
    "model.vision.mlp_ratio=4.3637",
    "model.cross_modal.hidden_size=1408",
    "model.cross_modal.num_heads=22",
    "model.cross_modal.intermediate_size=5632",
    "model.cross_modal.num_layers=10",
]
MODELS = {
    "base": ("managertower-base", [], 1, 64),
    "large": ("bridgetower-large", [], 1, 32),
    "2 B": ("bridgetower-large", TWO_BILLION, 1, 16),
}
"""Name -> preset, changes, ZeRO stage, largest micro-batch."""


@dataclass(frozen=True)
class Point:
    """A prediction for one model on one number of GPUs; times in seconds."""

    model: str
    gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    compute_s: float
    communication_s: float
    exposed_s: float
    step_s: float
    efficiency: float
    samples_per_s: float
    decodes_per_s_per_node: float
    read_gb_per_s: float
    wire_gb: float
    failures_per_day: float
    checkpoint_gib: float
    save_every_min: float
    lost_share: float


def predict(
    name: str,
    config: RunConfig,
    stage: int,
    most: int,
    gpus: int,
    gpu: str,
    mfu: float,
    network: Network,
    size: ModelSize,
    figures: tuple[float, float],
) -> Point:
    """One point: compute, what communication adds to it, and the consequences."""
    share = config.train.global_batch_size // gpus
    micro = max(d for d in range(1, min(share, most) + 1) if share % d == 0)
    accumulation = share // micro
    flops, images = figures
    zero = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000}}
    traffic = step_traffic(size, zero, gpus, accumulation)
    compute = share * flops / (GPUS[gpu].tflops * 1e12 * mfu)
    wire = traffic.wire_bytes(gpus)
    buckets = math.ceil(size.trained / 50_000_000) * (accumulation if stage >= 2 else 1)
    communication = network.seconds(wire, gpus, GPUS_PER_NODE, buckets + len(size.groups))
    # Stages 1 and 2 gather the weights after the update, when nothing else is going on.
    gathered = traffic.all_gather * (gpus - 1) / gpus if stage in (1, 2) else 0.0
    alone = network.seconds(gathered, gpus, GPUS_PER_NODE, len(size.groups))
    cover = HIDDEN * BACKWARD_SHARE * compute / (accumulation if stage < 2 else 1)
    cover += HIDDEN * (1 - BACKWARD_SHARE) * compute if stage == 3 else 0.0
    exposed = alone + max(0.0, communication - alone - cover)
    step = compute + exposed
    speed = config.train.global_batch_size / step
    between_failures_s = GPU_HOURS_PER_FAILURE * 3600 / gpus
    interval = math.sqrt(2 * SAVE_S * between_failures_s)  # Young 1974
    lost = SAVE_S / interval + (interval / 2 + RESTART_S) / between_failures_s
    return Point(
        model=name,
        gpus=gpus,
        stage=stage,
        micro_batch=micro,
        accumulation=accumulation,
        compute_s=compute,
        communication_s=communication,
        exposed_s=exposed,
        step_s=step,
        efficiency=compute / step,
        samples_per_s=speed,
        decodes_per_s_per_node=speed * images / (gpus / GPUS_PER_NODE),
        read_gb_per_s=speed * images * PICTURE_BYTES / 1e9,
        wire_gb=wire / 1e9,
        failures_per_day=86400 / between_failures_s,
        checkpoint_gib=checkpoint_bytes(size) / 2**30,
        save_every_min=interval / 60,
        lost_share=lost,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h200", choices=sorted(GPUS))
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--inside", type=float, default=450.0, help="GB/s each way between a node's GPUs")
    parser.add_argument(
        "--between",
        type=float,
        nargs="+",
        default=[400.0, 50.0, 12.5],
        help="GB/s each way between nodes, all cards of a node together; plots and table are for the first",
    )
    add_save(parser, "scaling.csv")
    args = parser.parse_args()
    found: dict[float, list[Point]] = {speed: [] for speed in args.between}
    for name, (preset, changes, stage, most) in MODELS.items():
        config = load_config(preset, overrides=changes)
        size, figures = model_size(config), task_figures(config, config.data.max_text_len)
        print(f"{name}: {size.total / 1e6:,.0f} M parameters, {figures[0] / 1e9:,.0f} GFLOP per sample")
        for speed, points in found.items():
            network = Network(args.inside, speed)
            points += [
                predict(name, config, stage, most, gpus, args.gpu, args.mfu, network, size, figures)
                for gpus in COUNTS
            ]
    best = found[args.between[0]]
    print_table(best)
    print_efficiency(found)
    if args.save:
        what = f"{args.gpu}, {args.mfu:.0%} of its peak, {args.between[0]:g} GB/s between nodes"
        draw(best, picture_folder(args.save), what)
        for speed, points in found.items():
            assumed = f"gpu={args.gpu} mfu={args.mfu} inside={args.inside} between={speed}"
            rows = [{"kind": "predicted", "assumed": assumed, **asdict(point)} for point in points]
            append(args.save, rows)


def print_table(points: list[Point]) -> None:
    print(
        "| model | GPUs | micro x acc. | compute s | comm. s | exposed s | efficiency | samples/s | "
        "decodes/s/node | read GB/s | failures/day | save every min | lost |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for p in points:
        print(
            f"| {p.model} | {p.gpus} | {p.micro_batch} x {p.accumulation} | {p.compute_s:.3f} | "
            f"{p.communication_s:.3f} | {p.exposed_s:.3f} | {p.efficiency:.0%} | {p.samples_per_s:,.0f} | "
            f"{p.decodes_per_s_per_node:,.0f} | {p.read_gb_per_s:.2f} | {p.failures_per_day:.2f} | "
            f"{p.save_every_min:.0f} | {p.lost_share:.1%} |"
        )


def print_efficiency(found: dict[float, list[Point]]) -> None:
    print(f"\n| model | GB/s between nodes | {' | '.join(f'{count:,} GPUs' for count in COUNTS)} |")
    print("|---|---|" + "---|" * len(COUNTS))
    for name in MODELS:
        for speed, points in found.items():
            cells = " | ".join(f"{p.efficiency:.0%}" for p in points if p.model == name)
            print(f"| {name} | {speed:g} | {cells} |")


def draw(points: list[Point], folder: Path, what: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = {
        "efficiency": ("share of the step spent computing", lambda p: p.efficiency, "linear"),
        "step": ("seconds per step", lambda p: p.step_s, "log"),
        "decodes": ("pictures decoded per second and node", lambda p: p.decodes_per_s_per_node, "linear"),
        "lost": ("share of the time lost to saves, failures, restarts", lambda p: p.lost_share, "log"),
    }
    for name, (label, value, scale) in figures.items():
        figure, axes = pyplot.subplots(figsize=(5.5, 3.4), dpi=120)
        for model, style in zip(MODELS, ("o-", "s--", "^:"), strict=True):
            chosen = [p for p in points if p.model == model]
            axes.plot([p.gpus for p in chosen], [value(p) for p in chosen], style, label=model)
        axes.set(xscale="log", yscale=scale, xlabel="GPUs", ylabel=label, title=f"predicted: {what}")
        axes.title.set_fontsize(8)
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.minorticks_off()
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / f"scaling-{name}.png")
        pyplot.close(figure)


if __name__ == "__main__":
    main()
