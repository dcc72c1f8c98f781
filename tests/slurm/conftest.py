"""A SLURM cluster of three nodes for the whole session, and small jobs for it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Cluster, missing_programs
from tests.helpers.small_jobs import ROOT, TWO_NODES, VARIABLES, make_raw, make_shards, train_arguments

STEPS = 40


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed (apt-get install slurm-wlm munge): no {', '.join(missing)}")
    # The end of a time limit, say, must not leave daemons behind.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, raw: Path) -> Path:
    return make_shards(raw, tmp_path_factory.mktemp("shards"))


@dataclass(frozen=True)
class Jobs:
    """Submits the repository's job scripts; each job's output goes to a file of its own."""

    cluster: Cluster
    shards: Path
    folder: Path

    def submit(
        self, script: str, *arguments: str, options: tuple[str, ...] = TWO_NODES, **variables: str
    ) -> str:
        """`sbatch OPTIONS slurm/SCRIPT.sbatch ARGUMENTS`; returns the job's number."""
        path = ROOT / "slurm" / f"{script}.sbatch"
        options = (*options, f"--output={self.folder}/%j.out")
        return self.cluster.submit(path, *arguments, options=options, **VARIABLES, **variables)

    def pretrain(
        self, run_dir: Path, *settings: str, options: tuple[str, ...] = TWO_NODES, **variables: str
    ) -> str:
        """A training job."""
        length = [f"train.max_steps={STEPS}", "checkpoint.every_steps=8"]
        arguments = train_arguments(self.shards, run_dir, *length, *settings)
        return self.submit("pretrain", *arguments, options=options, **variables)

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        path = self.folder / f"{job}.out"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def finish(self, job: str) -> dict[str, str]:
        """Waits for the end of a job, which has to be a good one."""
        state = self.cluster.wait(job, log=self.folder / f"{job}.out")
        assert state["JobState"] == "COMPLETED", self.log(job)
        return state

    def wait_for_line(self, job: str, words: str) -> None:
        """Waits until a job has printed some words."""
        self.cluster.wait_until(lambda: words in self.log(job), f"{words!r} in the log of job {job}", 900)

    def nodes(self, job: str) -> list[str]:
        """Nodes a job runs on, or ran on last."""
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(job)["NodeList"]).split()


@pytest.fixture
def jobs(cluster: Cluster, shards: Path, tmp_path: Path) -> Jobs:
    return Jobs(cluster, shards, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a training job on two nodes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = Jobs(cluster, shards, folder)
    jobs.finish(jobs.pretrain(folder / "run"))
    shutil.copy(next(folder.glob("*.out")), folder / "run" / "job.out")
    return folder / "run"


def assert_same_result(run_dir: Path, undisturbed: Path) -> None:
    """The same losses at every step and the same final weights, bit for bit."""
    import torch

    from tests.helpers.runs import final_weights, logged  # seconds, which many tests here do not need

    assert logged(run_dir) == logged(undisturbed)
    assert sorted(logged(run_dir)) == list(range(1, STEPS + 1))
    ours, theirs = final_weights(run_dir, STEPS), final_weights(undisturbed, STEPS)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
