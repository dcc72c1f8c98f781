"""What README and docs name must exist: files, links, modules, configuration keys, presets, error texts."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.fetch.request import REASONS as FETCH_REASONS
from data_tools.images import REASONS
from data_tools.sources import SOURCES
from mt_deepspeed.config import RunConfig, preset_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if path.exists())

# Error texts of docs/troubleshooting.md that other programs print.
FOREIGN = (
    "ensurepip is not available",
    "CUDA error: no kernel image is available",
    "The NVIDIA driver on your system is too old",
    "Unable to JIT load the fused_adam op",
    "ninja not being installed",
    "CUDA_HOME does not exist",
    "Loading extension module",
    "Using",
    "as PyTorch extensions root",
    "Address already in use",
    "was not reachable via ssh",
    "Watchdog caught collective operation timeout",
    "Bus error",
    "CUDA out of memory",
    # SLURM, and Python under it
    "sbatch: error: Invalid generic resource (gres) specification",
    "Requested node configuration is not available",
    "slurm/job.sh: No such file or directory",
    "BeginTime",
    "ReqNodeNotAvail",
    "BadConstraints",
    "The server socket has failed to listen",
    "Connection refused",
    "Gloo connectFullMesh failed",
    "Unable to confirm allocation for job",
    "Unable to contact slurm controller",
    "task launch failed: Plugin initialization failed",
    "Job step aborted: Waiting up to",
    "seconds for job step to finish",
)


def config_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, sections included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from config_keys(typing.cast("type", hints[field.name]), f"{prefix}{field.name}.")


def prose(page: Path) -> str:
    """The page without its Python examples and pictures of the data flow."""
    return re.sub(r"```(python|mermaid)\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    return typing.cast("Path", request.param)


def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page))
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert not [link for link in local if not (page.parent / link).exists()]


def test_files_exist(page: Path) -> None:
    names = re.findall(
        r"(?<![\w/.-])(?:launchers|ds_configs|slurm|benchmarks|tests|docs)/[\w./-]*\w", prose(page)
    )
    assert not [name for name in names if not (ROOT / name).exists()]


def test_modules_exist(page: Path) -> None:
    modules = re.findall(r"(?:-m|--module) ((?:mt_deepspeed|data_tools)[\w.]*)", prose(page))
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


def test_configuration_keys_exist(page: Path) -> None:
    sections = "|".join(field.name for field in dataclasses.fields(RunConfig))
    named = re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w/(-])", prose(page))
    files = {name for name in named if name.endswith((".md", ".py", ".png", ".txt", ".json", ".tsv", ".bin"))}
    assert not sorted(set(named) - files - set(config_keys()))


def test_presets_exist(page: Path) -> None:
    assert set(re.findall(r"--preset ([\w-]+)", prose(page))) <= set(preset_names())


def test_pages_list_presets_and_deepspeed_files() -> None:
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("training.md", "tasks.md"))
    files = [path.name for path in (ROOT / "ds_configs").glob("*.json")]
    assert not [name for name in [*preset_names(), *files] if f"| `{name}` |" not in text]


def test_data_page_lists_sources_and_reasons() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = [*SOURCES, *REASONS, *FETCH_REASONS]
    assert not [name for name in names if f"| `{name}` |" not in text]


def source_texts() -> list[str]:
    """All string literals of the packages, f-strings in their constant pieces, and the launchers."""
    files = [path for name in ("data_tools", "mt_deepspeed") for path in (ROOT / name).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    literals = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    files = [*(ROOT / "launchers").glob("*.sh"), *(ROOT / "slurm").glob("*")]
    scripts = [path.read_text(encoding="utf-8") for path in files]
    return [text for text in literals if isinstance(text, str)] + scripts


@pytest.mark.parametrize(("name", "least"), [("troubleshooting.md", 20), ("slurm.md", 8)])
def test_error_texts_are_ours_or_named_as_foreign(name: str, least: int) -> None:
    """Bold headings quote messages; dots stand for what changes from case to case."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    heads = re.findall(r"^\*\*.*?\*\*(?=:)", text, flags=re.MULTILINE)
    assert len(heads) > least
    messages = [message for head in heads for message in re.findall(r"`([^`]+)`", head)]
    pieces = [
        piece.strip() for message in messages for piece in message.removeprefix("FAILED: ").split("...")
    ]
    literals = "\0".join(source_texts())
    known = {*FOREIGN, *config_keys()}
    assert not [piece for piece in pieces if piece not in literals and piece not in known]
