"""Training jobs on two nodes that something happens to: they end with the result of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import Jobs, assert_same_result

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_signal_checkpoint_requeue_same_result(jobs: Jobs, undisturbed: Path) -> None:
    run = jobs.folder / "run"
    # Checkpoints by step are off: what the run goes on from was saved because of the signal.
    job = jobs.pretrain(run, "checkpoint.every_steps=0")
    jobs.wait_for_line(job, "step 3/")
    jobs.cluster.run("scancel", "--signal=USR1", job)  # as SLURM does some time before the time limit
    state = jobs.finish(job)
    log = jobs.log(job)
    assert state["Restarts"] == "1", log
    assert "==> the run has saved and stopped: back to the queue" in log
    assert "start number 2" in log
    assert "resuming from" in log
    assert_same_result(run, undisturbed)


def test_a_lost_node(jobs: Jobs, undisturbed: Path) -> None:
    run = jobs.folder / "run"
    job = jobs.pretrain(run)
    jobs.wait_for_line(job, "step 10/")
    lost = jobs.nodes(job)[-1]
    jobs.cluster.kill_node(lost)
    try:
        state = jobs.finish(job)
    finally:
        jobs.cluster.start_node(lost)
    assert state["Restarts"] == "1", jobs.log(job)
    assert lost not in jobs.nodes(job)
    assert "step-00000008: step 8" in jobs.log(job)
    assert_same_result(run, undisturbed)


@pytest.mark.slow  # the quick tests have a lost node, and what the script does when a rank is killed
def test_a_killed_rank(jobs: Jobs, undisturbed: Path) -> None:
    run = jobs.folder / "run"
    job = jobs.pretrain(run)
    jobs.wait_for_line(job, "step 10/")
    jobs.cluster.kill_rank(job, 1)
    state = jobs.finish(job)
    assert state["Restarts"] == "1", jobs.log(job)
    assert "a rank was killed" in jobs.log(job)
    assert_same_result(run, undisturbed)


def test_an_error_that_all_ranks_meet_ends_the_job(jobs: Jobs) -> None:
    job = jobs.pretrain(jobs.folder / "run", "data.train=[{path: nowhere}]")
    state = jobs.cluster.wait(job, log=jobs.folder / f"{job}.out")
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "0"), jobs.log(job)
    assert "nowhere" in jobs.log(job)


def test_a_node_that_the_checks_at_the_start_refuse(jobs: Jobs) -> None:
    job = jobs.pretrain(jobs.folder / "run", "train.max_steps=1", MT_DRILL_BAD_NODE="n1")
    state = jobs.finish(job)
    assert state["Restarts"] == "1", jobs.log(job)
    assert "==> avoiding from now on: n1" in jobs.log(job)
    assert state["ExcNodeList"] == "n1"
    assert jobs.nodes(job) == ["n2", "n3"]
