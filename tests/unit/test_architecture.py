"""The rules of the house: who may import whom, what data_tools may need, how long a file may be.

docs/architecture.md explains the rules; this file enforces them on the source text.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_tools", "mt_deepspeed")
MAX_LINES = 400

# room -> what of ours it may import besides itself; a name allows the module and all below it.
MAY_IMPORT: dict[str, set[str]] = {
    "data_tools": set(),
    "mt_deepspeed.config": set(),
    "mt_deepspeed.kernels": set(),
    "mt_deepspeed.models": {"mt_deepspeed.kernels", "mt_deepspeed.config"},
    "mt_deepspeed.objectives": set(),
    "mt_deepspeed.evaluation": set(),
    "mt_deepspeed.data": {"mt_deepspeed.config", "data_tools.shard_format"},
    "mt_deepspeed.tasks": {
        "mt_deepspeed.models",
        "mt_deepspeed.objectives",
        "mt_deepspeed.evaluation",
        "mt_deepspeed.config",
    },
    "mt_deepspeed.engine": {"mt_deepspeed.config"},
    "mt_deepspeed.planning": {
        "mt_deepspeed.config",
        "mt_deepspeed.engine",
        "mt_deepspeed.tasks",
        "mt_deepspeed.kernels",
    },
    "mt_deepspeed.pretrained": {
        "mt_deepspeed.config",
        "mt_deepspeed.data",
        "mt_deepspeed.models",
        "mt_deepspeed.tasks",
        "mt_deepspeed.engine.weights",
        "data_tools.sources",  # vocabularies of answers
    },
    "mt_deepspeed.scoring": {
        "mt_deepspeed.config",
        "mt_deepspeed.data",
        "mt_deepspeed.models",
        "mt_deepspeed.tasks",
        "mt_deepspeed.evaluation",
        "mt_deepspeed.engine",
        "mt_deepspeed.pretrained",
        "data_tools.sources",  # official annotation files
    },
}
ENTRY_MODULES = "mt_deepspeed"  # the modules directly in this package: they put the rooms together

# room or module -> third-party packages it may need (the standard library is free)
MAY_NEED: dict[str, set[str]] = {
    "data_tools": {"numpy", "pyarrow", "PIL"},
    "mt_deepspeed.config": {"yaml"},
    "mt_deepspeed.data.keyed": {"numpy"},
    "mt_deepspeed.data.order": {"numpy"},
    "mt_deepspeed.data.shuffle": {"numpy"},
}

# Modules of mt_deepspeed.models that read weight files, and gather partitioned parameters for it (ZeRO-3).
READ_WEIGHTS = {"partition"}
# Modules of mt_deepspeed.kernels that read which kernels to use and how to build them (MT_KERNELS, CUDA_HOME, ...).
READ_ENVIRONMENT = {"dispatch", "build"}

TEXT_SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".toml", ".yaml", ".yml", ".json", ".cfg", ".txt", ""}
TEXT_FOLDERS = (
    ".ci",
    "benchmarks",
    "data_tools",
    "docs",
    "ds_configs",
    "launchers",
    "mt_deepspeed",
    "slurm",
    "tests",
)
# What only means something on the machine or in the conversation where the text was written.
PRIVATE_TEXT = re.compile(
    r"/home/\w|/root/|/work/\w|/tmp/venv|\.\./shared|/opt/(pypi|wheels)"
    r"|\bissue #?\d|house\.md|anchors\.md|managertower\.md|platform\.md|\bspec(ification)? \d+\.\d",
    re.IGNORECASE,
)
CONFLICT_MARKS = ("<" * 7, ">" * 7)


def python_files() -> list[Path]:
    """All source files of the two packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name of a source file."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    """The room a file belongs to: data_tools, mt_deepspeed.<folder>, or mt_deepspeed (entry modules)."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "data_tools" or len(parts) == 2 else ".".join(parts[:2])


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too; `from a import b` gives `a.b`."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, allowed: set[str]) -> bool:
    """Whether a dotted name is one of the allowed ones or lies below one."""
    return any(name == one or name.startswith(one + ".") for one in allowed)


MODULES = [module_name(path) for path in python_files() if path.name != "__main__.py"]


def test_every_room_has_a_rule() -> None:
    rooms = {room_of(path) for path in python_files()} - {ENTRY_MODULES}
    assert rooms <= set(MAY_IMPORT), f"add rows to MAY_IMPORT for {sorted(rooms - set(MAY_IMPORT))}"


def test_imports_between_rooms_go_one_way() -> None:
    faults = []
    for path in python_files():
        room = room_of(path)
        if room == ENTRY_MODULES:
            continue
        allowed = {room} | MAY_IMPORT.get(room, set())
        for line, name in imported_modules(path):
            if within(name, set(PACKAGES)) and not within(name, allowed):
                faults.append(
                    f"{path.relative_to(ROOT)}:{line} imports {name}; {room} may import {sorted(allowed)}"
                )
    assert not faults, "\n".join(faults)


def test_third_party_imports_stay_where_they_belong() -> None:
    faults = []
    for path in python_files():
        for owner, needed in MAY_NEED.items():
            if not within(module_name(path), {owner}):
                continue
            for line, name in imported_modules(path):
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names | set(PACKAGES) | needed:
                    faults.append(
                        f"{path.relative_to(ROOT)}:{line} needs {top}; {owner} may need {sorted(needed)}"
                    )
    assert not faults, "\n".join(faults)


def test_models_know_no_ranks_environment_or_files() -> None:
    """Models are single-device maths: what wraps or distributes them stands outside."""
    banned = {"os", "deepspeed", "torch.distributed"}
    faults = []
    for room in ("models", "objectives", "kernels"):
        for path in sorted((ROOT / "mt_deepspeed" / room).rglob("*.py")):
            if path.stem in READ_WEIGHTS | READ_ENVIRONMENT:
                continue
            for line, name in imported_modules(path):
                if within(name, banned):
                    faults.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not faults, "\n".join(faults)


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without __init__.py would be left out of an installed package."""
    folders = {path.parent for path in python_files()}
    assert not [
        str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()
    ]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_data_tools_imports_without_torch() -> None:
    """Shards are made on machines that have no torch."""
    modules = [name for name in MODULES if within(name, {"data_tools"})]
    program = "\n".join(
        [
            "import importlib, sys",
            "for name in ('torch', 'torchvision', 'deepspeed', 'transformers', 'mt_deepspeed'):",
            "    sys.modules[name] = None",
            f"for name in {modules!r}:",
            "    importlib.import_module(name)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_are_short() -> None:
    folders = [ROOT / name for name in (*PACKAGES, "tests", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {str(path): lines for path, lines in lengths.items() if lines >= MAX_LINES}
    assert not long, f"split these files, {MAX_LINES} lines is the limit: {long}"


def test_text_speaks_of_the_project_only() -> None:
    files = [path for folder in TEXT_FOLDERS for path in (ROOT / folder).rglob("*")]
    files += list(ROOT.glob("*"))
    faults = []
    for path in sorted(files):
        if (
            not path.is_file()
            or path.suffix not in TEXT_SUFFIXES
            or path.name in {Path(__file__).name, ".git"}
        ):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if found := PRIVATE_TEXT.search(line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: {found[0]!r}")
            if line.startswith(CONFLICT_MARKS):
                faults.append(f"{path.relative_to(ROOT)}:{number}: a conflict of a merge")
    assert not faults, "\n".join(faults)
