"""Many downloads at once, few of them from one host, results in the order of the links."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from data_tools.options import BadOption

Task = TypeVar("Task")
Result = TypeVar("Result")

_WINDOW = 32  # tasks a worker that are read ahead, so that a slow host does not hold up the others
_MAX_REMEMBERED = 10_000  # hosts


@dataclass(frozen=True)
class Politeness:
    """How a single host is treated.

    Attributes:
        per_host: Downloads from it at a time.
        interval: Seconds between the starts of two of them.
    """

    per_host: int = 4
    interval: float = 0.05

    def check(self) -> None:
        """Refuses impossible settings.

        Raises:
            ValueError: Names the setting.
        """
        if self.per_host < 1:
            raise BadOption(f"--per-host {self.per_host}: expected at least 1")
        if not 0 <= self.interval < float("inf"):
            raise BadOption(f"--host-interval {self.interval}: expected seconds, at least 0")


def run_in_order(
    tasks: Iterable[tuple[str, Task]],
    work: Callable[[Task], Result],
    threads: int,
    politeness: Politeness,
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, `work(task)`) in the order of the tasks.

    Args:
        tasks: (host, task); an empty host means that there is nothing to wait for.
        work: Runs in a thread; what it raises is raised here.
        threads: Downloads at a time.
        politeness: Towards each host.

    Raises:
        ValueError: Impossible numbers.
    """
    politeness.check()
    if threads < 1:
        raise BadOption(f"--workers {threads}: expected at least 1")
    run = _Run(tasks, work, threads, politeness)
    try:
        yield from run.results()
    finally:
        run.stop()


class _Run(Generic[Task, Result]):
    def __init__(
        self,
        tasks: Iterable[tuple[str, Task]],
        work: Callable[[Task], Result],
        threads: int,
        politeness: Politeness,
    ) -> None:
        self._tasks = enumerate(tasks)
        self._work = work
        self._threads = threads
        self._politeness = politeness
        self._jobs: SimpleQueue[tuple[int, str, Task] | None] = SimpleQueue()
        self._finished: SimpleQueue[tuple[int, str, Result | BaseException]] = SimpleQueue()
        self._window: deque[tuple[int, Task]] = deque()  # read and not yielded
        self._results: dict[int, Result] = {}
        self._waiting: dict[str, deque[tuple[int, Task]]] = {}
        self._active: Counter[str] = Counter()
        self._next_start: dict[str, float] = {}
        for _ in range(threads):  # they do not keep the process alive when it is interrupted
            threading.Thread(target=self._serve, name="fetch", daemon=True).start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            index, host, task = job
            try:
                self._finished.put((index, host, self._work(task)))
            except BaseException as error:
                self._finished.put((index, host, error))

    def stop(self) -> None:
        """Lets the threads end after what they are doing."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def results(self) -> Iterator[tuple[Task, Result]]:
        """See `run_in_order`."""
        exhausted = False
        while True:
            while not exhausted and len(self._window) < _WINDOW * self._threads:
                exhausted = not self._read()
            wait = self._start()
            while self._window and self._window[0][0] in self._results:
                index, task = self._window.popleft()
                yield task, self._results.pop(index)
            if not self._window:
                if exhausted:
                    return
                continue
            self._take(wait)

    def _read(self) -> bool:
        found = next(self._tasks, None)
        if found is None:
            return False
        index, (host, task) = found
        self._window.append((index, task))
        self._waiting.setdefault(host, deque()).append((index, task))
        return True

    def _start(self) -> float | None:
        """Starts what may start; returns the seconds until more may, None if only a result can change that."""
        while sum(self._active.values()) < self._threads:
            now = time.monotonic()
            host = next((host for host in self._waiting if self._may_start(host, now)), None)
            if host is None:
                resting = [
                    self._next_start.get(host, now) - now
                    for host in self._waiting
                    if self._active[host] < self._politeness.per_host
                ]
                return max(0.0, min(resting)) if resting else None
            own = self._waiting.pop(host)
            self._jobs.put((own[0][0], host, own[0][1]))
            own.popleft()
            if own:
                self._waiting[host] = own  # behind the other hosts
            self._active[host] += 1
            if len(self._next_start) > _MAX_REMEMBERED:
                self._next_start = {one: start for one, start in self._next_start.items() if start > now}
            self._next_start[host] = now + self._politeness.interval
        return None

    def _may_start(self, host: str, now: float) -> bool:
        if not host:
            return True
        free = self._active[host] < self._politeness.per_host
        return free and self._next_start.get(host, now) <= now

    def _take(self, wait: float | None) -> None:
        """Takes the results that are there, after waiting for the first."""
        try:
            found = self._finished.get(timeout=wait)
            while True:
                index, host, result = found
                self._active[host] -= 1
                if not self._active[host]:
                    del self._active[host]
                if isinstance(result, BaseException):
                    raise result
                self._results[index] = result
                found = self._finished.get_nowait()
        except Empty:
            return
