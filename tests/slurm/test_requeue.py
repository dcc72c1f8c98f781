"""What slurm/pretrain.sbatch makes of the status a run ends with: SLURM is real, the training is a line of shell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Cluster
from tests.helpers.small_jobs import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

# Line N of the file `starts` is what the ranks do in the N-th start.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *find_spec*) exit 0 ;;
    *--print-config*) echo "run_dir: $RUN_DIR" ;;
    -c*) exec {sys.executable} "$@" ;;
    *) eval "$(sed -n "$((${{SLURM_RESTART_COUNT:-0}} + 1))p" "$RUN_DIR/starts")" ;;
esac
"""
ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60")


@dataclass(frozen=True)
class FakeRuns:
    """Jobs of slurm/pretrain.sbatch that train nothing."""

    cluster: Cluster
    folder: Path

    def submit(self, name: str, starts: Sequence[str], *options: str, **variables: str) -> str:
        run = self.folder / name
        run.mkdir()
        (run / "starts").write_text("\n".join(starts) + "\n")
        options = (*ONE_NODE, f"--output={run}/job.out", *options)
        variables = {"PYTHON": str(self.folder / "python"), "RUN_DIR": str(run), **variables}
        return self.cluster.submit(ROOT / "slurm" / "pretrain.sbatch", options=options, **variables)

    def log(self, name: str) -> str:
        return (self.folder / name / "job.out").read_text("utf-8")

    def wait_for(self, name: str, word: str, timeout_s: float = 60) -> None:
        output = self.folder / name / "job.out"
        self.cluster.wait_until(
            lambda: output.exists() and word in output.read_text("utf-8"), word, timeout_s
        )


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> FakeRuns:
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return FakeRuns(cluster, tmp_path)


def test_which_ends_go_back_to_the_queue(runs: FakeRuns) -> None:
    again = {
        "saved": "exit 85",
        "hung": "exit 88",
        "killed": "kill -9 $$",
        "lost": 'touch "$RUN_DIR/requeue"; exit 1',  # a launcher that loses the status
    }
    jobs = {name: runs.submit(name, [first, "echo made it"]) for name, first in again.items()}
    final = {"failed": 1, "refused": 2, "nameless": 86, "idle": 87}
    ended = {name: runs.submit(name, [f"exit {status}"]) for name, status in final.items()}
    final["forbidden"] = final["often"] = 85
    ended["forbidden"] = runs.submit("forbidden", ["exit 85"], "--no-requeue")
    ended["often"] = runs.submit("often", ["exit 85"], MAX_RESTARTS="0")
    for name, job in ended.items():
        state = runs.cluster.wait(job)
        assert (state["JobState"], state["ExitCode"]) == ("FAILED", f"{final[name]}:0"), runs.log(name)
        assert state["Restarts"] == "0"
    for name, job in jobs.items():
        state = runs.cluster.wait(job)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), runs.log(name)
        assert "back to the queue" in runs.log(name)
        assert "start number 2" in runs.log(name)
        assert not (runs.folder / name / "requeue").exists()


def test_refused_nodes_are_avoided_one_after_the_other(runs: FakeRuns) -> None:
    refuse = 'echo "$SLURMD_NODENAME" >"$RUN_DIR/bad_nodes.txt"; exit 86'
    job = runs.submit("refused", [refuse, refuse, "echo made it"])
    state = runs.cluster.wait(job)
    assert state["JobState"] == "COMPLETED", runs.log("refused")
    used = [
        line.split(" on ")[1].split(",")[0]
        for line in runs.log("refused").splitlines()
        if " ranks on " in line
    ]
    assert sorted(used) == ["n1", "n2", "n3"], runs.log("refused")


def test_a_wrong_command_ends_before_the_ranks_start(runs: FakeRuns, cluster: Cluster) -> None:
    output = runs.folder / "job.out"
    options = (*ONE_NODE, f"--output={output}")
    script = ROOT / "slurm" / "pretrain.sbatch"
    job = cluster.submit(script, "--preset", "none", options=options, PYTHON=sys.executable)
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "none" in output.read_text("utf-8")
    missing = cluster.submit(script, options=options, PYTHON="/nowhere/python")
    assert cluster.wait(missing)["ExitCode"] == "1:0"
    assert "FAILED: /nowhere/python on" in output.read_text("utf-8")


def test_cancelled_jobs_save_and_stay_cancelled(runs: FakeRuns) -> None:
    job = runs.submit(
        "cancelled", ["""trap 'touch "$RUN_DIR/saved"; exit 85' TERM; echo running; sleep 60 & wait"""]
    )
    runs.wait_for("cancelled", "running")
    runs.cluster.run("scancel", job)
    assert runs.cluster.wait(job)["JobState"] == "CANCELLED"
    saved = runs.folder / "cancelled" / "saved"
    runs.cluster.wait_until(saved.exists, "the save of a cancelled job", 60)
    assert runs.cluster.job(job)["Restarts"] == "0"


def test_a_job_of_higher_priority_takes_the_node_and_gives_it_back(runs: FakeRuns) -> None:
    low = runs.submit(
        "low", ['trap "exit 85" TERM; echo running; sleep 60 & wait', "true"], "--exclusive", "-w", "n1"
    )
    runs.wait_for("low", "running")
    high = runs.submit("high", ["true"], "--partition=urgent", "--exclusive", "-w", "n1")
    assert runs.cluster.wait(high)["JobState"] == "COMPLETED"
    state = runs.cluster.wait(low)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), runs.log("low")


@pytest.mark.slow  # commands wait long for an answer
def test_the_controller_may_be_away_when_a_run_stops(runs: FakeRuns) -> None:
    job = runs.submit(
        "away", ['echo running; until [ -e "$RUN_DIR/go" ]; do sleep 0.1; done; exit 85', "true"]
    )
    runs.wait_for("away", "running")
    runs.cluster.wait_for_saved_state()
    runs.cluster.kill_controller()
    (runs.folder / "away" / "go").touch()
    runs.wait_for("away", "back to the queue", timeout_s=300)  # srun and scontrol give up after a while each
    runs.cluster.start_controller()
    state = runs.cluster.wait(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), runs.log("away")
