"""Process start-up: rank and address from any launcher, process group, device, logging.

Understands the `deepspeed` launcher, `torchrun`, `srun` with one task per rank, and a plain
`python` process (one rank).
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

log = logging.getLogger("mt_deepspeed")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of `mallopt` (malloc.h of glibc)."""


class LaunchError(ValueError):
    """The environment of the process does not say which rank it is."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init(timeout_s: float = 600.0) -> Place:
    """Joins the process group and chooses the device; call once, before the task is built.

    Args:
        timeout_s: Seconds after which a collective that some rank never joins becomes an error.

    Raises:
        LaunchError: Contradictory rank variables.
    """
    fill_rank_environment(os.environ)
    # DeepSpeed compiles a shared-memory all-reduce for inference when it joins the group (a minute
    # with a compiler, a crash without); nothing here uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    place = _place()
    _configure_logging(place.rank)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    else:
        keep_freed_memory()
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return place


def shutdown() -> None:
    """Leaves the process group, so that the interpreter ends without warnings."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def keep_freed_memory() -> None:
    """Has glibc keep freed memory instead of returning it to the system after every large tensor.

    Fetching and clearing those pages anew was a fifth of a CPU's training step at `managertower-base` sizes. Other
    C libraries stay as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):  # no mappings; never trim the heap
        if libc.mallopt(parameter, value) != 1:
            raise OSError(f"mallopt({parameter}, {value}) was refused")


def fill_rank_environment(env: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT where they are missing.

    Launchers' own values stay; otherwise SLURM's are translated; otherwise the process is alone.

    Raises:
        LaunchError: RANK without WORLD_SIZE or the reverse; no MASTER_ADDR and no SLURM to ask.
    """
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise LaunchError(f"{there} is set but {missing} is not: set both, or neither to run one process")
    if "RANK" in env:
        env.setdefault("LOCAL_RANK", env["RANK"])
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "29500")
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env and "SLURM_STEP_ID" in env:
        _from_slurm(env)
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(_free_port()))


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts per node, such as `2(x2),1`, as a list: [2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r}: cannot read {part!r}, expected N or N(xM)"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _from_slurm(env: MutableMapping[str, str]) -> None:
    """One `srun` task per rank: SLURM names rank and node, DeepSpeed wants RANK and MASTER_ADDR."""
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1"))
    env["LOCAL_SIZE"] = str(counts[int(env["SLURM_NODEID"])])
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_node_address(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    # Jobs that share a node must not share a port; ids differ, and this range is below ephemeral ports.
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 12000))


def _first_node_address(node_list: str) -> str:
    try:
        names = subprocess.check_output(["scontrol", "show", "hostnames", node_list], text=True).split()
        node = subprocess.check_output(["scontrol", "-o", "show", "node", names[0]], text=True)
    except (OSError, subprocess.CalledProcessError) as error:  # in a container, say
        raise LaunchError(
            f"MASTER_ADDR is not set, and scontrol does not tell it ({error}): set it"
        ) from error
    match = re.search(r"NodeAddr=(\S+)", node)
    return match[1] if match else names[0]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _place() -> Place:
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        # srun may show each task only its own GPU: then the only visible one is this rank's.
        device = torch.device(accelerator.device_name(), local_rank % max(1, accelerator.device_count()))
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)


def _configure_logging(rank: int) -> None:
    """Rank 0 prints progress on standard output; other ranks only warnings. DeepSpeed: warnings."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
