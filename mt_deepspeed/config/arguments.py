"""The arguments of a command line that say which run is meant; `load_config` makes a run of their values."""

import argparse
from pathlib import Path

from mt_deepspeed.config.load import preset_names


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--preset`, `--config` and `--set`."""
    parser.add_argument("--preset", help=f"one of {', '.join(preset_names())}")
    parser.add_argument(
        "--config", nargs="+", action="extend", default=[], type=Path, help="YAML files over it"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single settings over both"
    )
