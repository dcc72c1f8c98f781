"""A map over processes whose results come in order, with little under way at a time."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

from data_tools.options import BadOption

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(workers: int) -> None:
    """Refuses a number of processes that cannot be.

    Raises:
        BadOption: It is not positive.
    """
    if workers < 1:
        raise BadOption(f"--workers {workers}: expected at least 1")


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """Yields `function(task)` for each task, in the order of the tasks whatever `workers` is.

    At most two tasks a worker are under way or waiting to be taken, so memory does not grow with the
    number of tasks. One worker means this very process. Workers are spawned, not forked: the caller may hold
    threads. They end with the process that started them, however it ends.

    Raises:
        BadOption: `workers` is not positive.
        RuntimeError: A worker process died (most often for lack of memory).
    """
    check_workers(workers)
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    end, life = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(end,))
    try:
        waiting = iter(tasks)
        running: deque[Future[Result]] = deque(
            pool.submit(function, task) for task in islice(waiting, 2 * workers)
        )
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(function, task) for task in islice(waiting, 1))
            yield result
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, most often for lack of memory; use fewer --workers and run again"
        ) from error
    except BaseException:  # whoever stops waits for no task
        life.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        life.close()
        end.close()


def _end_with(end: Connection) -> None:
    """Ends this worker as soon as the other end of the pipe is closed, which only its parent holds.

    The parent closes it when it stops early. When it is killed, the system does: without this the worker, which
    could not be told, would wait for ever.
    """

    def wait() -> None:
        with suppress(EOFError, OSError):
            end.recv_bytes()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
