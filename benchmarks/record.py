"""Rows of measurements in `benchmarks/results/NAME.csv`, each with where and how it was measured.

Every script prints what it finds, and writes rows and pictures only if `--save` is given.
"""

import argparse
import csv
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
IMAGES = RESULTS.parents[1] / "docs" / "images"
PACKAGES = {
    "torch": "torch",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "triton": "triton",
    "pyarrow": "pyarrow",
    "PIL": "Pillow",
}

Row = Mapping[str, object]


def add_save(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds `--save [FILE]`: a path, `benchmarks/results/NAME` where no file is given, None without the option."""
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=RESULTS / name,
        metavar="FILE",
        help=f"add rows to this file (default: benchmarks/results/{name})",
    )


def picture_folder(saved: Path) -> Path:
    """Where the pictures of a file of rows belong: docs/images for those of the repository, else beside it."""
    return IMAGES if saved.parent == RESULTS else saved.parent


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows, each with `surroundings()`, to a csv file; they must have the columns of those that are there."""
    around = surroundings()
    full = [{**row, **around} for row in rows]
    columns = list(full[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(encoding="utf-8", newline="") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path}: found columns {found}, expected {columns}; move the old file away")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(full)
    print(f"{len(full)} rows added to {path}")


def measured(path: Path, identity: Sequence[str]) -> set[tuple[str, ...]]:
    """Values of the columns `identity` of the rows that a file holds."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in identity) for row in csv.DictReader(file)}


def surroundings() -> dict[str, str]:
    """Date, commit, hardware, load, versions and command line of this process."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": commit(),
        "hardware": hardware(),
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "versions": _versions(),
        "command": _command(),
    }


def commit() -> str:
    """The commit; `-dirty` if files beside results differ from it; `MT_COMMIT` names it where there is no git."""
    git = ["git", "-C", str(RESULTS.parents[1])]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode != 0:
        return os.environ.get("MT_COMMIT", "unknown")
    changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"]
    dirty = subprocess.run(changes, capture_output=True, text=True).stdout.strip()
    return found.stdout.strip() + ("-dirty" if dirty else "")


def hardware() -> str:
    """The processor, the number of threads torch uses (without torch: of cores), and the GPU if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    torch = sys.modules.get("torch")
    if torch is None:
        return f"{name}, {os.cpu_count()} cores"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{name}, {torch.get_num_threads()} threads"


def _versions() -> str:
    """Versions of the packages that this process has imported."""
    used = [(name, metadata.version(name)) for module, name in PACKAGES.items() if module in sys.modules]
    return ", ".join(f"{name} {version}" for name, version in [("python", platform.python_version()), *used])


def _command() -> str:
    """How this process was started; launchers add `--local_rank` and the number of ranks to its environment."""
    arguments = [text for text in sys.argv[1:] if not text.startswith("--local_rank")]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    starter = ["python", "-m"] if ranks == 1 else ["deepspeed", "--num_gpus", str(ranks), "--module"]
    kernels = [f"MT_KERNELS={os.environ['MT_KERNELS']}"] if "MT_KERNELS" in os.environ else []
    return shlex.join([*kernels, *starter, f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])
