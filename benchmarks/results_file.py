"""Rows of figures in a csv file: where and how they were measured, and which a file holds already."""

import csv
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def context(device: str) -> Row:
    """What a row must say to be worth anything; `MT_COMMIT` names the commit where there is no git."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cuda = device == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or os.environ.get("MT_COMMIT", "unknown"),
        "hardware": torch.cuda.get_device_name() if cuda else f"{_cpu()} x {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f}",
        "versions": f"torch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if cuda else ""),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measured(path: Path, identity: Sequence[str]) -> set[tuple[str, ...]]:
    """Values of the columns `identity` of the rows a file holds."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in identity) for row in csv.DictReader(file)}


def append(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Adds rows; a new file gets a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
