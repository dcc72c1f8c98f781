"""Checkpoint folders without ranks: what a crash at any moment leaves is refused or whole."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mt_deepspeed.engine import durable, store
from mt_deepspeed.engine.slice_files import SliceFiles
from mt_deepspeed.engine.store import CheckpointError
from mt_deepspeed.engine.weights import choose_weights, read_weights


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 5), float(step)), "b": torch.arange(7.0) + step}


def save(root: Path, step: int, keep_last: int = 2) -> None:
    """What the ranks of a run do together, in one process: parameters cut into two files."""
    root.mkdir(parents=True, exist_ok=True)
    store.clean(root)
    temporary = root / f".writing-{store.folder_name(step)}"
    temporary.mkdir()
    flat = {name: value.flatten() for name, value in tensors(step).items()}
    parts: list[dict[str, torch.Tensor]] = [
        {"a@0": flat["a"][:11].clone()},
        {"a@11": flat["a"][11:].clone(), "b@0": flat["b"]},
    ]
    files = {}
    for rank, part in enumerate(parts):
        moments = {
            f"{key}/{moment}": value * 2
            for key, value in part.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        for kind, values in (("weights", part), ("moments", moments)):
            name = f"{kind}-{rank:05d}-of-00002.safetensors"
            files[name] = durable.write_tensors(temporary / name, values)
    files["frozen.safetensors"] = durable.write_tensors(
        temporary / "frozen.safetensors", {"ids": torch.arange(3)}
    )
    state = {
        "format_version": 1,
        "step": step,
        "parameters": {n: list(v.shape) for n, v in tensors(step).items()},
    }
    files["state.json"] = durable.write_json(temporary / "state.json", state)
    durable.write_json(temporary / "hashes.json", {"files": files})
    store.publish(temporary, root / store.folder_name(step))
    store.retain(root, keep_last)


def intact_step(root: Path) -> int | None:
    """Step of the newest valid checkpoint, after reading all of it."""
    folder = store.newest_valid(root)
    if folder is None:
        return None
    step = int(store.read_state(folder)["step"])
    found = dict(read_weights(folder))
    assert all(torch.equal(found[name], value) for name, value in tensors(step).items())
    return step


def test_slices_come_back_in_any_cut(tmp_path: Path) -> None:
    save(tmp_path, 3)
    files = SliceFiles(tmp_path / store.folder_name(3))
    flat = tensors(3)["a"].flatten()
    for start in range(15):
        for numel in range(1, 15 - start):
            assert torch.equal(files.read("a", start, numel), flat[start : start + numel])
            assert torch.equal(files.read("a", start, numel, "exp_avg"), 2 * flat[start : start + numel])
    assert files.shapes() == {"a": (3, 5), "b": (7,), "ids": (3,)}
    with pytest.raises(CheckpointError, match="0 of 2 elements of c"):
        files.read("c", 0, 2)


class Crash(BaseException):
    """Stands for the death of the process."""


def crashing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], bool]:
    """Lets the `at`-th file operation die: writers leave half a file, the others do nothing."""
    count = 0
    crashed = False

    def wrap(name: str, half: Callable[..., None] | None) -> None:
        real = getattr(os, name) if name in ("replace", "fsync") else getattr(durable, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count, crashed
            count += 1
            if count == at:
                crashed = True
                if half:
                    half(*args)
                raise Crash
            return real(*args, **kwargs)

        monkeypatch.setattr(os if name in ("replace", "fsync") else durable, name, run)

    def half_tensors(path: Path, values: Any) -> None:
        path.write_bytes(b"\x08\x00\x00\x00half")

    def half_text(path: Path, text: str) -> None:
        path.write_text(text[: len(text) // 2])

    wrap("write_tensors", half_tensors)
    wrap("write_text", half_text)
    wrap("replace", None)
    wrap("fsync", None)
    return lambda: crashed


def test_death_at_any_operation_of_a_save_keeps_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at every operation in turn; the older checkpoint, or the new one if it got its name, is whole."""
    operations = 0
    for at in range(1, 1000):
        root = tmp_path / str(at)
        for step in (1, 2):
            save(root, step)
        with monkeypatch.context() as patch:
            crashed = crashing(patch, at)
            try:
                save(root, 3)
            except Crash:
                operations += 1
            if not crashed():
                break
        assert intact_step(root) in (2, 3)
        save(root, 4)  # and the run goes on
        assert intact_step(root) == 4
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert operations > 20


def test_sigkill_during_saves_keeps_a_valid_checkpoint(tmp_path: Path) -> None:
    """A process that saves without pause is killed at random moments."""
    draw = random.Random(0)
    kills = 0
    while kills < 12 or (intact_step(tmp_path) or 0) < 4:
        assert kills < 300, "no save ever finishes"
        pid = os.fork()
        if pid == 0:
            save_without_pause(tmp_path)
        time.sleep(draw.uniform(0.02, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        kills += 1
        if store.list_steps(tmp_path):
            assert intact_step(tmp_path) is not None


def save_without_pause(root: Path) -> NoReturn:
    try:
        step = (store.list_steps(root) or [0])[-1]
        while True:
            step += 1
            save(root, step)
    finally:
        os._exit(1)


def test_damage_is_found_and_older_one_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / store.folder_name(2)
    (newest / "state.json").write_text((newest / "state.json").read_text().replace("2", "3"))
    folder = store.newest_valid(tmp_path)
    assert folder == tmp_path / store.folder_name(1)
    assert "state.json has another sha256" in caplog.text
    (newest / "hashes.json").write_text("{")
    assert "hashes.json cannot be read" in store.faults(newest)[0]
    assert store.newest_valid(tmp_path / "nowhere") is None


def test_retention_keeps_newest_and_best(tmp_path: Path) -> None:
    for step in range(1, 4):
        save(tmp_path, step, keep_last=10)
    store.write_best(tmp_path, 1, "eval/score", 0.5)
    for step in range(4, 7):
        save(tmp_path, step, keep_last=2)
    assert store.list_steps(tmp_path) == [1, 5, 6]
    save(tmp_path, 7, keep_last=0)
    assert store.list_steps(tmp_path) == [1, 7]
    assert (tmp_path / "latest").read_text() == "step-00000007\n"


def test_retention_never_counts_an_incomplete_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=10)
    for step in (2, 3):
        (tmp_path / store.folder_name(step) / "COMPLETE").unlink()
    store.retain(tmp_path, 1)
    assert intact_step(tmp_path) == 1


def test_weights_of_a_run_are_the_best_ones(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(root, step, keep_last=3)
    assert choose_weights(tmp_path) == root / store.folder_name(3)
    store.write_best(root, 2, "eval/score", 1.0)
    assert choose_weights(tmp_path) == root / store.folder_name(2)
    assert choose_weights(root / store.folder_name(1)) == root / store.folder_name(1)
    (root / store.folder_name(2) / "weights-00000-of-00002.safetensors").unlink()
    assert choose_weights(tmp_path) == root / store.folder_name(3)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        choose_weights(tmp_path / "other")


def test_other_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / store.folder_name(1) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 9}))
    with pytest.raises(CheckpointError, match="format_version is 9, expected 1"):
        store.read_state(file.parent)
