"""Preflight: which faults are a node's and which the job's, and the checks of disk and clock."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mt_deepspeed import preflight as command
from mt_deepspeed.config import RunConfig
from mt_deepspeed.engine import preflight
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.engine.preflight import (
    MeetingError,
    Report,
    Verdict,
    judge,
    run_checks,
    run_folder_check,
    space_check,
)
from tests.helpers.ranks import run_ranks

VERSIONS = {"torch": "2.9", "driver": "570"}


def reports(nodes: str) -> list[Report]:
    """One rank per letter, on the node of that name."""
    return [Report(rank, node, versions=dict(VERSIONS), clock_s=100.0) for rank, node in enumerate(nodes)]


def test_nothing_wrong() -> None:
    assert judge(reports("aabb")) == Verdict([], [], Exit.FINISHED)


def test_fault_on_some_nodes_is_theirs() -> None:
    found = reports("abc")
    found[1].faults["shards"] = "x.arrow: missing"
    verdict = judge(found)
    assert (verdict.code, verdict.bad_nodes) == (Exit.BAD_NODE, ["b"])
    assert verdict.lines == ["shards: x.arrow: missing (on b); the other nodes are fine"]


def test_fault_on_all_nodes_is_the_jobs() -> None:
    found = reports("abc")
    for report in found:
        report.faults["shards"] = "x.arrow: missing"
    found[2].node_faults["GPU"] = "gone"
    verdict = judge(found)
    assert verdict.code == Exit.FAILED  # other nodes would not help
    assert set(verdict.lines) == {"shards: x.arrow: missing", "GPU: node c (rank 2): gone"}


def test_broken_gpu_of_the_only_node_is_the_nodes() -> None:
    found = reports("aa")
    found[1].node_faults["GPU"] = "gone"
    assert judge(found).code == Exit.BAD_NODE


def test_node_with_other_software_is_named() -> None:
    found = reports("abc")
    found[2].versions["driver"] = "550"
    verdict = judge(found)
    assert (verdict.code, verdict.bad_nodes) == (Exit.BAD_NODE, ["c"])
    assert "c has driver 550, the others 570" in verdict.lines[0]
    two = reports("ab")
    two[1].versions["torch"] = "2.8"
    assert judge(two).bad_nodes == ["b"]  # of two, rank 0's counts


def test_clock_that_is_off_is_named() -> None:
    found = reports("abc")
    found[0].clock_s += 60
    assert judge(found).bad_nodes == ["a"]
    found[0].clock_s -= 58
    assert judge(found).bad_nodes == []


def test_slow_gpu_is_named() -> None:
    found = reports("aabb")
    for report, speed in zip(found, (600.0, 590.0, 200.0, 610.0), strict=True):
        report.gpu_tflops = speed
    assert judge(found).bad_nodes == ["b"]


def test_run_folder_check_leaves_nothing(tmp_path: Path) -> None:
    run_folder_check(tmp_path / "not" / "there")()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot write"):
        run_folder_check(Path("/proc/self"))()


def test_space_check_counts_what_will_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(number: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=number))

    free(400)
    space_check(tmp_path / "run", 100, kept=3)()
    free(399)
    with pytest.raises(ValueError, match="4 checkpoints"):
        space_check(tmp_path / "run", 100, kept=3)()
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(100))
    free(300)
    space_check(tmp_path / "run", 100, kept=3)()


def meet(place: Place, run_dir: Path, world_size: int, drill: str) -> Verdict | str:
    os.environ.update(
        SLURMD_NODENAME=f"n{place.rank // 2}", WORLD_SIZE=str(world_size), MT_DRILL_BAD_NODE=drill
    )
    os.environ["LOCAL_RANK"] = str(place.rank % 2)
    try:
        return run_checks({"run folder": run_folder_check(run_dir)}, run_dir, timeout_s=5.0)
    except MeetingError as error:
        return str(error)


def test_ranks_agree_and_a_drilled_node_is_written_down(tmp_path: Path) -> None:
    (tmp_path / preflight.BAD_NODES).write_text("n7\n")
    found = run_ranks(3, meet, tmp_path, 3, "n1")
    assert found[0] == found[1] == found[2]
    assert found[0].code == Exit.BAD_NODE
    assert "n1" in found[0].lines[0]
    assert "drill" in found[0].lines[0]
    assert (tmp_path / preflight.BAD_NODES).read_text() == "n7\nn1\n"


def test_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    for said in run_ranks(2, meet, tmp_path, 3, ""):
        assert said.startswith("rank 2 of 3 did not start in time")


def test_command_takes_what_a_run_does_and_refuses_what_it_would_ignore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def checked(config: RunConfig, dry: bool) -> Exit:
        asked.append(dry)
        return Exit.FINISHED

    monkeypatch.setattr(command, "preflight", checked)
    run = ["--preset", "quickstart", "--deepspeed_config", "ds_configs/zero1.json", "--local_rank=0"]
    for arguments in (run, [*run, "--dry-run"]):
        with pytest.raises(SystemExit) as left:
            command.main(arguments)
        assert left.value.code == Exit.FINISHED
    assert asked == [False, True]
    with pytest.raises(SystemExit) as left:
        command.main([*run, "--print-config"])
    assert left.value.code == 2
