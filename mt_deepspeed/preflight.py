"""Checks every node before a run starts: run folder, free space, shards, GPU, clock, versions.

srun python -m mt_deepspeed.preflight --preset managertower-base --deepspeed_config ds_configs/zero1.json \
        --set data.root=/data/shards run_dir=/scratch/runs/base

`mt_deepspeed.train` does the same by itself when it starts. Exit code 0: all is well; 86: nodes are at fault, their
names stand in RUN/bad_nodes.txt; 1: the job is at fault on every node; 2: wrong arguments.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mt_deepspeed.config import DatasetConfig, RunConfig, load_config
from mt_deepspeed.config.arguments import add_run_arguments
from mt_deepspeed.engine.exit_codes import Exit


def main(arguments: list[str] | None = None) -> None:
    """The command line; one process per rank."""
    args = _parser().parse_args(arguments)
    try:
        config = load_config(args.preset, args.config, args.set)
        code = preflight(config, dry=args.dry_run)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if code == Exit.FINISHED and args.allreduce:
        _print_bandwidth()
    sys.exit(code)


def preflight(config: RunConfig, dry: bool = False) -> Exit:
    """Runs all checks on all ranks; rank 0 prints every fault. Call before `launch.init`.

    Args:
        dry: Data sets that are not there are passed over, and `bad_nodes.txt` is not written.

    Returns:
        The same on all ranks.

    Raises:
        LaunchError: Contradictory rank variables.
    """
    from mt_deepspeed.engine.preflight import MeetingError, run_checks, run_folder_check, space_check
    from mt_deepspeed.planning.states import checkpoint_bytes, model_size

    run_dir = Path(config.run_dir)
    kept = max(1, config.checkpoint.keep_last) + bool(config.checkpoint.best_metric)
    checks = {
        "run folder": run_folder_check(run_dir),
        "free space": lambda: space_check(run_dir, checkpoint_bytes(model_size(config)), kept)(),
        "shards": lambda: check_shards(config, needed=not dry),
    }
    try:
        verdict = run_checks(checks, None if dry else run_dir)
    except MeetingError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return Exit.FAILED
    if os.environ["RANK"] == "0":
        for line in verdict.lines:
            print(f"preflight: {line}", file=sys.stderr)
        if verdict.bad_nodes:
            print(f"preflight: nodes to leave out: {', '.join(verdict.bad_nodes)}", file=sys.stderr)
    return verdict.code


def data_is_there(config: RunConfig) -> bool:
    """Whether all folders of the run's data sets exist."""
    root = Path(config.data.root).expanduser()
    return all(
        (root / Path(one.path).expanduser()).exists() for one in (*config.data.train, *config.data.eval)
    )


def check_shards(config: RunConfig, needed: bool) -> None:
    """Every shard the run reads is there with the size its manifest says.

    Raises:
        ValueError: All missing or differing shards, the first few by name.
    """
    root = Path(config.data.root).expanduser()
    faults = [
        fault for one in (*config.data.train, *config.data.eval) for fault in _faults(root, one, needed)
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError("; ".join(dict.fromkeys(faults[:3])) + more)


def _faults(root: Path, dataset: DatasetConfig, needed: bool) -> Sequence[str]:
    from data_tools.shard_format import read_manifest

    folder = root / Path(dataset.path).expanduser()
    if not needed and not folder.exists():
        return []
    try:
        manifest = read_manifest(folder)
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except (OSError, ValueError) as error:
        return [str(error)]
    found = []
    for split in dataset.splits:
        if split not in manifest.splits:
            found.append(f"{folder}: no split {split}, there are {', '.join(sorted(manifest.splits))}")
            continue
        for shard in manifest.splits[split].shards:
            size = sizes.get(shard.file)
            if size is None:
                found.append(f"{folder / shard.file}: missing")
            elif size != shard.bytes:
                found.append(f"{folder / shard.file}: {size} bytes, the manifest says {shard.bytes}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mt_deepspeed.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument("--deepspeed_config", type=Path, help="not read: a run's arguments can be given here")
    parser.add_argument(
        "--dry-run", action="store_true", help="the data may be missing, and bad_nodes.txt is not written"
    )
    parser.add_argument("--allreduce", action="store_true", help="also measure an all-reduce over all ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def _print_bandwidth() -> None:
    from mt_deepspeed.engine import launch
    from mt_deepspeed.engine.preflight import allreduce_gb_per_s

    place = launch.init()
    speed = allreduce_gb_per_s(place.device)
    if place.rank == 0:
        print(f"preflight: all-reduce over {place.world_size} ranks: {speed:.2f} GB/s per rank")
    launch.shutdown()


if __name__ == "__main__":
    main()
