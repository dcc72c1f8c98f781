"""The job scripts on a SLURM cluster of this host, at a size that takes seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.conversion import tree
from tests.helpers.runs import logged
from tests.helpers.small_jobs import ROOT, TWO_NODES, VARIABLES, train_arguments
from tests.slurm.conftest import STEPS, Jobs, assert_same_result

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ONE_TASK = ("--cpus-per-task=1", "--time=60")


def test_array_of_parts_and_their_merge_give_the_bytes_of_one_job(
    jobs: Jobs, raw: Path, shards: Path
) -> None:
    out = jobs.folder / "coco"
    arguments = ["coco", "--raw", str(raw), "--out", str(out)]
    array = jobs.submit("convert", *arguments, options=(*ONE_TASK, "--array=1-3"))
    after = (f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    merge = jobs.submit("convert", "merge", "--out", str(out), options=(*ONE_TASK, *after))
    jobs.finish(merge)
    assert tree(out) == tree(shards / "coco")
    assert not out.with_name("coco.parts").exists()


def test_a_run_on_two_nodes_and_the_evaluation_that_waits_for_it(
    jobs: Jobs, undisturbed: Path, shards: Path
) -> None:
    log = (undisturbed / "job.out").read_text("utf-8")
    assert "2 ranks on n[1-2], start number 1" in log
    assert "==> finished" in log
    assert sorted(logged(undisturbed)) == list(range(1, STEPS + 1))
    run, out = jobs.folder / "run", jobs.folder / "evaluation.json"
    train = jobs.pretrain(run, "train.max_steps=2")
    evaluate = jobs.submit(
        "evaluate",
        *[
            "--checkpoint",
            str(run),
            "--shards",
            str(shards / "coco"),
            "--max-samples",
            "8",
            "--out",
            str(out),
        ],
        options=(*TWO_NODES, f"--dependency=afterok:{train}", "--kill-on-invalid-dep=yes"),
    )
    assert jobs.cluster.job(evaluate)["Reason"] == "Dependency"
    jobs.finish(evaluate)
    assert json.loads(out.read_text("utf-8"))["mlm_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "slurm"])
def test_deepspeeds_launchers_stop_and_continue_too(jobs: Jobs, undisturbed: Path, launcher: str) -> None:
    run = jobs.folder / "run"
    job = jobs.pretrain(run, LAUNCHER=launcher)
    jobs.wait_for_line(job, "step 10/")
    jobs.cluster.run("scancel", "--signal=USR1", job)
    state = jobs.finish(job)
    assert state["Restarts"] == "1", jobs.log(job)
    assert "==> the run has saved and stopped: back to the queue" in jobs.log(job)
    assert_same_result(run, undisturbed)


def test_fine_tuning_with_scripts_copied_beside_an_installed_package(jobs: Jobs, undisturbed: Path) -> None:
    for name in ("slurm", "ds_configs"):
        shutil.copytree(ROOT / name, jobs.folder / name)
    run = jobs.folder / "run"
    arguments = train_arguments(jobs.shards, run, "train.max_steps=1", "train.micro_batch_size=8")
    options = (*TWO_NODES, "--nodes=1", f"--output={jobs.folder}/%j.out")
    variables = {**VARIABLES, "PYTHONPATH": str(ROOT), "WEIGHTS": str(undisturbed)}  # PYTHONPATH: "installed"
    script = jobs.folder / "slurm" / "finetune.sbatch"
    jobs.finish(jobs.cluster.submit(script, *arguments, options=options, **variables))
    assert f"init_from: {undisturbed}" in (run / "config.yaml").read_text("utf-8")
