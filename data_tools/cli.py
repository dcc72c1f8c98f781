"""Command line: `python -m data_tools synth | convert | verify | stats | peek`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors of the input are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"data_tools {options.command}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    synth = commands.add_parser("synth", help="write a procedural world in the raw layout of data sets")
    synth.add_argument(
        "--out", type=Path, required=True, help="folder; each layout gets one of its own below"
    )
    synth.add_argument("--layout", nargs="+", required=True, metavar="NAME", help="coco vg cc3m sbu")
    synth.add_argument("--num-images", type=int, required=True, help="pictures per layout")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--image-size", type=int, default=64, help="side of the pictures in pixels")
    synth.add_argument("--workers", type=int, default=available_cores(), help="processes")
    synth.set_defaults(run=_synth)
    return parser


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Progress:
    """A line on stderr, at most once a second; kept on one line where stderr is a terminal."""

    def __init__(self) -> None:
        self._name = ""
        self._start = self._last = 0.0

    def __call__(self, name: str, done: int, total: int | None = None, note: str = "") -> None:
        """Says that `done` of `total` rows of `name` are finished."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._start, self._last = name, now, now
        if now - self._last < 1 and done != total:
            return
        self._last = now
        of = f" of {total}" if total is not None else ""
        rate = done / max(now - self._start, 1e-3)
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{name}: {done}{of} images, {rate:.0f}/s{note}", end=end, file=sys.stderr, flush=True)


def _synth(options: argparse.Namespace) -> int:
    from data_tools.synthetic.generate import write_worlds

    write_worlds(
        options.out,
        options.layout,
        options.num_images,
        options.seed,
        options.image_size,
        options.workers,
        Progress(),
    )
    return 0
