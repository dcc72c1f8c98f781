"""Command line: `python -m data_tools synth | fetch | convert | merge | verify | stats | peek`."""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from data_tools import cli_convert, cli_fetch
from data_tools.cli_convert import print_splits
from data_tools.options import BadOption
from data_tools.pool import available_cores
from data_tools.progress import Progress

# Commands import what they need when they run: worker processes import this module too.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 1 for wrong input, 2 for wrong options, 130 interrupted.

    Errors are one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"data_tools {options.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadOption) else 1
    except KeyboardInterrupt:
        print(
            f"data_tools {options.command}: interrupted; the same command goes on from here", file=sys.stderr
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_synth(commands.add_parser("synth", help="write a procedural world in the raw layout of data sets"))
    cli_fetch.add_arguments(commands.add_parser("fetch", help="download the pictures of a table of links"))
    cli_convert.add_arguments(commands.add_parser("convert", help="turn raw data into shards"))
    merge = commands.add_parser("merge", help="put the parts of a conversion together")
    merge.add_argument("parts", type=Path, nargs="+", help="folders written with `convert --part I/N`")
    merge.add_argument("--out", type=Path, required=True)
    merge.set_defaults(run=_merge)
    verify = commands.add_parser("verify", help="check shards against their manifest")
    verify.add_argument("folder", type=Path)
    verify.add_argument("--full", action="store_true", help="also hash the files and decode every picture")
    verify.add_argument("--workers", type=int, default=available_cores(), help="processes")
    verify.set_defaults(run=_verify)
    stats = commands.add_parser("stats", help="count rows, texts, bytes, words beside the published counts")
    stats.add_argument("folder", type=Path)
    stats.set_defaults(run=_stats)
    peek = commands.add_parser("peek", help="print rows, draw a contact sheet")
    peek.add_argument("folder", type=Path)
    peek.add_argument("--split", help="default: all")
    peek.add_argument("--rows", type=int, default=8)
    peek.add_argument("--png", type=Path, help="file for the contact sheet")
    peek.set_defaults(run=_peek)
    return parser


def _add_synth(synth: argparse.ArgumentParser) -> None:
    from data_tools.synthetic.layouts import LAYOUTS

    synth.add_argument(
        "--out", type=Path, required=True, help="folder; each layout gets one of its own below"
    )
    synth.add_argument("--layout", nargs="+", required=True, choices=sorted(LAYOUTS))
    synth.add_argument("--num-images", type=int, required=True, help="pictures per layout")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--image-size", type=int, default=64, help="side of the pictures in pixels")
    synth.add_argument("--workers", type=int, default=available_cores(), help="processes")
    synth.set_defaults(run=_synth)


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


def _merge(options: argparse.Namespace) -> int:
    from data_tools.merge import merge

    print_splits(options.out, merge(options.parts, options.out))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data_tools.verify import verify

    progress = Progress()
    number = found = 0
    for shard, faults in verify(options.folder, options.full, options.workers):
        number += 1
        found += len(faults)
        for fault in faults:
            print(fault)
        progress(f"{options.folder}: {shard}", number)
    print(f"{options.folder}: {number} shards, {found} faults" + ("" if options.full else " (fast check)"))
    return 1 if found else 0


def _stats(options: argparse.Namespace) -> int:
    from data_tools.stats import as_text, collect

    print(as_text(*collect(options.folder)))
    return 0


def _peek(options: argparse.Namespace) -> int:
    from data_tools import peek
    from data_tools.shard_format import read_manifest

    task = read_manifest(options.folder).task
    for row in islice(peek.rows(options.folder, options.split), options.rows):
        print(peek.as_text(row, task))
    if options.png is not None:
        peek.contact_sheet(options.folder, options.rows, options.split).save(options.png, "PNG")
    return 0
