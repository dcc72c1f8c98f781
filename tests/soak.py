"""Kills and stops ranks, nodes and the controller of a small SLURM cluster while a job trains, and looks at the rest.

    python tests/soak.py --minutes 30 --faults 25 --seed 0 --steps 1000

Not part of the test suite: it takes as long as it is told. It first makes an undisturbed run, then one of the same
length to which something happens again and again, each fault at a random time: now during a start, now some steps
after it. In the end every step of the disturbed run, repeated ones too, must have the losses of the undisturbed one,
and the last checkpoint its parameters, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # started as a script

from tests.helpers.slurm_cluster import Cluster, missing_programs
from tests.helpers.small_jobs import ROOT, TWO_NODES, VARIABLES, make_raw, make_shards, train_arguments

SAVE_EVERY = 10
# A rank that hangs is found after these, in a step and in a start.
LIMITS = ("resilience.step_timeout_s=20", "resilience.first_step_timeout_s=90")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """One record a step made, in order of time; steps that were made again are there again."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    return [record for record in found if "train/grad_norm" in record]


def figures(record: dict[str, Any]) -> dict[str, float]:
    """What depends on the samples and the weights of a step."""
    return {name: value for name, value in record.items() if name.startswith(("train/", "lr/"))}


@dataclass
class Fault:
    """Something that was done to the job."""

    kind: str
    what: str
    time: float
    """Unix time."""
    made: int = 0
    """Records of steps when the job had stopped because of it."""


@dataclass
class Soak:
    """One disturbed job."""

    cluster: Cluster
    shards: Path
    folder: Path
    steps: int
    rng: random.Random
    faults: list[Fault] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "disturbed"

    @property
    def wait_s(self) -> float:
        """How long anything may take, an undisturbed run included."""
        return max(600.0, self.steps)

    def submit(self, run_dir: Path) -> str:
        """A training job on two nodes; restarts at the same step are part of the plan."""
        length = [f"train.max_steps={self.steps}", f"checkpoint.every_steps={SAVE_EVERY}"]
        restarts = "resilience.max_idle_restarts=1000"
        arguments = train_arguments(self.shards, run_dir, *length, *LIMITS, restarts)
        options = (*TWO_NODES, "--time=600", f"--output={run_dir}.out")
        return self.cluster.submit(ROOT / "slurm/pretrain.sbatch", *arguments, options=options, **VARIABLES)

    def disturb(self, job: str, until: float, most: int) -> None:
        """Faults, one after the other, until the time is over, there were enough, or the job has ended."""
        kinds: dict[str, Callable[[str], str]] = {
            "kill -9 of a rank": self._kill_rank,
            "kill -9 of a node": self._kill_node,
            "kill -9 of the controller": self._kill_controller,
            "SIGUSR1 or SIGTERM": self._signal,
            "SIGSTOP of a rank": self._stop_rank,
        }
        # Every kind once, then as it comes.
        order = itertools.chain(kinds, iter(lambda: self.rng.choice(list(kinds)), None))
        for kind in itertools.islice(order, most):
            if time.monotonic() > until:
                return
            if not self._wait_for_a_moment(job):
                return
            restarts = self._restarts(job)
            fault = Fault(kind, "", time.time())
            fault.what = kinds[kind](job)
            self.faults.append(fault)
            step = len({record["step"] for record in records(self.run_dir)})
            print(
                f"{time.strftime('%H:%M:%S')} fault {len(self.faults)}: {fault.what}, at step {step}",
                flush=True,
            )
            if kinds[kind] != self._kill_controller:
                self._wait_for_a_restart(job, restarts)
            fault.made = len(records(self.run_dir))

    def _wait_for_a_restart(self, job: str, restarts: int) -> None:
        """A job that ends instead was hit after its last step."""
        self.cluster.wait_until(
            lambda: self._restarts(job) > restarts or self._ended(job), "a restart of the job", self.wait_s
        )

    def _wait_for_a_moment(self, job: str) -> bool:
        """Waits for a random time in the life of a start; False: the job has ended."""
        self._live_a_while(job)
        while not self._ended(job):
            if len(self.cluster.ranks(job)) == 2:
                return True
            self._live_a_while(job)  # the start ended meanwhile
        return False

    def _live_a_while(self, job: str) -> None:
        self.cluster.wait_until(
            lambda: len(self.cluster.ranks(job)) == 2 or self._ended(job), "two ranks", self.wait_s
        )
        if self.rng.random() < 0.3:
            time.sleep(self.rng.uniform(0, 8))  # in the imports, the rendezvous or the loading
        else:
            count = len(records(self.run_dir)) + self.rng.randint(1, 3 * SAVE_EVERY)
            self.cluster.wait_until(
                lambda: len(records(self.run_dir)) >= count or self._ended(job), "steps", self.wait_s
            )

    def _kill_rank(self, job: str) -> str:
        rank = self.rng.choice(sorted(self.cluster.ranks(job)))
        self.cluster.kill_rank(job, rank)
        return f"kill -9 of rank {rank}"

    def _kill_node(self, job: str) -> str:
        nodes = self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(job)["NodeList"]).split()
        node = self.rng.choice(nodes)
        self.cluster.kill_node(node)
        self.cluster.wait_until(
            lambda: self.cluster.job(job).get("JobState") != "RUNNING",
            "the lost node to be noticed",
            self.wait_s,
        )
        self.cluster.start_node(node)
        return f"kill -9 of all of node {node}"

    def _kill_controller(self, job: str) -> str:
        self.cluster.wait_for_saved_state()
        self.cluster.kill_controller()
        away_s = self.rng.uniform(1, 6)
        time.sleep(away_s)
        self.cluster.start_controller()
        return f"kill -9 of the controller, away for {away_s:.0f} s"

    def _stop_rank(self, job: str) -> str:
        rank, pid = self.rng.choice(sorted(self.cluster.ranks(job).items()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        return f"SIGSTOP of rank {rank}"

    def _signal(self, job: str) -> str:
        name = self.rng.choice(["USR1", "TERM"])
        for pid in self.cluster.ranks(job).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, f"SIG{name}"))
        return f"SIG{name} to the ranks"

    def _restarts(self, job: str) -> int:
        return int(self.cluster.job(job).get("Restarts", -1))

    def _ended(self, job: str) -> bool:
        return self.cluster.job(job).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def lost_steps(made: list[dict[str, Any]]) -> list[int]:
    """For every restart that repeated steps: how many."""
    steps = [int(record["step"]) for record in made]
    return [before - now + 1 for before, now in itertools.pairwise(steps) if now <= before]


def table(faults: list[Fault], made: list[dict[str, Any]]) -> list[str]:
    """Per kind of fault: how often, steps lost, seconds until the next new step; rows of Markdown."""
    lines = [
        "| fault | times | lost steps | seconds to the next step, median (longest) |",
        "|---|---|---|---|",
    ]
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = [fault for fault in faults if fault.kind == kind and 0 < fault.made < len(made)]
        lost = [int(made[fault.made - 1]["step"] - made[fault.made]["step"]) + 1 for fault in own]
        waited = [made[fault.made]["time"] - fault.time for fault in own] or [0.0]
        seconds = f"{statistics.median(waited):.0f} ({max(waited):.0f})"
        times = sum(fault.kind == kind for fault in faults)
        lines.append(f"| {kind} | {times} | {', '.join(map(str, lost))} | {seconds} |")
    return lines


def goodput(run_dir: Path) -> str:
    """Shares of the wall-clock time, over all starts."""
    account = json.loads((run_dir / "goodput.json").read_text("utf-8"))
    total = sum(account["seconds"].values())
    shares = (f"{name} {seconds / total:.1%}" for name, seconds in account["seconds"].items())
    return f"{', '.join(shares)} of {total:.0f} s; {account['starts']} starts, {account['lost_steps']} steps lost"


def differences(run_dir: Path, reference: Path, steps: int) -> list[str]:
    """How a run differs from the one that nothing happened to; empty: not at all."""
    import torch

    from tests.helpers.runs import final_weights

    expected = {record["step"]: figures(record) for record in records(reference)}
    made = records(run_dir)
    found = [f"step {r['step']}: {figures(r)}, expected {expected[r['step']]}" for r in made]
    found = [text for text, r in zip(found, made, strict=True) if figures(r) != expected[r["step"]]]
    missing = set(expected) - {record["step"] for record in made}
    found += [f"steps {sorted(missing)} were never logged"] if missing else []
    ours, theirs = final_weights(run_dir, steps), final_weights(reference, steps)
    found += [f"final {name} differs" for name in theirs if not torch.equal(ours[name], theirs[name])]
    return found


def soak(folder: Path, minutes: float, seed: int, steps: int, most: int) -> list[str]:
    """Makes both runs and prints what happened; returns what is wrong."""
    shards = make_shards(make_raw(folder / "raw"), folder / "shards")
    with Cluster(folder / "cluster", nodes=3) as cluster:
        job = Soak(cluster, shards, folder, steps, random.Random(seed))
        undisturbed = folder / "undisturbed"
        print(
            f"load average {os.getloadavg()[0]:.1f}; {steps} steps, a checkpoint every {SAVE_EVERY}",
            flush=True,
        )
        cluster.wait(job.submit(undisturbed), job.wait_s, Path(f"{undisturbed}.out"))
        started = time.time()
        number = job.submit(job.run_dir)
        job.disturb(number, time.monotonic() + 60 * minutes, most)
        state = cluster.wait(number, job.wait_s, Path(f"{job.run_dir}.out"))
    if state["JobState"] != "COMPLETED":
        return [f"the job ended as {state['JobState']}: {Path(f'{job.run_dir}.out')}"]
    made, wall_s = records(job.run_dir), time.time() - started
    print(f"{len(job.faults)} faults, {state['Restarts']} restarts, in {wall_s / 60:.1f} minutes")
    print("\n".join(table(job.faults, made)))
    lost = lost_steps(made)
    print(f"steps made {len(made)}, of them again {len(made) - steps}; lost at each restart: {lost}")
    for name, run_dir in (("undisturbed", undisturbed), ("disturbed", job.run_dir)):
        print(f"{name}: {goodput(run_dir)}")
    wrong = differences(job.run_dir, undisturbed, steps)
    if len(job.faults) < min(most, 5):
        wrong.append(f"only {len(job.faults)} faults, expected at least {min(most, 5)}")
    if max(lost, default=0) > 2 * SAVE_EVERY:  # the newest checkpoint may have been on its way
        wrong.append(f"{max(lost)} steps lost at once, more than two intervals of {SAVE_EVERY}")
    return wrong


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_soak(tmp_path: Path) -> None:
    assert not soak(tmp_path, minutes=20, seed=0, steps=2000, most=100)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20, help="no new faults after these (default: 20)")
    parser.add_argument("--faults", type=int, default=1000, help="nor after this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="length of both runs (default: 2000)")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    options = parser.parse_args()
    if missing := missing_programs():
        sys.exit(f"error: SLURM is not installed (apt-get install slurm-wlm munge): no {', '.join(missing)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # daemons are stopped on the way out
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        wrong = soak(folder, options.minutes, options.seed, options.steps, options.faults)
    print("\n".join(wrong[:20]) or "losses of every step and final parameters: those of the undisturbed run")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
