"""Pre-trains a model, or fine-tunes it for a task.

deepspeed --module mt_deepspeed.train --preset managertower-base --deepspeed_config ds_configs/zero1.json \
        --set data.root=/data/shards train.max_steps=1000
srun python -m mt_deepspeed.train ...        # one task per rank
python -m mt_deepspeed.train ...             # one process
... --dry-run                                # all checks, and two steps on invented samples; writes nothing
"""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mt_deepspeed.config import RunConfig, load_config, to_yaml
from mt_deepspeed.config.arguments import add_run_arguments
from mt_deepspeed.engine import signals
from mt_deepspeed.engine.exit_codes import Exit


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends with one of `Exit`."""
    signals.install()
    args = _parser().parse_args(arguments)
    try:
        config = load_config(args.preset, args.config, args.set)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.print_config:
        print(to_yaml(config), end="")
        return
    if config.data.worker_kind == "process":
        signals.start_fork_server()
    sys.exit(run(config, args.deepspeed_config, args.dry_run))


def run(config: RunConfig, deepspeed_config: Path, dry: bool = False) -> Exit:
    """Trains on the ranks the environment describes; what is wrong at the start ends all of them with one message.

    Args:
        dry: Only all checks, and two steps on invented samples; the data may be missing, and nothing is written.
    """
    # Imported here: `--print-config` and wrong settings should answer at once, torch and DeepSpeed take seconds.
    from mt_deepspeed.data.pipeline import TrainStream, eval_batches
    from mt_deepspeed.data.shards import ShardReadError
    from mt_deepspeed.engine import launch
    from mt_deepspeed.engine.agreement import RanksFailedError, together
    from mt_deepspeed.engine.context import building
    from mt_deepspeed.engine.dry_run import dry_run
    from mt_deepspeed.engine.ds_config import load_ds_config
    from mt_deepspeed.engine.gather import gather_rows
    from mt_deepspeed.engine.layer_norms import fuse_layer_norms
    from mt_deepspeed.engine.loop import train
    from mt_deepspeed.engine.stopping import NoProgressError
    from mt_deepspeed.engine.store import CheckpointError
    from mt_deepspeed.engine.watchdog import Watchdog
    from mt_deepspeed.preflight import data_is_there, preflight
    from mt_deepspeed.pretrained.loading import keep_answers
    from mt_deepspeed.pretrained.starting_weights import check_start, load_starting_weights
    from mt_deepspeed.tasks import Ranks, build_task

    settings = config.resilience
    try:
        code = preflight(config, dry)
        if code != Exit.FINISHED:
            return code
        # Later than the watchdog, which says more.
        place = launch.init(settings.first_step_timeout_s + 120.0)
    except launch.LaunchError as error:
        sys.exit(f"error: {error}")

    def prepare() -> tuple[dict[str, Any], AbstractContextManager[object], TrainStream | None]:
        ds_config = load_ds_config(deepspeed_config)
        context = building(config, ds_config, place)
        check_start(config)
        has_data = not dry or data_is_there(config)
        return ds_config, context, TrainStream(config, place.rank, place.world_size) if has_data else None

    def initialise() -> None:
        try:
            load_starting_weights(task, config)
        except ValueError as error:
            sys.exit(f"error (rank {place.rank}): {error}")

    watchdog = Watchdog(config, place.rank, place.world_size)
    with nullcontext() if dry else watchdog:
        try:
            ds_config, context, stream = together(prepare, "preparing the run")
            with context:
                task = build_task(config, Ranks(place.rank, gather_rows))
            fuse_layer_norms(task, place.device)
            if dry or stream is None:
                dry_run(config, ds_config, task, place, initialise)
                return Exit.FINISHED
            if place.rank == 0 and stream.answers:
                keep_answers(Path(config.run_dir), stream.answers)
            batches = (
                (lambda: eval_batches(config, place.rank, place.world_size)) if config.data.eval else None
            )
            return train(config, ds_config, task, stream, batches, place, watchdog, initialise).exit_code
        except NoProgressError as error:
            if place.rank == 0:
                print(f"error: {error}", file=sys.stderr)
            return Exit.NO_PROGRESS
        except RanksFailedError as error:
            sys.exit(f"error: {error}" if place.rank == 0 else 1)
        except (CheckpointError, ShardReadError) as error:  # others are bugs: with a traceback
            sys.exit(f"error (rank {place.rank}): {error}")
        finally:
            launch.shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mt_deepspeed.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=Path("ds_configs/zero1.json"),
        help="memory and communication settings (default: %(default)s)",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="all checks, and two steps on invented samples; needs no data, writes nothing",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


if __name__ == "__main__":
    main()
