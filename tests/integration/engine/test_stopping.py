"""Signals, deadlines and switch files: all ranks stop at one step, saved, with the right exit code."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from mt_deepspeed.engine import store
from mt_deepspeed.engine.exit_codes import Exit
from tests.helpers.faults import Ranks, ToyRun, last_step
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Case, final_weights, logged

STEPS = 12
SLOW = 0.05


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(1, ToyRun(run_dir, Case(0, 8, STEPS))) == [Exit.FINISHED]
    return run_dir


def test_pre_empted_three_times_on_other_ranks_and_stages_equals_an_undisturbed_run(
    tmp_path: Path, undisturbed: Path
) -> None:
    """A signal to one rank only; each start has other ranks and another stage. Largest difference measured 4e-7."""
    starts = [
        (2, Case(2, 4, STEPS), 1, signal.SIGUSR1),
        (4, Case(1, 2, STEPS), 2, signal.SIGTERM),
        (1, Case(3, 8, STEPS), 0, signal.SIGUSR2),
    ]
    for world_size, case, rank, number in starts:
        with Ranks(world_size, ToyRun(tmp_path, case, SLOW), tmp_path / "out") as ranks:
            before = last_step(tmp_path)
            ranks.wait_until(lambda before=before: last_step(tmp_path) > before)  # type: ignore[misc]
            ranks.send(rank, number)
            assert ranks.exit_codes() == [Exit.REQUEUE] * world_size, ranks.output(0)
            seen = last_step(tmp_path)
            assert f"resuming from {tmp_path}" in ranks.output(0) or number == signal.SIGUSR1
        assert (tmp_path / "requeue").read_text() == f"{number.name} received at step {seen}\n"
        assert store.list_steps(tmp_path / "checkpoints")[-1] == seen < STEPS
    assert run_ranks(2, ToyRun(tmp_path, Case(0, 2, STEPS))) == [Exit.FINISHED] * 2
    assert not (tmp_path / "requeue").exists()
    expected, found = logged(undisturbed), logged(tmp_path)
    assert list(found) == list(expected)
    for step, figures in expected.items():
        assert found[step] == pytest.approx(figures, abs=2e-5), step
    weights = final_weights(undisturbed, STEPS)
    for name, tensor in final_weights(tmp_path, STEPS).items():
        assert torch.allclose(tensor, weights[name], atol=2e-5), name


def test_the_deadline_of_the_job_stops_the_run_before_it(tmp_path: Path) -> None:
    end = time.time() + 4
    run = ToyRun(tmp_path, Case(1, 4, 10_000), SLOW, {"resilience": {"deadline_margin_s": 1.0}})
    with Ranks(2, run, tmp_path / "out", MT_DEADLINE=str(end)) as ranks:
        assert ranks.exit_codes() == [Exit.REQUEUE] * 2, ranks.output(0)
    assert (tmp_path / "requeue").read_text().startswith("the job's time is nearly over")
    assert store.list_steps(tmp_path / "checkpoints") == [last_step(tmp_path)]


def test_a_deadline_that_is_no_time_is_refused(tmp_path: Path) -> None:
    with Ranks(1, ToyRun(tmp_path, Case(0, 8, 4)), tmp_path / "out", SLURM_JOB_END_TIME="noon") as ranks:
        assert ranks.exit_codes() == [Exit.FAILED]
        assert "SLURM_JOB_END_TIME='noon': expected seconds since 1970" in ranks.output(0)


def test_switch_files_save_and_stop(tmp_path: Path) -> None:
    with Ranks(2, ToyRun(tmp_path, Case(1, 4, 10_000), SLOW), tmp_path / "out") as ranks:
        ranks.wait_until(lambda: last_step(tmp_path) > 0)
        (tmp_path / "save").touch()
        ranks.wait_until(lambda: not (tmp_path / "save").exists())
        saved = store.list_steps(tmp_path / "checkpoints")
        assert len(saved) == 1
        ranks.wait_until(lambda: last_step(tmp_path) > saved[0])  # it went on
        (tmp_path / "stop").touch()
        assert ranks.exit_codes() == [Exit.FINISHED] * 2
    assert store.list_steps(tmp_path / "checkpoints") == [*saved, last_step(tmp_path)]
    assert not (tmp_path / "stop").exists()
    assert not (tmp_path / "requeue").exists()


def test_a_signal_during_evaluation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """Evaluation is given up, and made up for by the next start."""
    slow = ToyRun(tmp_path, Case(1, 4, 3), eval_batch_s=1.0)
    with Ranks(2, slow, tmp_path / "out") as ranks:
        ranks.wait_until(lambda: last_step(tmp_path) == 3)
        ranks.send(1, signal.SIGTERM)
        assert ranks.exit_codes(timeout_s=35) == [Exit.REQUEUE] * 2
    assert "eval/score" not in (tmp_path / "metrics.jsonl").read_text()
    assert run_ranks(2, ToyRun(tmp_path, Case(1, 4, 3), eval_batch_s=0.0)) == [Exit.FINISHED] * 2
    assert "eval/score" in (tmp_path / "metrics.jsonl").read_text()


def test_restarts_without_progress_end(tmp_path: Path) -> None:
    """Each start dies before its first checkpoint."""
    run = ToyRun(tmp_path, Case(0, 8, 4), settings={"resilience": {"max_idle_restarts": 2}}, fail_at=(0, 2))
    for _ in range(3):
        with Ranks(1, run, tmp_path / "out") as ranks:
            assert ranks.exit_codes() == [Exit.FAILED]
            assert "the disk is gone" in ranks.output(0)
    with Ranks(1, run, tmp_path / "out") as ranks:
        assert ranks.exit_codes() == [Exit.NO_PROGRESS]
        assert "started 3 times again from step 0" in ranks.output(0)
