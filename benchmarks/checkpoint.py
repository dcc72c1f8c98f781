"""How long a save stops training: in the background against blocking, side by side in one process group.

    deepspeed --num_gpus 2 --module benchmarks.checkpoint [--parameters 20e6] [--steps 40] [--rounds 5] [--save]

Each round trains the same number of steps three times, in turn: without a save, with a blocking one, and with one in
the background that is waited for at the end. `stall` is what the save adds to the time of the steps; `call` is how
long the training loop stands still. Medians over the rounds; ratios are background / blocking.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.record import add_save, append
from mt_deepspeed.config import CheckpointConfig, RunConfig, TrainConfig
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.nonfinite import NonFinitePolicy
from mt_deepspeed.engine.resuming import Progress
from mt_deepspeed.engine.saving import Saver

WAYS = ("none", "blocking", "background")
LAYERS = 8


class Dense(nn.Module):
    """A task of `LAYERS` square matrices: as many bytes of state as a real one, with little arithmetic."""

    def __init__(self, num_parameters: float) -> None:
        super().__init__()
        self.width = int((num_parameters / LAYERS) ** 0.5)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(LAYERS))
        self.loss_weights = {"square": 1.0}

    def forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and an empty report."""
        x = batch["x"]
        for layer in self.layers:
            x = layer(x).relu()
        return {"square": x.square().mean()}, {}

    def loss_counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Samples behind the loss."""
        return {"square": torch.tensor(len(batch["x"]))}

    def parameter_role(self, name: str) -> str:
        """One learning rate for all."""
        return "tower"


def main() -> None:
    args = parse()
    place = launch.init()
    # All ranks write to one folder.
    shared = [tempfile.mkdtemp(dir=args.folder) if place.rank == 0 else ""]
    dist.broadcast_object_list(shared, src=0)
    try:
        rows = measure(args, place, Path(shared[0]))
    finally:
        dist.barrier()
        if place.rank == 0:
            shutil.rmtree(shared[0], ignore_errors=True)
    if place.rank == 0:
        report(args, place, rows)
    launch.shutdown()


def measure(
    args: argparse.Namespace, place: launch.Place, folder: Path
) -> dict[str, list[tuple[float, float]]]:
    """Way -> (seconds of the steps, seconds of the call to save), per round; the slowest rank's."""
    config = RunConfig(
        run_dir=str(folder),
        train=TrainConfig(
            max_steps=10**6,
            global_batch_size=args.batch * place.world_size,
            micro_batch_size=args.batch,
            precision=args.precision,
        ),
        checkpoint=CheckpointConfig(best_metric="", keep_last=1),
    )
    task = Dense(args.parameters)
    session = build(config, {"zero_optimization": {"stage": args.stage}}, task, place)  # type: ignore[arg-type]
    saver = Saver(session, NonFinitePolicy(10, folder), {}, saved_step=-1)
    batch = {"x": torch.randn(args.batch, task.width), "sample_ids": torch.arange(args.batch)}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    progress = Progress()
    for number in range(args.rounds + 1):
        for way in WAYS:
            dist.barrier()
            started = time.perf_counter()
            called = 0.0
            if way != "none":
                progress.step += 1
                saver.save(progress, wait=way == "blocking")
                called = time.perf_counter() - started
            for step in range(args.steps):
                session.stepper.step(step, [batch], {})
            saver.collect()
            times = torch.tensor([time.perf_counter() - started, called], device=place.device)
            dist.all_reduce(times, dist.ReduceOp.MAX)
            if number > 0:  # the first round warms up
                found[way].append((float(times[0]), float(times[1])))
    return found


def report(args: argparse.Namespace, place: launch.Place, rows: dict[str, list[tuple[float, float]]]) -> None:
    """Prints the table, and saves it as a row."""
    plain = statistics.median(total for total, _ in rows["none"])
    stall = {way: statistics.median(total for total, _ in rows[way]) - plain for way in WAYS[1:]}
    call = {way: statistics.median(call for _, call in rows[way]) for way in WAYS[1:]}
    load = os.getloadavg()[0]
    print(f"{args.parameters:.3g} parameters, {place.world_size} ranks, stage {args.stage}, load {load:.1f}")
    print(f"{args.steps} steps without a save: {plain:.2f} s")
    for way in WAYS[1:]:
        print(f"{way:11} call {call[way]:.3f} s, stall {stall[way]:.3f} s")
    ratio = {
        name: found["background"] / found["blocking"] for name, found in (("call", call), ("stall", stall))
    }
    print(f"ratio       call {ratio['call']:.3f}, stall {ratio['stall']:.3f}")
    row = {
        "ranks": place.world_size,
        "zero_stage": args.stage,
        "precision": args.precision,
        "parameters": int(args.parameters),
        "steps": args.steps,
        "steps_s": round(plain, 3),
        "blocking_call_s": round(call["blocking"], 4),
        "background_call_s": round(call["background"], 4),
        "blocking_stall_s": round(stall["blocking"], 4),
        "background_stall_s": round(stall["background"], 4),
    }
    if args.save:
        append(args.save, [row])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=20e6)
    parser.add_argument(
        "--steps", type=int, default=40, help="per measurement; they should outlast the writing"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="samples per rank")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--folder", help="where to write checkpoints; default: the temporary folder")
    add_save(parser, "checkpoint.csv")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
