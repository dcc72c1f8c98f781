"""How far a command is."""

import sys
import time


class Progress:
    """A line on stderr, at most once a second; kept on one line where stderr is a terminal."""

    def __init__(self) -> None:
        self._name = ""
        self._start = self._last = 0.0

    def __call__(self, name: str, done: int, total: int | None = None, note: str = "") -> None:
        """Says that `done` of `total` rows of `name` are finished."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._start, self._last = name, now, now
        if now - self._last < 1 and done != total:
            return
        self._last = now
        of = f" of {total}" if total is not None else ""
        rate = done / max(now - self._start, 1e-3)
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{name}: {done}{of} images, {rate:.0f}/s{note}", end=end, file=sys.stderr, flush=True)
