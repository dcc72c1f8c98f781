"""`python -m data_tools convert`: its options, and what becomes of them."""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from data_tools.options import BadOption
from data_tools.pool import available_cores, check_workers
from data_tools.progress import Progress

# What converting needs is imported when it runs: worker processes import this module too.


def add_arguments(convert: argparse.ArgumentParser) -> None:
    """The options of `convert`."""
    from data_tools.resize import DEFAULT_QUALITY
    from data_tools.sources import SOURCES

    convert.add_argument("dataset", choices=sorted(SOURCES))
    convert.add_argument("--raw", type=Path, required=True, help="folder in the official layout")
    convert.add_argument("--out", type=Path, required=True, help="folder for the shards")
    convert.add_argument(
        "--annotations", nargs="+", metavar="FILE", help="below --raw, or patterns; default: looked for there"
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
    convert.add_argument(
        "--max-dropped-share",
        type=float,
        default=0.5,
        metavar="X",
        help="stop when more than this share of the pictures that are there is refused (default 0.5)",
    )
    convert.add_argument(
        "--max-missing-share",
        type=float,
        default=1.0,
        metavar="X",
        help="stop when more than this share of the pictures is not there (default 1: links die)",
    )
    convert.add_argument(
        "--resize-short-side", type=int, metavar="N", help="make larger pictures this small, as JPEG"
    )
    convert.add_argument("--quality", type=int, help=f"of those (default {DEFAULT_QUALITY})")
    convert.add_argument("--part", metavar="I/N", default="1/1", help="only a part, for `merge`")
    convert.add_argument("--workers", type=int, default=available_cores(), help="processes")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from data_tools.writer import convert

    check_workers(options.workers)
    job = _job(options)
    job.check()
    progress = Progress()
    changed_in_all: Counter[str] = Counter()

    def report(done: int, dropped: Counter[str], changed: Counter[str]) -> None:
        changed_in_all.update(changed - changed_in_all)
        progress(options.dataset, done, note=f", dropped {sum(dropped.values())}" if dropped else "")

    manifest = convert(job, options.out, options.workers, report)
    print_splits(options.out, manifest)
    for change, number in sorted(changed_in_all.items()):
        print(f"{options.out}: encoded anew in this run, {change}: {number}")
    if not any(split.rows for split in manifest.splits.values()):
        print(f"warning: nothing was kept; is --raw {options.raw} complete?", file=sys.stderr)
    return 0


def _job(options: argparse.Namespace) -> Any:
    from data_tools.dropped import Budget
    from data_tools.merge import parse_part
    from data_tools.sources import SOURCES, Request
    from data_tools.sources.answers import read_vocabulary
    from data_tools.writer import Job

    source = SOURCES[options.dataset]
    files = _annotation_files(options)
    columns = {"path_column": options.path_column, "caption_column": options.caption_column}
    request = Request(options.images or options.raw, files, **columns)
    settings: dict[str, Any] = {key: value for key, value in columns.items() if value is not None}
    if options.answers is not None:
        settings["answers"] = read_vocabulary(options.answers)
    elif source.answers is not None and (answers := source.answers(request)):
        settings["answers"] = answers
    request = replace(request, answers=settings.get("answers", ()))
    return Job(
        dataset=options.name or options.dataset,
        task=source.task_of(request) if source.task_of is not None else source.task,
        rows=source.rows(request),
        raw=options.raw,
        annotations=tuple(files),
        options=settings,
        policy=options.policy,
        budget=Budget(options.max_dropped_share, options.max_missing_share),
        resize=_resize(options),
        part=parse_part(options.part),
    )


def _annotation_files(options: argparse.Namespace) -> list[Path]:
    from data_tools.sources import SOURCES, AnnotationError

    if not options.raw.is_dir():
        raise AnnotationError(
            f"--raw {options.raw}: not a folder; expected the raw data of {options.dataset}"
        )
    if not options.annotations:
        return SOURCES[options.dataset].find(options.raw)
    files: list[Path] = []
    for name in options.annotations:
        path = options.raw / name
        found = [path] if path.is_file() else sorted(Path(one) for one in glob(str(path)))
        files += [one for one in found if one.is_file() and one not in files]
        if not found:
            raise AnnotationError(f"--annotations: {path} is not there")
    return files


def _resize(options: argparse.Namespace) -> Any:
    from data_tools.resize import DEFAULT_QUALITY, Resize

    if options.resize_short_side is None:
        if options.quality is not None:
            raise BadOption(
                "--quality is of --resize-short-side; pictures that stay as they are have their own"
            )
        return None
    return Resize(options.resize_short_side, DEFAULT_QUALITY if options.quality is None else options.quality)


def print_splits(out: Path, manifest: Any) -> None:
    """Prints what a data set holds and what was left out."""
    from data_tools.shard_format import IMAGE_COLUMNS

    rows = "images" if IMAGE_COLUMNS[manifest.task] else "rows"
    for name, split in manifest.splits.items():
        print(f"{out}: {name}: {split.rows} {rows}, {split.texts} texts, {len(split.shards)} shards")
    for reason, number in manifest.dropped.items():
        print(f"{out}: dropped {reason}: {number}")
