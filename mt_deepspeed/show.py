"""Sums a run up in one table: `python -m mt_deepspeed.show --run RUN [--evaluation FILE.json]`."""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ITM_CHANCE = 0.5
"""Half of the evaluated pairs match."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mt_deepspeed.show", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--evaluation", type=Path, help="what `mt_deepspeed.evaluate --out` wrote")
    args = parser.parse_args(arguments)
    try:
        figures = json.loads(args.evaluation.read_text("utf-8")) if args.evaluation else {}
        print(table(read_metrics(args.run), figures))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run's `metrics.jsonl`.

    Raises:
        ValueError: The file is missing, empty or damaged; names file and line.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: not found; is {run} a run folder?")
    records = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not a JSON record: {error}") from error
    if not records:
        raise ValueError(f"{file}: empty; the run has logged nothing yet")
    return records


def table(records: list[dict[str, Any]], figures: dict[str, float]) -> str:
    """The summary as text: held-out accuracies with their chance levels, speed, memory."""
    held_out = {
        key.removeprefix("eval/"): value for record in records for key, value in record.items()
    } | figures
    rows = [("", "result", "chance")]

    def add(label: str, name: str, chance: float | None = None) -> None:
        value = held_out.get(name)
        if value is not None and math.isfinite(value):
            rows.append((label, f"{value:.1%}", "" if chance is None else f"{chance:.1%}"))

    guess = figures.get("visual_chance")
    add("ITM accuracy, held-out pairs", "itm_accuracy", ITM_CHANCE)
    add("MLM accuracy, all masked words", "mlm_accuracy")
    add("MLM accuracy at visual words, right picture", "visual_right_image", guess)
    add("    shuffled pictures", "visual_shuffled_images", guess)
    add("    no picture", "visual_no_image", guess)
    for name in sorted(key for key in figures if key.startswith("visual_right_image/")):
        add(f"    right picture, {name.rpartition('/')[2]}", name)
    speeds = [record["speed/samples_per_s"] for record in records if "speed/samples_per_s" in record]
    if speeds:
        rows.append(("training speed, median", f"{statistics.median(speeds):.0f} samples/s", ""))
    peaks = [record["memory/peak_gib"] for record in records if "memory/peak_gib" in record]
    if peaks:
        rows.append(("peak memory per process", f"{max(peaks):.2f} GiB", ""))
    rows.append(("optimizer steps", str(max(record["step"] for record in records)), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 4), *lines[1:]])


if __name__ == "__main__":
    main()
