"""Command line: `python -m data_tools synth | convert | merge | verify | stats | peek`."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.pool import available_cores

# Commands import what they need when they run: worker processes import this module too.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors of the input are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"data_tools {options.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"data_tools {options.command}: interrupted; the same command goes on from here", file=sys.stderr
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_synth(commands.add_parser("synth", help="write a procedural world in the raw layout of data sets"))
    _add_convert(commands.add_parser("convert", help="turn raw data into shards"))
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


def _add_convert(convert: argparse.ArgumentParser) -> None:
    from data_tools.sources import SOURCES

    convert.add_argument("dataset", choices=sorted(SOURCES))
    convert.add_argument("--raw", type=Path, required=True, help="folder in the official layout")
    convert.add_argument("--out", type=Path, required=True, help="folder for the shards")
    convert.add_argument(
        "--annotations", nargs="+", type=Path, metavar="FILE", help="below --raw; default: looked for there"
    )
    convert.add_argument(
        "--images", type=Path, help="folder of the pictures or picture folders; default: --raw"
    )
    convert.add_argument("--path-column", help="of a table: column of the pictures' paths (or bytes)")
    convert.add_argument("--caption-column", help="of a table or of .json members: column of the captions")
    convert.add_argument(
        "--answers",
        type=Path,
        help="of vqav2, vgqa: JSON of the answers with labels, or shards made with them",
    )
    convert.add_argument("--name", help="name of the data set in the manifest; default: DATASET")
    convert.add_argument(
        "--policy", choices=("skip", "error"), default="skip", help="what to do with a bad picture"
    )
    convert.add_argument("--part", metavar="I/N", default="1/1", help="only a part, for `merge`")
    convert.add_argument("--workers", type=int, default=available_cores(), help="processes")
    convert.set_defaults(run=_convert)


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


def _convert(options: argparse.Namespace) -> int:
    from data_tools.merge import parse_part
    from data_tools.sources import SOURCES, AnnotationError, Request
    from data_tools.sources.answers import read_vocabulary
    from data_tools.writer import Job, convert

    source = SOURCES[options.dataset]
    if not options.raw.is_dir():
        raise AnnotationError(
            f"--raw {options.raw}: not a folder; expected the raw data of {options.dataset}"
        )
    if options.annotations:
        files = [options.raw / path for path in options.annotations]
        for path in files:
            if not path.is_file():
                raise AnnotationError(f"--annotations: {path} is not there")
    else:
        files = source.find(options.raw)
    columns = {"path_column": options.path_column, "caption_column": options.caption_column}
    request = Request(options.images or options.raw, files, **columns)
    settings: dict[str, Any] = {key: value for key, value in columns.items() if value is not None}
    if options.answers is not None:
        settings["answers"] = read_vocabulary(options.answers)
    elif source.answers is not None:
        settings["answers"] = source.answers(request)
    request = replace(request, answers=settings.get("answers", ()))
    job = Job(
        dataset=options.name or options.dataset,
        task=source.task,
        rows=source.rows(request),
        raw=options.raw,
        annotations=tuple(files),
        options=settings,
        policy=options.policy,
        part=parse_part(options.part),
    )
    progress = Progress()
    changed_in_all: Counter[str] = Counter()

    def report(done: int, dropped: Counter[str], changed: Counter[str]) -> None:
        changed_in_all.update(changed - changed_in_all)
        progress(options.dataset, done, note=f", dropped {sum(dropped.values())}" if dropped else "")

    manifest = convert(job, options.out, options.workers, report)
    _print_splits(options.out, manifest)
    for change, number in sorted(changed_in_all.items()):
        print(f"{options.out}: encoded anew in this run, {change}: {number}")
    if not any(split.rows for split in manifest.splits.values()):
        print(f"warning: no picture was kept; is --raw {options.raw} complete?", file=sys.stderr)
    return 0


def _print_splits(out: Path, manifest: Any) -> None:
    for name, split in manifest.splits.items():
        print(f"{out}: {name}: {split.rows} images, {split.texts} texts, {len(split.shards)} shards")
    for reason, number in manifest.dropped.items():
        print(f"{out}: dropped {reason}: {number}")


def _merge(options: argparse.Namespace) -> int:
    from data_tools.merge import merge

    _print_splits(options.out, merge(options.parts, options.out))
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
