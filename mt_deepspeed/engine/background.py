"""Work that goes on beside training: one thread per rank, with collectives of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Background:
    """Runs one piece of work at a time in a thread; what it raises is raised by `wait`.

    Args:
        timeout_s: Seconds after which a collective of the work that some rank never joins becomes an error.

    Attributes:
        group: The gloo group for the work's collectives, which must not mix with those of training.
    """

    def __init__(self, timeout_s: float) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins `work`; the one before must have been waited for. Call on all ranks."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="background", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether work was started that `wait` has not collected: the same on all ranks."""
        return self._thread is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still works."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits for the work, if there is some, and raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
