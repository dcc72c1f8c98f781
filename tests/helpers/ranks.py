"""Starts ranks inside a test: processes that share a gloo group and run one function.

Ranks are forked from a server process that has already imported torch and DeepSpeed, so that a group
starts in a fraction of a second. A rank that fails or hangs fails the test, and no process is left.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# torch imports its compiler in the first optimizer step: seconds for every rank.
PRELOAD = ["torch", "torch._dynamo", "deepspeed", "torch.utils.tensorboard", "mt_deepspeed.engine.loop"]
# Read by DeepSpeed when it is imported, and by OpenMP when torch is: before the server starts.
SERVER_ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class RankError(AssertionError):
    """A rank raised, died or hung."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0
) -> list[Any]:
    """Runs `function(place, *args)` on `world_size` ranks; returns their results in rank order.

    Args:
        function: A module-level function, pickled by name.
        timeout_s: Then the ranks are killed and the test fails.

    Raises:
        RankError: With the traceback of every rank that raised.
    """
    os.environ.update(SERVER_ENV)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(sender, rank, world_size, port, function, args), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.join(timeout=5)
            if process.is_alive():
                process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, tuple[bool, Any]] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} hang; finished: {sorted(results)}")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                results[rank] = pipe.recv()
            except EOFError:
                results[rank] = (False, "died without a word")
            if not results[rank][0]:  # the others wait for this one: do not wait for them
                deadline = min(deadline, time.monotonic() + 3.0)
    failures = [f"rank {rank}:\n{value}" for rank, (fine, value) in sorted(results.items()) if not fine]
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank][1] for rank in range(len(pipes))]


def _work(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(rank_environment(rank, world_size, port))
    try:
        import torch

        from mt_deepspeed.engine import launch

        torch.set_num_threads(1)
        place = launch.init(timeout_s=60)
        result = function(place, *args)
        launch.shutdown()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher sets for one of `world_size` ranks on this machine."""
    return {
        **SERVER_ENV,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
