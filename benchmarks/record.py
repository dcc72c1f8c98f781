"""Rows of measurements in `benchmarks/results/NAME.csv`, each with where and how it was measured."""

import csv
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def surroundings() -> dict[str, str]:
    """Date, commit, hardware, load, versions and command line of this process."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": _commit(),
        "hardware": hardware(),
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "command": shlex.join(["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
    }


def hardware() -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def append(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Adds rows to `benchmarks/results/NAME.csv`; they must have the columns of those that are there."""
    path, around = RESULTS / f"{name}.csv", surroundings()
    full = [{**row, **around} for row in rows]
    path.parent.mkdir(exist_ok=True)
    columns = list(full[0])
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path}: found columns {found}, expected {columns}; move the old file away")
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(full)
    return path


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return done.stdout.strip() or "unknown"
