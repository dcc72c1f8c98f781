"""Ranks that die, stop, hang, or cannot read or write: the others soon end and say why; a restart goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mt_deepspeed.engine import durable, store
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.launch import Place
from tests.helpers.faults import Ranks, ToyRun, last_step
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Case, final_weights

STEPS = 12
SLOW = 0.05
HANG_S = 10.0
"""Long enough for a busy machine not to look like one that hangs."""


def toy_run(run_dir: Path, steps: int = STEPS, hang_s: float = 300.0, **changes: Any) -> ToyRun:
    settings: dict[str, dict[str, Any]] = {
        "checkpoint": {"every_steps": 4},
        "resilience": {"step_timeout_s": hang_s},
    }
    return ToyRun(run_dir, Case(2, 4, steps), settings=settings, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(2, toy_run(run_dir)) == [Exit.FINISHED] * 2
    return final_weights(run_dir, STEPS)


def assert_goes_on(run_dir: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """The same command again ends with the same weights, bit for bit."""
    assert run_ranks(2, toy_run(run_dir)) == [Exit.FINISHED] * 2
    for name, tensor in final_weights(run_dir, STEPS).items():
        assert torch.equal(tensor, undisturbed[name]), name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_ends_the_others_and_a_restart_goes_on(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], number: signal.Signals
) -> None:
    with Ranks(2, toy_run(tmp_path, step_s=SLOW, hang_s=HANG_S), tmp_path / "out") as ranks:
        ranks.wait_until(lambda: last_step(tmp_path) >= 5)
        ranks.send(1, number)
        ranks.processes[0].join(150)
        code = ranks.processes[0].exitcode
        said = ranks.output(0)
    if number == signal.SIGSTOP:
        assert code == Exit.HUNG
        assert "no progress for" in said
        assert "late: rank 1 on" in said
        assert "stopped, dead, or its node gone" in said
        assert "_agree" in said or "all_reduce" in said  # the stack of this rank
        assert "late: rank 1 on" in (tmp_path / "hangs" / "rank-00000.txt").read_text()
    else:
        assert code in (Exit.FAILED, Exit.HUNG)
    assert_goes_on(tmp_path, undisturbed)
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert account["starts"] == 2
    assert 1 <= account["lost_steps"] <= 4


def test_a_rank_that_hangs_in_python_is_named_with_its_stack(tmp_path: Path) -> None:
    with Ranks(2, toy_run(tmp_path, hang_s=HANG_S, hang_at=(1, 3)), tmp_path / "out") as ranks:
        assert ranks.exit_codes() == [Exit.HUNG] * 2
        assert "late: rank 1 on" in ranks.output(0)
        assert "step 3, reading samples" in ranks.output(0)
        assert "wait_for_ever" in ranks.output(1)


def test_a_rank_that_runs_out_of_memory_ends_the_others_and_a_restart_goes_on(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    with Ranks(2, toy_run(tmp_path, too_large_at=(1, 6)), tmp_path / "out") as ranks:
        assert ranks.exit_codes() == [Exit.FAILED] * 2
        assert "allocate memory" in ranks.output(1)
    assert store.newest_valid(tmp_path / "checkpoints") is not None
    assert_goes_on(tmp_path, undisturbed)


def test_samples_that_one_rank_cannot_read_stop_all_with_one_message(tmp_path: Path) -> None:
    with Ranks(2, toy_run(tmp_path, fail_at=(1, 6)), tmp_path / "out") as ranks:
        assert ranks.exit_codes() == [Exit.FAILED] * 2
        for rank in range(2):
            assert "reading samples failed: rank 1 on" in ranks.output(rank)
            assert "the disk is gone" in ranks.output(rank)
    assert store.list_steps(tmp_path / "checkpoints") == [4]  # the save under way was finished


@dataclass(frozen=True)
class Dying:
    """A run of which one rank dies at the `at`-th file operation of its saves from step 8 on."""

    run: ToyRun
    rank: int
    at: int

    def __call__(self, place: Place) -> int:
        count = 0

        def wrap(module: Any, name: str) -> None:
            real = getattr(module, name)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                if threading.current_thread().name == "background" and last_step(self.run.run_dir) >= 8:
                    count += 1
                    if count == self.at:
                        os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(module, name, run)

        if place.rank == self.rank:
            for module, name in [
                (os, "replace"),
                (os, "fsync"),
                (durable, "save_file"),
                (durable, "write_text"),
            ]:
                wrap(module, name)
            wrap(shutil, "rmtree")
        return self.run(place)


def die_in_a_save(run_dir: Path, world_size: int, rank: int, at: int, steps: int = STEPS) -> int | None:
    """Step of the newest whole checkpoint after the death; None if the saves have fewer operations."""
    run = toy_run(run_dir, step_s=0.02, steps=steps)
    with Ranks(world_size, Dying(run, rank, at), run_dir / "out") as ranks:
        codes = ranks.exit_codes()
    if codes == [Exit.FINISHED] * world_size:
        return None
    assert codes[rank] == -signal.SIGKILL
    newest = store.newest_valid(run_dir / "checkpoints")
    assert newest is not None
    return int(store.read_state(newest)["step"])


@pytest.mark.parametrize(("rank", "at"), [(0, 3), (1, 2)])
def test_death_in_the_middle_of_a_save_leaves_the_one_before(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], rank: int, at: int
) -> None:
    assert die_in_a_save(tmp_path, 2, rank, at) == 4
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.slow
def test_death_at_every_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    found = []
    for at in range(1, 100):
        found.append(die_in_a_save(tmp_path / str(at), 1, 0, at, steps=9))
        if found[-1] is None:
            break
    assert len(found) > 20
    assert found[-1] is None
    assert set(found[:-1]) == {4, 8, 9}
    assert found[:-1] == sorted(found[:-1], key=lambda step: step or 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class Unchecked:
    """A run that does not ask how much space is free: it meets the full disk in the middle of writing."""

    run: ToyRun

    def __call__(self, place: Place) -> int:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)  # type: ignore[assignment]
        return self.run(place)


def fill(ballast: Path) -> None:
    """Leaves no byte free."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("asked", [True, False])
def test_a_full_disk_stops_all_ranks_and_a_restart_with_space_goes_on(
    small_disk: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path, asked: bool
) -> None:
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    run = toy_run(run_dir, step_s=SLOW)
    with Ranks(2, run if asked else Unchecked(run), tmp_path / "out") as ranks:
        ranks.wait_until(lambda: store.list_steps(run_dir / "checkpoints") == [4])
        fill(ballast)
        assert ranks.exit_codes() == [Exit.FAILED] * 2
        for rank in range(2):
            assert "GiB are free" in ranks.output(rank) or "No space left on device" in ranks.output(rank)
            assert "CheckpointError" in ranks.output(rank)
    ballast.unlink()
    assert_goes_on(run_dir, undisturbed)
