"""Bytes a step exchanges: DeepSpeed's comms logger beside the formula of `planning.communication`.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/communication.py [--csv FILE]

Trains one step of the quickstart's model on invented samples at every ZeRO stage, with 1 and 2 micro-batches, and
adds up the tensors the collectives worked on. No times: bytes do not depend on the machine.
"""

import argparse
import csv
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.context import building
from mt_deepspeed.planning.communication import Traffic, step_traffic
from mt_deepspeed.planning.states import model_size, plannable_task

KINDS = {
    "all_reduce": "all_reduce",
    "inference_all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "allgather_fn": "all_gather",
    "all_gather_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_fn": "reduce_scatter",
}
SMALL = 16
"""Bytes: smaller messages are counters and flags, not gradients or weights."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    args = parser.parse_args()
    place = launch.init()
    rows = []
    for stage in range(4):
        for accumulation in (1, 2):
            config = load_config(
                "quickstart",
                overrides=[
                    "train.micro_batch_size=2",
                    f"train.global_batch_size={2 * accumulation * place.world_size}",
                ],
            )
            ds_config: dict[str, Any] = {
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": 500_000,
                    "stage3_param_persistence_threshold": 1000,
                },
                "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
            }
            logged = measure(config, ds_config, place, accumulation)
            size = model_size(config)
            formula = step_traffic(size, ds_config, place.world_size, accumulation)
            rows.append((stage, accumulation, logged, formula))
    if place.rank == 0:
        report(rows, place.world_size, args.csv)
    launch.shutdown()


def measure(config: RunConfig, ds_config: dict[str, Any], place: launch.Place, accumulation: int) -> Traffic:
    """Traffic of the second step: the first one also sets things up."""
    with building(config, ds_config, place):
        task = plannable_task(config)
    session = build(config, ds_config, task, place)
    batches = [task.fake_batch(2, config.data.max_text_len) for _ in range(accumulation)]
    session.stepper.step(0, batches, {})
    deepspeed.comm.comm.comms_logger.reset_data()
    session.stepper.step(1, batches, {})
    sums = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
    for name, sizes in deepspeed.comm.comm.comms_logger.get_raw_data().items():
        for size, (count, *_) in sizes.items():
            if size > SMALL and place.rank == 0:
                print(f"    {name}: {count} x {size}") if name not in KINDS else None
            if size > SMALL and name in KINDS:
                kind = KINDS[name]
                # Of an all-gather the logger sees what one rank gives.
                sums[kind] += size * count * (place.world_size if kind == "all_gather" else 1)
    session.engine.destroy()
    dist.barrier()
    return Traffic(**sums)


def report(rows: list[tuple[int, int, Traffic, Traffic]], ranks: int, file: Path | None) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    print(f"{ranks} ranks, bytes of one step: logged / formula")
    print("stage  accumulation  all-reduce               all-gather               reduce-scatter")
    lines = []
    for stage, accumulation, logged, formula in rows:
        cells = [
            f"{getattr(logged, key):>11,} / {getattr(formula, key):>11,}"
            for key in ("all_reduce", "all_gather", "reduce_scatter")
        ]
        print(f"{stage:>5}  {accumulation:>12}  {'  '.join(cells)}")
        lines.append(
            [
                datetime.date.today().isoformat(),
                commit,
                platform.processor() or platform.machine(),
                torch.__version__,
                deepspeed.__version__,
                ranks,
                stage,
                accumulation,
                *(value for key in vars(logged) for value in (getattr(logged, key), getattr(formula, key))),
            ]
        )
    if file is not None:
        new = not file.exists()
        with file.open("a", newline="") as out:
            writer = csv.writer(out)
            if new:
                head = ["date", "commit", "hardware", "torch", "deepspeed", "ranks", "stage", "accumulation"]
                kinds = ("all_reduce", "all_gather", "reduce_scatter")
                writer.writerow(
                    [*head, *(f"{kind}_{what}" for kind in kinds for what in ("logged", "formula"))]
                )
            writer.writerows(lines)


if __name__ == "__main__":
    main()
