"""Checks of every node before a run starts; all findings are told together, and a bad node is named.

The ranks meet through a key-value store (the one `torch.distributed` starts from), not through a process group: a
node without a working GPU or network card could not join one, and would leave the others waiting.

A check that fails on some nodes and passes on others is those nodes' fault: their names go to `RUN/bad_nodes.txt`
and the exit code is `Exit.BAD_NODE`, so that a batch script can ask for other nodes. What fails everywhere is a
fault of the job: `Exit.FAILED`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mt_deepspeed.engine import durable
from mt_deepspeed.engine.checkpoint import versions
from mt_deepspeed.engine.exit_codes import Exit
from mt_deepspeed.engine.launch import fill_rank_environment
from mt_deepspeed.engine.node_health import driver_version, gpu_fault, node_name

log = logging.getLogger(__name__)

MAX_CLOCK_SKEW_S = 5.0
SLOW_GPU = 0.5
"""A GPU is at fault below this share of the ranks' median speed."""
BAD_NODES = "bad_nodes.txt"


class MeetingError(ValueError):
    """Ranks did not come, or stopped answering."""


Check = Callable[[], None]
"""Raises ValueError or OSError, with what was found and what was expected."""


@dataclass
class Report:
    """What one rank found on its node."""

    rank: int
    node: str
    faults: dict[str, str] = field(default_factory=dict)
    """Check -> what is wrong; shared by construction of the check: see `Verdict`."""
    node_faults: dict[str, str] = field(default_factory=dict)
    """The same, for checks whose failure can only be the node's (GPU, clock)."""
    versions: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    """Time of day at which the ranks met."""
    gpu_tflops: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Check -> how long it took."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks conclude from all reports; the same on each."""

    lines: list[str]
    """One per fault, with the nodes it was found on."""
    bad_nodes: list[str]
    code: Exit


def run_checks(checks: dict[str, Check], run_dir: Path | None, timeout_s: float = 120.0) -> Verdict:
    """Runs the node checks and `checks` on every rank, and compares the nodes; call before `launch.init`.

    Args:
        checks: Name -> check of something that all nodes should see alike, such as the shards. Run by one rank of
            each node.
        run_dir: Where `bad_nodes.txt` is written if nodes are at fault; None: nowhere.
        timeout_s: For ranks that start late; those that never come are named.

    Raises:
        LaunchError: Contradictory rank variables.
        MeetingError: A rank did not come, or stopped answering.
    """
    fill_rank_environment(os.environ)
    meeting = Meeting(timeout_s)
    report = Report(meeting.rank, node_name())
    meeting.join(report.node)
    if os.environ["LOCAL_RANK"] == "0":
        for name, check in checks.items():
            _timed(report, name, check, report.faults)
    _timed(report, "drill", _drill, report.node_faults)
    _timed(report, "GPU", lambda: _gpu(report), report.node_faults)
    report.versions = {**versions(), "driver": driver_version()}
    report.clock_s = meeting.clock()
    verdict = judge(meeting.exchange(report))
    if meeting.rank == 0 and verdict.bad_nodes and run_dir is not None:
        _write_bad_nodes(run_dir, verdict.bad_nodes)
    meeting.leave()
    return verdict


_KEPT: list[Any] = []
"""Rank 0 holds the server: a rank may still be talking to it when the process group starts."""


class Meeting:
    """Brings reports of all ranks together; blocking, with a time limit."""

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # torchrun holds the store itself, and keeps it when it starts the ranks again.
        elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        address, limit = os.environ["MASTER_ADDR"], timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(
                address,
                int(os.environ["MASTER_PORT"]),
                is_master=self.rank == 0 and not elastic,
                timeout=limit / 2,  # a rank that finds no server waits twice, with a pause between
                wait_for_workers=False,  # or it could not be said which ones are missing
                multi_tenant=True,  # the process group that follows uses the same server
            )
        except (dist.DistError, RuntimeError) as error:
            raise MeetingError(f"rank 0 at {address} cannot be reached: {error}") from error
        store.set_timeout(limit)
        _KEPT.append(store)
        self.store = dist.PrefixStore(f"mt_preflight/{attempt}", store)

    def join(self, node: str) -> None:
        """Says that this rank is there and waits for the others.

        Raises:
            MeetingError: Names the ranks that did not come, with the nodes of those beside them.
        """
        self.store.set(f"node/{self.rank}", node)
        self._wait("node", "did not start")

    def clock(self) -> float:
        """Time of day, read on all ranks at nearly the same moment."""
        self.store.set(f"ready/{self.rank}", "1")
        self._wait("ready", "did not finish the checks")
        self.store.set(f"tick/{self.rank}", "1")
        self._wait("tick", "stopped answering")
        return time.time()

    def exchange(self, report: Report) -> list[Report]:
        """The reports of all ranks, on all ranks."""
        self.store.set(f"report/{self.rank}", json.dumps(asdict(report)))
        self._wait("report", "stopped answering")
        return [Report(**json.loads(self.store.get(f"report/{rank}"))) for rank in range(self.world_size)]

    def leave(self) -> None:
        """Rank 0 holds the server: it goes last."""
        self.store.set(f"left/{self.rank}", "1")
        if self.rank == 0:
            self._wait("left", "stopped answering")

    def _wait(self, key: str, what: str) -> None:
        try:
            self.store.wait([f"{key}/{rank}" for rank in range(self.world_size)])
        except (dist.DistStoreError, RuntimeError) as error:
            missing = [rank for rank in range(self.world_size) if not self.store.check([f"{key}/{rank}"])]
            raise MeetingError(
                f"rank {', '.join(map(str, missing))} of {self.world_size} {what} in time; look at the job's "
                f"output for the first error of those ranks ({self._nodes(missing)})"
            ) from error

    def _nodes(self, ranks: list[int]) -> str:
        known = {
            self.store.get(f"node/{rank}").decode() for rank in ranks if self.store.check([f"node/{rank}"])
        }
        return f"node {', '.join(sorted(known))}" if known else "their nodes never reported"


def judge(reports: list[Report]) -> Verdict:
    """Turns the ranks' reports into faults, bad nodes and an exit code."""
    nodes = list(dict.fromkeys(report.node for report in reports))
    lines: list[str] = []
    bad: set[str] = set()
    everywhere = False
    shared: dict[str, dict[str, str]] = {}
    for report in reports:
        for name, text in report.faults.items():
            shared.setdefault(name, {}).setdefault(report.node, text)
        for name, text in report.node_faults.items():
            bad.add(report.node)
            lines.append(f"{name}: node {report.node} (rank {report.rank}): {text}")
    for name, found in shared.items():
        texts = Counter(found.values())
        told = "; ".join(f"{text} (on {', '.join(n for n in found if found[n] == text)})" for text in texts)
        if len(found) == len(nodes):
            everywhere = True
            lines.append(f"{name}: {next(iter(texts)) if len(texts) == 1 else told}")
        else:
            bad |= set(found)
            lines.append(f"{name}: {told}; the other nodes are fine")
    for node, line in [*_versions(reports), *_clocks(reports), *_slow_gpus(reports)]:
        bad.add(node)
        lines.append(line)
    code = Exit.FAILED if everywhere else Exit.BAD_NODE if bad else Exit.FINISHED
    return Verdict(lines, sorted(bad), code)


def _versions(reports: list[Report]) -> list[tuple[str, str]]:
    """Nodes whose software differs from that of most (of rank 0's, where there is no most)."""
    found = []
    for package in dict.fromkeys(key for report in reports for key in report.versions):
        values = {report.node: report.versions.get(package, "not installed") for report in reports}
        usual = Counter(values.values()).most_common(1)[0][0]  # the first of equals: rank 0's
        found += [
            (node, f"versions: node {node} has {package} {value}, the others {usual}")
            for node, value in values.items()
            if value != usual
        ]
    return found


def _clocks(reports: list[Report]) -> list[tuple[str, str]]:
    middle = statistics.median(report.clock_s for report in reports)
    skews = {report.node: report.clock_s - middle for report in reports}
    return [
        (
            node,
            f"clock: node {node} is {skew:+.1f} s off the others, at most {MAX_CLOCK_SKEW_S:g} s are allowed",
        )
        for node, skew in skews.items()
        if abs(skew) > MAX_CLOCK_SKEW_S
    ]


def _slow_gpus(reports: list[Report]) -> list[tuple[str, str]]:
    speeds = [report.gpu_tflops for report in reports if report.gpu_tflops]
    if not speeds:
        return []
    usual = statistics.median(speeds)
    return [
        (
            report.node,
            f"GPU: node {report.node} (rank {report.rank}): {report.gpu_tflops:.0f} TFLOP/s in a matrix product, "
            f"the others {usual:.0f}",
        )
        for report in reports
        if report.gpu_tflops and report.gpu_tflops < SLOW_GPU * usual
    ]


def run_folder_check(run_dir: Path) -> Check:
    """Write, sync, rename, read and delete in the run folder (or the nearest folder above that exists)."""

    def check() -> None:
        folder = existing(run_dir)
        name = f".preflight-{socket.gethostname()}-{os.getpid()}"
        first, second = folder / name, folder / f"{name}-renamed"
        try:
            durable.write_text(first, name)
            durable.rename(first, second)
            if second.read_text("utf-8") != name:
                raise ValueError(f"{folder}: a file does not hold what was written to it")
        except OSError as error:
            raise ValueError(f"{folder}: cannot write, sync and rename a file ({error.strerror})") from error
        finally:
            for path in (first, second):
                path.unlink(missing_ok=True)

    return check


def space_check(run_dir: Path, checkpoint_bytes: int, kept: int) -> Check:
    """Room for `kept` checkpoints and the one being written, beside those that are there already."""

    def check() -> None:
        root = run_dir / "checkpoints"
        there = sum(path.stat().st_size for path in root.glob("*/*")) if root.is_dir() else 0
        # What is there will be replaced, except that the next one is written before the oldest goes.
        needed = max(checkpoint_bytes * (kept + 1) - there, checkpoint_bytes)
        free = shutil.disk_usage(existing(run_dir)).free
        if free < needed:
            raise ValueError(
                f"{existing(run_dir)}: {free / 2**30:.2f} GiB are free, {needed / 2**30:.2f} GiB are needed for "
                f"{kept + 1} checkpoints of {checkpoint_bytes / 2**30:.2f} GiB; free space, lower "
                "checkpoint.keep_last, or choose another run_dir"
            )

    return check


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.is_dir() else existing(path.parent)


def allreduce_gb_per_s(place_device: torch.device) -> float:
    """Bus bandwidth of an all-reduce of 64 MiB over all ranks in GB/s; a collective. 0 with one rank.

    2 (N - 1) / N times the bytes pass every rank's link, whatever the algorithm.
    """
    ranks = dist.get_world_size()
    if ranks == 1:
        return 0.0
    tensor = torch.zeros(64 << 18, device=place_device)
    times = []
    for _ in range(3):  # the first one sets up connections
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if place_device.type == "cuda":
            torch.cuda.synchronize(place_device)
        times.append(time.perf_counter() - started)
    return 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / min(times) / 1e9


def _timed(report: Report, name: str, check: Check, faults: dict[str, str]) -> None:
    started = time.perf_counter()
    try:
        check()
    except (OSError, RuntimeError, ValueError) as error:
        faults[name] = str(error)
    report.seconds[name] = round(time.perf_counter() - started, 3)


def _drill() -> None:
    if os.environ.get("MT_DRILL_BAD_NODE") == node_name():
        raise ValueError("MT_DRILL_BAD_NODE names this node: a drill, nothing is wrong with it")


def _gpu(report: Report) -> None:
    fault, report.gpu_tflops = gpu_fault(int(os.environ["LOCAL_RANK"]))
    if fault:
        raise ValueError(fault)


def _write_bad_nodes(run_dir: Path, names: list[str]) -> None:
    """One name a line, earlier ones kept: a job that is started again still wants to leave those out."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / BAD_NODES
    before = file.read_text("utf-8").split() if file.is_file() else []
    durable.replace_text(file, "".join(f"{name}\n" for name in dict.fromkeys([*before, *names])))
