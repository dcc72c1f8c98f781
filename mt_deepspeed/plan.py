"""Says before a job is submitted what it needs: memory, batch split, speed, data rate, disk, hours.

python -m mt_deepspeed.plan --preset managertower-base --nodes 4 --gpus-per-node 8 --gpu h200

Needs no GPU, no data and no weights. Memory comes from the real model on tensors without content; speed is the
model's arithmetic divided by an assumed share of the GPUs' peak (--mfu): put in what `speed/mfu` of a run said.
"""

import argparse
import sys
from pathlib import Path

from mt_deepspeed.config import load_config
from mt_deepspeed.config.arguments import add_run_arguments
from mt_deepspeed.engine.gpus import GPUS


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = _parser().parse_args(arguments)
    # Imported here: wrong arguments should answer at once, torch and DeepSpeed take seconds.
    from mt_deepspeed.engine.ds_config import load_ds_config
    from mt_deepspeed.planning.estimate import Cluster, as_json, make_plan
    from mt_deepspeed.planning.table import as_text

    try:
        config = load_config(args.preset, args.config, args.set)
        ds_config = load_ds_config(args.deepspeed_config) if args.deepspeed_config else None
        plan = make_plan(config, ds_config, Cluster(args.nodes, args.gpus_per_node, args.gpu), args.mfu)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(as_json(plan) if args.json else as_text(plan))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mt_deepspeed.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument("--deepspeed_config", type=Path, help="default: as the files in ds_configs/")
    parser.add_argument("--nodes", type=_positive, default=1, help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=_positive, default=8, help="default: %(default)s")
    parser.add_argument(
        "--gpu", required=True, choices=sorted(GPUS), metavar="GPU", help=", ".join(sorted(GPUS))
    )
    parser.add_argument(
        "--mfu", type=_share, default=0.35, help="share of the peak that is reached (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected 1 or more")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {share:g}, expected more than 0 and at most 1")
    return share


if __name__ == "__main__":
    main()
