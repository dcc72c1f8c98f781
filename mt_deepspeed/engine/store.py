"""The folder of a run's checkpoints: naming, validation, retention. Knows files, no tensors and no ranks.

checkpoints/
    latest                        name of the newest checkpoint, for people and scripts
    best.json                     {"step", "metric", "value"}
    step-00001000/
        weights-00000-of-00002.safetensors     slices `<parameter>@<first element>`, fp32
        moments-00000-of-00002.safetensors     `<parameter>@<first element>/exp_avg` and `/exp_avg_sq`
        frozen.safetensors                     whole tensors that are not trained, and buffers
        state.json                             step, samples, shapes, versions, configuration, ...
        hashes.json                            file -> bytes, sha256
        COMPLETE                               written last, before the folder got its name
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mt_deepspeed.engine import durable

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
COMPLETE, STATE, HASHES, LATEST, BEST = "COMPLETE", "state.json", "hashes.json", "latest", "best.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, or used for this run."""


def folder_name(step: int) -> str:
    """`step-00001000`: sorts like the step."""
    return f"step-{step:08d}"


def list_steps(root: Path) -> list[int]:
    """Steps with a checkpoint folder, ascending, valid or not."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def faults(folder: Path, take: Callable[[int], bool] = lambda index: True) -> list[str]:
    """What is wrong with a checkpoint folder; empty: nothing.

    Args:
        folder: The checkpoint.
        take: Chooses, by position in the list of files, whose contents are read and hashed; sizes and
            names are always checked. Lets ranks share the reading.
    """
    if not (folder / COMPLETE).is_file():
        return [f"no {COMPLETE} marker: the save was interrupted"]
    try:
        expected: dict[str, dict[str, Any]] = json.loads((folder / HASHES).read_text("utf-8"))["files"]
        items = sorted(
            (str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in expected.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{HASHES} cannot be read: {error}"]
    found = []
    for index, (name, size, digest) in enumerate(items):
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != size:
            found.append(f"{name} has {file.stat().st_size} bytes, expected {size}")
        elif take(index) and durable.fingerprint(file)["sha256"] != digest:
            found.append(f"{name} has another sha256 than {HASHES} says")
    return found


def newest_valid(root: Path) -> Path | None:
    """The checkpoint with the highest step that is whole; walks back past damaged ones with a line each."""
    for step in reversed(list_steps(root)):
        folder = root / folder_name(step)
        wrong = faults(folder)
        if not wrong:
            return folder
        reasons = "; ".join(wrong[:3])
        log.warning("checkpoint %s cannot be used, going back to an older one: %s", folder, reasons)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        CheckpointError: Unreadable, or of another format version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
        version = state["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / STATE}: format_version is {version}, expected {FORMAT_VERSION}: use the release of "
            f"mt_deepspeed that wrote it ({state.get('versions', {}).get('mt_deepspeed', 'unknown')})"
        )
    return state


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished temporary folder its name, replacing a damaged checkpoint of the same step."""
    durable.write_text(temporary / COMPLETE, "")
    durable.sync(temporary)
    if final.exists():
        durable.remove_folder(final)
    durable.rename(temporary, final)
    durable.replace_text(final.parent / LATEST, final.name + "\n")


def write_best(root: Path, step: int, metric: str, value: float) -> None:
    """Points to the best checkpoint."""
    durable.replace_text(root / BEST, json.dumps({"step": step, "metric": metric, "value": value}) + "\n")


def read_best(root: Path) -> dict[str, Any] | None:
    """The pointer `write_best` left; None if there is none that can be read."""
    try:
        best: dict[str, Any] = json.loads((root / BEST).read_text("utf-8"))
        return {"step": int(best["step"]), "metric": str(best["metric"]), "value": float(best["value"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): no best checkpoint known", root / BEST, error)
        return None


def retain(root: Path, keep_last: int) -> list[int]:
    """Deletes checkpoints beyond the newest `keep_last` complete ones and the best; returns their steps.

    Call right after a save: the newest is then known to be whole, and it is never deleted. Remains of
    interrupted saves and deletions go too.
    """
    complete = [step for step in list_steps(root) if (root / folder_name(step) / COMPLETE).is_file()]
    best = read_best(root)
    keep = set(complete[-max(1, keep_last) :]) | ({best["step"]} if best else set())
    newest = complete[-1] if complete else -1
    gone = [step for step in list_steps(root) if step not in keep and step < newest]
    for step in gone:
        durable.remove_folder(root / folder_name(step))
    clean(root)
    return gone


def clean(root: Path) -> None:
    """Removes what interrupted saves and deletions left behind."""
    for path in root.iterdir():
        if path.is_dir() and path.name.startswith((".deleting-", ".writing-")):
            durable.remove_folder(path)
