"""Bytes a step exchanges: DeepSpeed's comms logger beside the formula of `planning.communication`.

    deepspeed --num_gpus 2 --module benchmarks.communication [--save]

Trains one step of the quickstart's model on invented samples at every ZeRO stage, with 1 and 2 micro-batches, and
adds up the tensors the collectives worked on. No times: bytes do not depend on the machine.
"""

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from benchmarks.record import add_save, append
from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.engine import launch
from mt_deepspeed.engine.build import build
from mt_deepspeed.engine.context import building
from mt_deepspeed.planning.communication import Traffic, step_traffic
from mt_deepspeed.planning.states import model_size
from mt_deepspeed.tasks import build_task

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
    add_save(parser, "communication.csv")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
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
        report(rows, place.world_size, args.save)
    launch.shutdown()


def measure(config: RunConfig, ds_config: dict[str, Any], place: launch.Place, accumulation: int) -> Traffic:
    """Traffic of the second step: the first one also sets things up."""
    with building(config, ds_config, place):
        task = build_task(config)
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


def report(rows: list[tuple[int, int, Traffic, Traffic]], ranks: int, save: Path | None) -> None:
    """Prints the table; with `save` appends a row per line of it."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter")
    print(f"{ranks} ranks, bytes of one step: logged / formula")
    print("stage  accumulation  all-reduce               all-gather               reduce-scatter")
    lines: list[dict[str, int]] = []
    for stage, accumulation, logged, formula in rows:
        cells = [f"{getattr(logged, kind):>11,} / {getattr(formula, kind):>11,}" for kind in kinds]
        print(f"{stage:>5}  {accumulation:>12}  {'  '.join(cells)}")
        line = {"ranks": ranks, "stage": stage, "accumulation": accumulation}
        for kind in kinds:
            line |= {f"{kind}_logged": getattr(logged, kind), f"{kind}_formula": getattr(formula, kind)}
        lines.append(line)
    if save:
        append(save, lines)


if __name__ == "__main__":
    main()
