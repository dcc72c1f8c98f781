"""Checks every JSON, YAML, shell and sbatch file of the repository; exits with 1 if one is at fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SBATCH_OPTIONS_NEEDED = ("--nodes", "--time", "--output")


def repository_files() -> list[Path]:
    """Files git tracks, and those it would if they were added (ignored ones left out)."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in sorted(listing.split("\0")) if name and (path := ROOT / name).is_file()]


def is_shell(path: Path) -> bool:
    """Shell by its suffix, or by its first line when it has none."""
    if path.suffix in {".sh", ".sbatch"}:
        return True
    if path.suffix:
        return False
    with path.open("rb") as file:
        first_line = file.readline(100)
    return first_line.startswith(b"#!") and (b"bash" in first_line or b"/sh" in first_line)


def check_json(path: Path) -> Iterator[str]:
    """Parses, refusing repeated keys and the NaN that strict readers refuse."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"repeated keys {sorted(repeated)}")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except ValueError as error:
        yield f"{path.relative_to(ROOT)}: {error}"


def check_yaml(path: Path) -> Iterator[str]:
    """Parses every document of the file."""
    try:
        list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        yield f"{path.relative_to(ROOT)}: {error}"


def check_shell(path: Path) -> Iterator[str]:
    """`bash -n`, then shellcheck."""
    for command in (["bash", "-n"], ["shellcheck", "--shell=bash", "--exclude=SC1091", "--format=gcc"]):
        result = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            yield f"{path.relative_to(ROOT)}: {command[0]}: {(result.stderr + result.stdout).strip()}"
            return


def check_sbatch(path: Path) -> Iterator[str]:
    """The directives stand before the first command (SLURM ignores later ones) and name what a job needs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    first_command = commands[0] if commands else len(lines)
    directives = [(number, line) for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    for number, line in directives:
        if number > first_command:
            yield f"{path.relative_to(ROOT)}:{number + 1}: SLURM ignores '{line}': it stands after a command"
    text = " ".join(line for _, line in directives)
    for option in SBATCH_OPTIONS_NEEDED:
        if option not in text:
            yield f"{path.relative_to(ROOT)}: no '#SBATCH {option}=...' directive"


def check_ds_config(path: Path) -> Iterator[str]:
    """Reads the file the way the engine does, which refuses keys that belong to the run configuration."""
    from mt_deepspeed.engine import ds_config

    os.environ.setdefault("NVME_PATH", "/nvme")  # the file that offloads to NVMe reads where from
    try:
        ds_config.load_ds_config(path)
    except ValueError as error:
        yield f"{path.relative_to(ROOT)}: {error}"


def checks_of(path: Path) -> list[Callable[[Path], Iterator[str]]]:
    """The checks that apply to one file."""
    checks: list[Callable[[Path], Iterator[str]]] = []
    if path.suffix == ".json":
        checks.append(check_json)
        if path.parent == ROOT / "ds_configs":
            checks.append(check_ds_config)
    if path.suffix in {".yaml", ".yml"}:
        checks.append(check_yaml)
    if is_shell(path):
        checks.append(check_shell)
    if path.suffix == ".sbatch":
        checks.append(check_sbatch)
    return checks


def main() -> int:
    """Runs all checks; returns the exit status."""
    sys.path.insert(0, str(ROOT))
    checked = 0
    faults: list[str] = []
    for path in repository_files():
        checks = checks_of(path)
        checked += bool(checks)
        for check in checks:
            faults.extend(check(path))
    print("\n".join(faults) if faults else f"{checked} files are in order")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
