"""A map over processes whose results come in order, with little under way at a time."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yields `function(task)` for each task, in the order of the tasks whatever `workers` is.

    At most three tasks a worker are under way or waiting to be taken, so memory does not grow with the
    number of tasks. One worker means this very process. Workers are spawned, not forked: the caller may hold
    threads.

    Raises:
        ValueError: `workers` is not positive.
        RuntimeError: A worker process died (most often for lack of memory).
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if workers == 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = iter(tasks)
        running: deque[Future[Result]] = deque(
            pool.submit(function, task) for task in islice(waiting, 3 * workers)
        )
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(function, task) for task in islice(waiting, 1))
            yield result
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, most often for lack of memory; use fewer --workers and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
