from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest

from mt_deepspeed.engine.launch import LaunchError, fill_rank_environment, tasks_per_node

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),4",
}


@pytest.fixture
def scontrol(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> str:
        calls.append(command)
        return (
            "n1\nn2\nn3\n"
            if "hostnames" in command
            else "NodeName=n1 Arch=x NodeAddr=10.0.0.7 NodeHostName=n1"
        )

    monkeypatch.setattr(subprocess, "check_output", run)
    return calls


def test_one_srun_task_per_rank(scontrol: list[list[str]]) -> None:
    env = dict(SLURM)
    fill_rank_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_SIZE"]) == ("5", "8", "1", "4")
    assert env["MASTER_ADDR"] == "10.0.0.7"
    assert 20000 <= int(env["MASTER_PORT"]) < 32000
    assert scontrol[0][-1] == "n[1-3]"


def test_given_address_and_port_stay(scontrol: list[list[str]]) -> None:
    env = {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "4000"}
    fill_rank_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("head", "4000")
    assert not scontrol


def test_ranks_in_a_container_without_slurm_must_be_told_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        fill_rank_environment(dict(SLURM))


def test_launchers_own_variables_win_over_slurms(scontrol: list[list[str]]) -> None:
    env = {**SLURM, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    fill_rank_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"]) == ("1", "2")


def test_plain_process_is_alone() -> None:
    env: dict[str, str] = {}
    fill_rank_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("0", "1", "0")
    assert int(env["MASTER_PORT"]) > 0


def test_process_in_a_batch_script_without_srun_is_alone() -> None:
    env = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    fill_rank_environment(env)
    assert env["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("env", [{"RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_half_an_environment_is_an_error(env: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="is set but"):
        fill_rank_environment(dict(env))


def test_tasks_per_node_reads_slurms_notation() -> None:
    assert tasks_per_node("2(x2),1") == [2, 2, 1]
    assert tasks_per_node("4") == [4]
    with pytest.raises(LaunchError, match="'2x3'"):
        tasks_per_node("2x3")


ALLOCATIONS = """
import resource, torch
from mt_deepspeed.engine.launch import keep_freed_memory

keep_freed_memory()
def page_faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(page_faults() for _ in range(8)))  # the first ones make the heap grow
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATIONS], check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 25, "100 MB are at least 50 pages, however large they are"
