"""Signals that ask a run to save and stop: remembered here, acted on at the next step boundary.

Imports no torch: handlers must stand before torch is imported, which takes seconds, since the default action of
SIGUSR1 and SIGUSR2 is the death of the process.
"""

from __future__ import annotations

import atexit
import signal
from multiprocessing import forkserver
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_received: set[int] = set()


def install() -> None:
    """From now on stop signals set a flag and nothing else, to the very end; call in the main thread."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)
    atexit.register(_ignore)


def _ignore() -> None:
    """The interpreter, as it ends, gives back to their default action the signals that Python code handles.

    srun ends the ranks that are slower to leave than the first; their exit code has to be their own then.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> dict[str, bool]:
    """Name of each stop signal -> whether this process has got it."""
    return {number.name: int(number) in _received for number in STOP_SIGNALS}


def forget() -> None:
    """As if no signal had come."""
    _received.clear()


def start_fork_server() -> None:
    """Starts the server that loader processes are forked from, deaf to stop signals.

    Schedulers signal a whole process group, and a loader that dies would fail the save that the signal asks for.
    What is ignored stays so across fork and exec; a signal that comes meanwhile waits, blocked, for our handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.add(number)
